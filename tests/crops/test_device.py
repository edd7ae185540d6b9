"""Replay by Triton kernels gives the bits of the CPU: on a GPU, or in Triton's interpreter if there is none."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning_fabric.utilities import move_data_to_device
from torch.utils._python_dispatch import TorchDispatchMode

from fkd_ssl.crops import CROP_DTYPE, RECIPES, box_record, draw, image_key, kernels, replay, replay_digest
from fkd_ssl.crops.device import PendingCrops, check_device, concatenate, plan_crops, replay_on, replay_plan, resize_plans
from fkd_ssl.crops.operations import BLUR, FLAGS, JITTER, OPERATIONS
from fkd_ssl.crops.replay import resize_plan
from fkd_ssl.errors import ImageError, RequestError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if (request.param == "cpu") != INTERPRETED:
        pytest.skip("the interpreter runs on the CPU only, compiled kernels on a GPU only")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize(("height", "width"), [(375, 500), (1, 1), (40, 700), (1201, 902), (33, 35)])
def test_bits_are_those_of_replay(device, recipe, height, width):
    image = noise(height, width)
    records = draw(RECIPES[recipe], image_key(0, f"{height}"), height, width, 0, 8)
    for pixels, count in ((224, 1), (64, 4), (33, 6), (1, 2)):
        there = replay_on(device, image, records[:count], pixels)
        np.testing.assert_array_equal(there, replay(image, records[:count], pixels))


@pytest.mark.parametrize("pixels", [96, 17])
def test_every_flag_and_extreme_factors(device, pixels):
    rng = np.random.default_rng(1)
    records = np.zeros(2 * (FLAGS + 1), dtype=CROP_DTYPE)
    records["height"], records["width"] = rng.integers(1, 301, len(records)), rng.integers(1, 401, len(records))
    records["top"], records["left"] = 301 - records["height"], 401 - records["width"]
    records["flags"], records["order"] = np.arange(len(records)) % (FLAGS + 1), rng.integers(0, 24, len(records))
    for name in ("brightness", "contrast", "saturation"):
        records[name] = rng.uniform(0, 2, len(records))
    records["hue"], records["sigma"] = rng.uniform(-0.5, 0.5, len(records)), rng.uniform(0, 5, len(records))
    image = noise(301, 401)
    np.testing.assert_array_equal(replay_on(device, image, records, pixels), replay(image, records, pixels))


@pytest.mark.parametrize("pixels", [98, 70, 50])
def test_sides_that_fill_no_vector(device, pixels):
    """OpenCV's own code for the end of a row rounds halves up, which would change about one crop in forty."""
    image, records = noise(200, 300), draw(RECIPES["mocov2"], image_key(0, "sides"), 200, 300, 0, 60)
    records = records[(records["flags"] & BLUR) > 0]
    assert len(records) > 20
    np.testing.assert_array_equal(replay_on(device, image, records, pixels), replay(image, records, pixels))


def planned(images, records, pixels):
    crops = [PendingCrops(image=image, records=of_image) for image, of_image in zip(images, records, strict=True)]
    return plan_crops(crops, pixels, concatenate(crops))


def test_colour_factors_beyond_opencvs_integers_are_refused():
    record = box_record(0, 0, 8, 8)
    record["flags"], record["brightness"], record["contrast"], record["saturation"] = JITTER, 16, 4, 1
    with pytest.raises(RequestError, match="colour factors are too large for --device_crops"):
        planned([noise(8, 8)], [record], 4)
    record["flags"] = BLUR
    assert len(planned([noise(8, 8)], [record], 4)) == 1


@pytest.mark.parametrize("change", [{"order": 24}, {"hue": np.nan}, {"flags": FLAGS + 1}])
def test_invalid_records_are_refused(change):
    record = box_record(0, 0, 8, 8)
    for name, value in change.items():
        record[name] = value
    with pytest.raises(ImageError, match="invalid crop record: its file is damaged; run fkd-ssl verify"):
        planned([noise(8, 8)], [record], 4)


def test_several_images_at_once(device):
    images = [noise(80, 61, 1), noise(30, 200, 2), noise(64, 64, 3)]
    records = [draw(RECIPES["swav"], image_key(0, str(k)), *image.shape[:2], 0, 5) for k, image in enumerate(images)]
    there = replay_plan(planned(images, records, 24).to(device))
    assert there.is_contiguous(memory_format=torch.channels_last)
    here = np.concatenate([replay(image, of_image, 24) for image, of_image in zip(images, records, strict=True)])
    np.testing.assert_array_equal(there.cpu().numpy(), here)


