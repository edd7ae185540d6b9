"""The compiled resize gives OpenCV's pixels, stays inside its buffers, and is used by replay if it was built."""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import cv2
import numpy as np
import pytest

from fkd_ssl.crops import RECIPES, draw, replay

module = importlib.import_module("fkd_ssl.crops.replay")
avx2 = module._avx2
needs_it = pytest.mark.skipif(avx2 is None, reason="not built here")


def test_it_is_built_where_it_can_be():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if platform.machine() != "x86_64" or " avx2 " not in flags or sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("another processor, or a Python without the stable interface")
    if shutil.which(os.environ.get("CC", "gcc")) is None or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("no compiler, or no headers of Python's")
    assert avx2 is not None, "run pip install again: the package was installed before it had a compiled part"


@needs_it
@pytest.mark.parametrize("finer", [1, 2])
def test_the_resize_is_opencvs(finer):
    generator = np.random.default_rng(finer)
    for k in range(1500):
        pixels, height, width = int(generator.integers(1, 130)), *generator.integers((1, 2), 400)
        image = generator.integers(0, 256, (height + 3, width + 5, 3), dtype=np.uint8)
        if k % 3 == 0:
            image = np.where(image > 127, np.uint8(255), np.uint8(0))  # the largest sums
        crop = image[2 : 2 + height, 1 : 1 + width]
        fine = cv2.resize(crop, (finer * pixels, finer * pixels), interpolation=cv2.INTER_LINEAR)
        expected = fine if finer == 1 else cv2.resize(fine, (pixels, pixels), interpolation=cv2.INTER_AREA)
        view = np.empty((pixels, pixels, 3), dtype=np.uint8)
        avx2.resize(view, crop, finer)
        np.testing.assert_array_equal(view, expected, err_msg=f"{height} x {width} to {pixels}")


@needs_it
def test_the_halving_is_opencvs():
    generator = np.random.default_rng(0)
    for _ in range(500):
        height, width = generator.integers(2, 150, 2)
        crop = generator.integers(0, 256, (height + 1, width + 2, 3), dtype=np.uint8)[:height, 1 : 1 + width]
        size = (int(width) // 2, int(height) // 2)
        expected = cv2.resize(crop[: 2 * size[1], : 2 * size[0]], size, interpolation=cv2.INTER_AREA)
        view = np.empty((size[1], size[0], 3), dtype=np.uint8)
        avx2.halve(view, crop)
        np.testing.assert_array_equal(view, expected, err_msg=f"{height} x {width}")


@needs_it
@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("pixels", [7, 32, 96, 224])
def test_replay_is_the_same_without_it(recipe, pixels, monkeypatch):
    generator = np.random.default_rng(pixels)
    for height, width in [(375, 500), (333, 250), (64, 48), (9, 700), (700, 1)]:
        image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        records = draw(RECIPES[recipe], bytes(16), height, width, 0, 12)
        fast = replay(image, records, pixels)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_avx2", None)
            np.testing.assert_array_equal(replay(image, records, pixels), fast)


GUARDED = """
import ctypes, mmap, sys
import numpy as np
from fkd_ssl.crops import _avx2

libc, PAGE = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
kept = []

def at_the_end(*shape):
    # an array whose last byte is the last one that may be touched
    size = int(np.prod(shape))
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + pages * PAGE), PAGE, 0) == 0
    kept.append(memory)
    return np.frombuffer(memory, np.uint8, size, pages * PAGE - size).reshape(shape)

SIZES = [(1, 2, 1), (2, 2, 2), (2, 3, 3), (5, 7, 5), (33, 31, 6), (40, 50, 7), (64, 48, 32), (300, 200, 97)]
for height, width, pixels in SIZES:
    crop, view = at_the_end(height, width, 3), at_the_end(pixels, pixels, 3)
    for finer in (1, 2):
        _avx2.resize(view, crop, finer)
    if height > 1:
        _avx2.halve(at_the_end(height // 2, width // 2, 3), crop)
print("inside")
if len(sys.argv) > 1:
    ctypes.string_at(crop.ctypes.data + crop.size, 1)
"""


@needs_it
@pytest.mark.skipif(sys.platform != "linux", reason="guards pages by Linux's mprotect")
def test_nothing_behind_a_buffer_is_touched():
    def run(*more):
        return subprocess.run([sys.executable, "-c", GUARDED, *more], capture_output=True, text=True)

    done = run()
    assert (done.returncode, done.stdout) == (0, "inside\n"), done.stderr
    assert run("look behind").returncode < 0  # the guard detects a change


@needs_it
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda new: avx2.resize(new(8, 8, 3), new(9, 1, 3), 2), "at least 2 columns"),
        (lambda new: avx2.resize(new(8, 7, 3), new(9, 9, 3), 2), "a square view"),
        (lambda new: avx2.resize(new(8, 8, 3), new(9, 9, 3), 3), "1 or 2"),
        (lambda new: avx2.resize(new(8, 8, 3), new(9, 9, 4), 1), r"uint8 \[height, width, 3\]"),
        (lambda new: avx2.resize(new(8, 8, 3), new(9, 9, 3)[:, ::2], 1), r"uint8 \[height, width, 3\]"),
        (lambda new: avx2.resize(new(8, 8, 3), new(9, 9, 3)[::-1], 1), r"uint8 \[height, width, 3\]"),
        (lambda new: avx2.resize(new(8, 8, 3), new(9, 9, 3).astype(np.int16), 1), r"uint8 \[height, width, 3\]"),
        (lambda new: avx2.resize(new(8, 8, 3), new(9, 9, 3).astype(np.int8), 1), r"uint8 \[height, width, 3\]"),
        (lambda new: avx2.resize(new(8, 8, 3).astype(bool), new(9, 9, 3), 1), r"uint8 \[height, width, 3\]"),
        (lambda new: avx2.resize(new(8, 8, 3), new(9, 9, 3)[:0], 1), r"uint8 \[height, width, 3\]"),
        (lambda new: avx2.resize(new(8, 9, 3)[:, :8], new(9, 9, 3), 1), r"uint8 \[height, width, 3\]"),
        (lambda new: avx2.resize(new(8, 8), new(9, 9, 3), 1), r"uint8 \[height, width, 3\]"),
        (lambda new: avx2.halve(new(4, 5, 3), new(9, 9, 3)), "half the crop's size"),
    ],
)
def test_other_buffers_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(lambda *shape: np.zeros(shape, dtype=np.uint8))


@needs_it
def test_what_may_not_be_written_is_not():
    view = np.zeros((8, 8, 3), dtype=np.uint8)
    view.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        avx2.resize(view, np.ones((9, 9, 3), dtype=np.uint8), 1)
    assert not view.any()
