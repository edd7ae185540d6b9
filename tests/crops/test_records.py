from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from fkd_ssl.crops import CROP_DTYPE, Recipe, box_record, centre, well_formed
from fkd_ssl.crops.operations import FLAGS, OPERATIONS
from fkd_ssl.crops.records import boxes, neutral, unpack
from fkd_ssl.errors import ImageError


def test_a_record_is_twenty_bytes_without_gaps():
    assert CROP_DTYPE.itemsize == 20
    assert sum(CROP_DTYPE[name].itemsize for name in CROP_DTYPE.names) == 20
    assert all(CROP_DTYPE[name].byteorder in "<|=" for name in CROP_DTYPE.names)


def test_bytes_of_a_record_are_pinned():
    record = box_record(1, 2, 300, 65535)
    record["flags"], record["order"], record["hue"], record["sigma"] = 15, 23, -0.5, 2.0
    assert record.tobytes().hex() == "010002002c01ffff0f17003c003c003c00b80040"


def test_neutral_records_change_no_colour():
    records = neutral(3)
    assert (records["flags"] == 0).all()
    assert (records["brightness"] == 1).all()
    assert (records["contrast"] == 1).all()
    assert (records["saturation"] == 1).all()
    assert (records["hue"] == 0).all()


@pytest.mark.parametrize(
    "box",
    [(0, 0, 101, 50), (0, 0, 100, 81), (1, 0, 100, 80), (0, 1, 100, 80), (0, 0, 0, 5), (0, 0, 5, 0), (65535, 0, 65535, 1)],
)
def test_boxes_outside_the_image_are_refused(box):
    good = box_record(0, 0, 100, 80)
    unpack(good, 100, 80)
    top, left, height, width = box
    message = rf"crop of {width} x {height} at \({left}, {top}\) is outside an image of 80 x 100 pixels: .*drawn for another"
    with pytest.raises(ImageError, match=message):
        unpack(np.concatenate([good, box_record(*box), good]), 100, 80)
    with pytest.raises(ImageError, match=message):
        boxes(np.concatenate([good, box_record(*box), good]), 100, 80)


def test_boxes_are_the_records_first_four_numbers():
    records = np.concatenate([box_record(0, 0, 100, 80), box_record(1, 2, 3, 4)])
    np.testing.assert_array_equal(boxes(records, 100, 80), [[0, 0, 100, 80], [1, 2, 3, 4]])
    assert boxes(records[:0], 100, 80).shape == (0, 4)


def test_the_table_of_operations_is_consistent():
    """Every flag has its own bit, every draw its own word, and every operation its settings in Recipe."""
    flags = {name: flag for operation in OPERATIONS for name, flag in operation.flags.items()}
    members = [field for operation in OPERATIONS for field in operation.fields.values()]
    assert Counter(flag.bit.bit_count() for flag in flags.values()) == {1: len(flags)}
    assert sum(flag.bit for flag in flags.values()) == FLAGS <= 255
    words = [each.word for each in [*flags.values(), *members]]
    assert len(set(words)) == len(words)
    assert all(40 <= word < 64 for word in words)
    settings = {setting.name for operation in OPERATIONS for setting in fields(operation.settings)}
    assert settings == {setting.name for setting in fields(Recipe)} - {"name", "scale", "ratio"}
    assert set(flags) <= settings
    assert all(field.low <= field.default <= field.high for field in members)


def test_well_formed():
    def record(**values: float) -> np.ndarray:
        made = box_record(0, 0, 5, 5)
        for field, value in values.items():
            made[field] = value
        return made

    for good in ({}, {"flags": FLAGS, "order": 23}, {"hue": -0.5}, {"brightness": 0, "contrast": 16}, {"sigma": 64}):
        assert well_formed(np.concatenate([record(), record(**good)])), good
    nan = float("nan")
    for bad in (
        {"flags": FLAGS + 1},
        {"flags": 255},
        {"order": 24},
        {"hue": 0.6},
        {"hue": nan},
        {"brightness": -1},
        {"contrast": nan},
        {"saturation": 17},
        {"sigma": -1},
        {"sigma": nan},
        {"sigma": 65},
        {"brightness": float("inf")},
    ):
        assert not well_formed(np.concatenate([record(), record(**bad)])), bad


@pytest.mark.parametrize("pixels", [32, 64, 96, 224])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (375, 500), (500, 333), (64, 64), (40, 900)])
def test_centre_is_the_middle_seven_eighths(height, width, pixels):
    (box,) = centre(height, width, pixels)
    short, side = min(height, width), int(box["height"])
    assert side == box["width"]
    assert abs(side - short * 7 / 8) <= 0.5 + short * 0.5 / pixels  # 8/7 of the pixels is rounded to whole pixels
    for start, length in ((box["top"], height), (box["left"], width)):
        assert abs((int(start) + side / 2) - length / 2) <= 0.5
    unpack(np.array([box]), height, width)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (2, 2)])
def test_centre_of_tiny_images(height, width):
    box = centre(height, width, 224)
    unpack(box, height, width)
    assert box["height"] == box["width"] >= 1


def test_centre_at_224_of_256_is_the_usual_view():
    assert tuple(centre(256, 341, 224)[0])[:4] == (16, 58, 224, 224)
