"""Replay on a device: the bits of the CPU's path. On the CPU here, and on a GPU where there is one."""

import numpy as np
import pytest
import torch

from fkd_ssl.crops import CROP_DTYPE, RECIPES, box_record, draw, image_key, probe_digest, replay
from fkd_ssl.crops import device as on_device
from fkd_ssl.crops.device import PendingCrops, concatenate, plan_crops, replay_plan
from fkd_ssl.crops.operations import BLUR, FLAGS, JITTER
from fkd_ssl.crops.replay import resize_plan
from fkd_ssl.errors import ImageError, RequestError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize(("height", "width"), [(375, 500), (1, 1), (40, 700), (1201, 902), (33, 35)])
def test_bits_are_those_of_replay(device, recipe, height, width):
    image = noise(height, width)
    records = draw(RECIPES[recipe], image_key(0, f"{height}"), height, width, 0, 6)
    for pixels in (224, 64, 33, 1):
        there = on_device.replay_on(device, image, records, pixels)
        np.testing.assert_array_equal(there, replay(image, records, pixels))


@pytest.mark.parametrize("pixels", [224, 96, 17])
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
    np.testing.assert_array_equal(on_device.replay_on(device, image, records, pixels), replay(image, records, pixels))


@pytest.mark.parametrize("pixels", [98, 100, 70, 50])
def test_sides_that_fill_no_vector(device, pixels):
    """Where OpenCV's own code for the end of a row would round halves up: about one crop in forty."""
    for k in range(5):
        image = noise(200, 300, k)
        records = draw(RECIPES["mocov2"], image_key(0, str(k)), 200, 300, 0, 40)
        np.testing.assert_array_equal(on_device.replay_on(device, image, records, pixels), replay(image, records, pixels))


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


@pytest.mark.parametrize("elements", [1, 1 << 16])
def test_several_images_at_once_in_parts_of_any_size(device, elements, monkeypatch):
    monkeypatch.setattr(on_device, "ELEMENTS", elements)
    images = [noise(80, 61, 1), noise(30, 200, 2), noise(64, 64, 3)]
    records = [draw(RECIPES["swav"], image_key(0, str(k)), *image.shape[:2], 0, 5) for k, image in enumerate(images)]
    there = replay_plan(planned(images, records, 24).to(device))
    assert there.is_contiguous(memory_format=torch.channels_last)
    here = np.concatenate([replay(image, of_image, 24) for image, of_image in zip(images, records, strict=True)])
    np.testing.assert_array_equal(there.cpu().numpy(), here)


def test_no_crops_at_all(device):
    plan = planned([noise(4, 4)], [np.zeros(0, dtype=CROP_DTYPE)], 8)
    assert replay_plan(plan.to(device)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("pixels", [1, 32, 224])
def test_resize_plans_are_those_of_each_box(pixels):
    height, width = np.random.default_rng(0).integers(1, 3000, (2, 3000))
    halvings, doubled = on_device.resize_plans(height, width, pixels)
    boxes = zip(height.tolist(), width.tolist(), strict=True)
    assert list(zip(halvings.tolist(), doubled.tolist(), strict=True)) == [resize_plan(*box, pixels) for box in boxes]


def test_plans_of_two_sizes_share_their_images():
    image, record = noise(8, 9), box_record(0, 0, 8, 9)
    crops = [PendingCrops(image=image, records=record)]
    sources = concatenate(crops)
    plans = [plan_crops(crops, pixels, sources) for pixels in (4, 6)]
    assert plans[0].sources.data_ptr() == plans[1].sources.data_ptr()
    for plan, pixels in zip(plans, (4, 6), strict=True):
        np.testing.assert_array_equal(replay_plan(plan).numpy(), replay(image, record, pixels))


def test_a_slice_of_pending_crops_has_the_same_image():
    image = noise(8, 9)
    crops = PendingCrops(image=image, records=np.repeat(box_record(1, 2, 3, 4), 5))
    assert (len(crops[1:4]), crops[1:4].image is image) == (3, True)


def test_the_probe_digest_says_that_both_paths_agree(device):
    assert probe_digest(device) == probe_digest()


def test_a_box_outside_the_image_is_refused():
    with pytest.raises(ImageError, match="lies outside an image of 5 x 4 pixels"):
        PendingCrops(image=noise(4, 5), records=box_record(0, 0, 5, 5))


def test_blur_and_jitter_were_really_tried():
    flags = draw(RECIPES["swav"], image_key(0, "375"), 375, 500, 0, 6)["flags"]
    assert (flags & BLUR).any()
    assert (flags & JITTER).any()
