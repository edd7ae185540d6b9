"""Real kills at random moments, and a disk that is really full."""

import errno
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from fkd_ssl import images
from fkd_ssl.crops import RECIPES
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write.precompute import precompute

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 5)


def make(folder, image_folder, teacher):
    precompute(images.scan(image_folder), folder, teacher, crops=6, recipe=RECIPES["mocov2"], pixels=32, chunk_size=7)
    return folder


def test_killed_at_random_moments_by_twos(tmp_path, start, tree, image_folder, new_teacher):
    """Two processes at a time are killed within about half a second, until one ends by itself."""
    chance = random.Random(0)
    expected = tree(make(tmp_path / "whole", image_folder, new_teacher()))
    kills = 0
    for k in range(3):
        store = tmp_path / f"store{k}"
        options = {"images": str(image_folder), "folder": str(store), "rows_per_shard": 5, "journal_seconds": 0, "pause": 0.02}
        for attempt in range(30):
            running = [start(**options) for _ in range(2)]
            for process in running:
                process.join(chance.uniform(0.1, 0.8 + 0.2 * attempt))
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                    kills += 1
                process.join(60)
                assert process.exitcode in (0, -signal.SIGKILL)
            if any(process.exitcode == 0 for process in running):
                break
        make(store, image_folder, new_teacher())
        assert {name: data for name, data in tree(store).items() if ".tmp-" not in name} == expected
        assert verify(open_store(store), images.scan(image_folder)).problems == []
    assert kills >= 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 pages, and a function that enlarges it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("only root can mount a small disk")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "none", folder], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr!r}")

    def grow(kilobytes):
        subprocess.run([mount, "-o", f"remount,size={kilobytes}k", folder], check=True)

    yield folder, grow
    time.sleep(0.1)
    subprocess.run([shutil.which("umount"), "-l", folder], check=True)


def test_a_disk_that_is_really_full(tmp_path, small_disk, start, tree, image_folder, new_teacher):
    """It grows by four pages after each failed run; each run reports the full disk, and the last one finishes."""
    folder, grow = small_disk
    expected = tree(make(tmp_path / "whole", image_folder, new_teacher()))
    size, failed = 16, 0
    while True:
        grow(size)
        report = tmp_path / "report.json"
        process = start(
            images=str(image_folder), folder=str(folder / "store"), rows_per_shard=5, report=str(report), journal_seconds=0
        )
        process.join(120)
        if process.exitcode == 0:
            break
        text = report.read_text()
        assert f'"errno": {errno.ENOSPC}' in text or "the disk has" in text, text
        failed, size = failed + 1, size + 16
    assert failed >= 3
    left = {name: data for name, data in tree(folder / "store").items() if ".tmp-" not in name}
    assert left == expected
