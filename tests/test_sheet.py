"""Contact sheets: what a record is said to do, and that boxes and crops are really drawn."""

import io

import numpy as np
import pytest
from PIL import Image

from fkd_ssl import sheet
from fkd_ssl.crops import box_record
from fkd_ssl.crops.operations import BLUR, FLIP, GREY, JITTER


def test_a_record_in_words():
    record = box_record(0, 0, 30, 40)
    assert sheet.describe(record[0]) == "40 x 30"
    record["flags"] = FLIP | JITTER | GREY | BLUR
    record["brightness"], record["hue"], record["sigma"] = 1.25, -0.05, 1.5
    assert sheet.describe(record[0]) == "40 x 30, flip\n1.25, 1.00, 1.00, -0.05\ngrey, blur 1.5"


def drawn(near):
    """A sheet of a grey image with two crops, one red and one green, and blue neighbours."""
    plain = {
        name: np.full((8, 8, 3), colour, dtype=np.uint8)
        for name, colour in {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}.items()
    }
    crops = [sheet.Picture(pixels=plain[name], caption=name) for name in ("red", "green")]
    neighbours = [[sheet.Picture(pixels=plain["blue"], caption="blue")] * near for _ in crops]
    records = np.concatenate([box_record(0, 0, 20, 20), box_record(10, 10, 20, 30)])
    png = sheet.draw(np.full((40, 60, 3), 128, dtype=np.uint8), records, crops, neighbours, "title")
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def share(pixels, colour):
    return float((np.abs(pixels - colour).max(axis=2) < 8).mean())


@pytest.mark.parametrize("near", [0, 2])
def test_everything_is_on_it(near):
    pixels = drawn(near)
    assert share(pixels, (250, 0, 0)) == pytest.approx(share(pixels, (0, 250, 0)), rel=0.1)
    assert share(pixels, (250, 0, 0)) > 0.01
    assert share(pixels, (128, 128, 128)) > 0.05
    assert share(pixels, (0, 0, 250)) == pytest.approx(2 * near * share(pixels, (250, 0, 0)), rel=0.1)
    for box in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two colours
        assert share(pixels, box) > 0.001