def test_lightning_moves_a_plan_without_waiting_for_the_gpu():
    """It passes non_blocking to tensors only. The device meta stands for a GPU."""
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                copies.append(kwargs["non_blocking"])
            return function(*args, **(kwargs or {}))

    plan = planned([noise(80, 61)], [draw(RECIPES["swav"], image_key(0, "0"), 80, 61, 0, 5)], 24)
    with Copies():
        moved = move_data_to_device({"images": plan}, torch.device("meta"))["images"]
    assert moved.sources.is_meta
    assert len(copies) >= 4
    assert all(copies)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_making_crops_does_not_wait_for_the_gpu():
    """A wait would leave the GPU idle between two batches."""
    images = [noise(700, 901, 1), noise(64, 64, 2)]
    records = [draw(RECIPES["swav"], image_key(0, str(k)), *image.shape[:2], 0, 8) for k, image in enumerate(images)]
    plan = planned(images, records, 24).pin_memory()
    expected = replay_plan(plan.to("cuda"))  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = replay_plan(plan.to("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there, expected)


def test_no_crops_at_all(device):
    plan = planned([noise(4, 4)], [np.zeros(0, dtype=CROP_DTYPE)], 8)
    assert replay_plan(plan.to(device)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("pixels", [1, 32, 224])
def test_resize_plans_are_those_of_each_box(pixels):
    height, width = np.random.default_rng(0).integers(1, 3000, (2, 3000))
    halvings, doubled = resize_plans(height, width, pixels)
    boxes = zip(height.tolist(), width.tolist(), strict=True)
    assert list(zip(halvings.tolist(), doubled.tolist(), strict=True)) == [resize_plan(*box, pixels) for box in boxes]


@pytest.mark.parametrize("pixels", [1, 2, 5])
def test_boxes_that_are_halved_many_times(device, pixels):
    """Boxes of many sizes at once, with between 0 and 8 halvings before the resize."""
    image = noise(700, 901)
    records = np.concatenate(
        [box_record(3, 5, height, width) for height in (1, 9, 40, 131, 690) for width in (2, 77, 330, 891)]
    )
    np.testing.assert_array_equal(replay_on(device, image, records, pixels), replay(image, records, pixels))


@pytest.mark.parametrize("pixels", [33, 98, 192, 448])
def test_taps_have_the_bits_of_opencvs_formula(device, pixels):
    size = np.unique(np.r_[1:1500, np.random.default_rng(0).integers(1, 65536, 1500)])
    scale = 1.0 / (float(pixels) / size)
    position = ((np.arange(pixels) + 0.5) * scale[:, None] - 0.5).astype(np.float32)
    below = np.floor(position)
    weight = position - below
    first, second = (np.clip(below + k, 0, size[:, None] - 1) for k in (0, 1))
    one = np.float32(1)
    boxes = torch.zeros((len(size), 6), dtype=torch.int64)
    boxes[:, 2] = boxes[:, 3] = torch.from_numpy(size)
    rows, columns = kernels.taps(boxes.to(device), pixels)[..., :pixels].cpu().numpy().swapaxes(0, 1)
    assert (rows == columns).all()
    np.testing.assert_array_equal(rows >> 33, first)
    np.testing.assert_array_equal((rows >> 33) + ((rows >> 32) & 1), second)
    np.testing.assert_array_equal((rows >> 12) & 4095, np.rint((one - weight) * np.float32(2048)))
    np.testing.assert_array_equal(rows & 4095, np.rint(weight * np.float32(2048)))


def test_each_operation_has_a_kernel():
    assert all(callable(getattr(kernels, operation.name)) for operation in OPERATIONS)


COMPILE = """
import re
import struct
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fkd_ssl.crops import kernels

TYPES = {"source": "*u8", "scratch": "*u8", "views": "*u8", "flags": "*u8", "linear": "*i32", "offsets": "*fp64",
         "kernels": "*i32", "size": "i32"}
for name in ("halve", "taps", "resize", "colour", "blur_rows", "blur_columns", "flip"):
    kernel = getattr(kernels, "_" + name)
    values = {"P": 98, "BITS": 6, "BLOCK": 1024}
    constants = {name: value for name, value in values.items() if name in kernel.arg_names}
    types = {**TYPES, "sums": "*u16" if name.startswith("blur") else "*i64"}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "*i64") for arg in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    compiled = compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
    text = compiled.asm["ptx"]
    assert compiled.asm["cubin"] and not re.search("fma.*f(32|64)|approx|full", text), name
    assert bool(re.search("[.]f(32|64)", text)) == (name in ("taps", "colour")), name
    if name == "colour":
        assert "0d" + struct.pack(">d", 1 / (98 * 98)).hex().upper() in text  # not rounded to float32
print("compiled")
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter does not compile them. Needs no GPU.

    Fused multiply-adds and approximate divisions would change bits, and the interpreter has none.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr


def test_without_triton_or_a_gpu_it_says_so(device, monkeypatch):
    check_device(torch.device(device))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RequestError, match="--device_crops needs a CUDA GPU, found cpu: run without it"):
        check_device(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "fkd_ssl.crops.kernels", None)
    monkeypatch.delattr("fkd_ssl.crops.kernels")
    with pytest.raises(RequestError, match="--device_crops needs Triton, which is not installed: pip install triton"):
        check_device(torch.device("cuda"))


def test_plans_of_two_sizes_share_their_images(device):
    image, record = noise(8, 9), box_record(0, 0, 8, 9)
    crops = [PendingCrops(image=image, records=record)]
    sources = concatenate(crops)
    plans = [plan_crops(crops, pixels, sources) for pixels in (4, 6)]
    assert plans[0].sources.data_ptr() == plans[1].sources.data_ptr()
    for plan, pixels in zip(plans, (4, 6), strict=True):
        np.testing.assert_array_equal(replay_plan(plan.to(device)).cpu().numpy(), replay(image, record, pixels))


def test_a_slice_of_pending_crops_has_the_same_image():
    image = noise(8, 9)
    crops = PendingCrops(image=image, records=np.repeat(box_record(1, 2, 3, 4), 5))
    assert (len(crops[1:4]), crops[1:4].image is image) == (3, True)


@pytest.mark.slow
def test_the_replay_digest_says_that_both_agree(device):
    assert replay_digest(device) == replay_digest()


def test_a_box_outside_the_image_is_refused():
    with pytest.raises(ImageError, match="is outside an image of 5 x 4 pixels"):
        PendingCrops(image=noise(4, 5), records=box_record(0, 0, 5, 5))


def test_blur_and_jitter_were_really_tried():
    flags = draw(RECIPES["swav"], image_key(0, "375"), 375, 500, 0, 6)["flags"]
    assert (flags & BLUR).any()
    assert (flags & JITTER).any()
