"""Contact sheets: descriptions of records; boxes, crops, frames and texts are drawn."""

import io

import numpy as np
import pytest
from PIL import Image

from fkd_ssl import sheet
from fkd_ssl.crops import box_record
from fkd_ssl.crops.operations import BLUR, FLIP, GREY, JITTER
from fkd_ssl.errors import RequestError

PLAIN = {
    name: np.full((8, 8, 3), colour, dtype=np.uint8)
    for name, colour in {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}.items()
}
HIT = (0x00, 0x79, 0x5A)


def test_a_record_in_words():
    record = box_record(0, 5, 30, 40)
    assert sheet.describe(record[0]) == ["box 40 x 30 px at left 5, top 0"]
    record["flags"] = FLIP | JITTER | GREY | BLUR
    record["brightness"], record["hue"], record["sigma"] = 1.25, -0.05, 1.5
    assert sheet.describe(record[0]) == [
        "box 40 x 30 px at left 5, top 0",
        "brightness ×1.25, contrast ×1.00, saturation ×1.00, hue -18°",
        "greyscale, blur sigma 1.5 px (in a crop of 224 px), flipped",
    ]


def opened(png):
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def drawn(near, title="title", same_class=None):
    """A sheet of a grey image with two crops, one red and one green, and blue neighbours."""
    neighbours = [[sheet.Picture(pixels=PLAIN["blue"], lines=("ash", "0.9"), same_class=same_class)] * near for _ in range(2)]
    records = np.concatenate([box_record(0, 0, 20, 20), box_record(10, 10, 20, 30)])
    image = np.full((40, 60, 3), 128, dtype=np.uint8)
    return opened(sheet.draw_crops(image, records, [PLAIN["red"], PLAIN["green"]], neighbours, title, "note"))


def share(pixels, colour):
    return float((np.abs(pixels - colour).max(axis=2) < 8).mean())


@pytest.mark.parametrize("near", [0, 2])
def test_everything_is_on_it(near):
    pixels = drawn(near)
    assert share(pixels, (250, 0, 0)) == pytest.approx(share(pixels, (0, 250, 0)), rel=0.1)
    assert share(pixels, (250, 0, 0)) > 0.01
    assert share(pixels, (128, 128, 128)) > 0.05
    assert share(pixels, (0, 0, 250)) == pytest.approx(2 * near * share(pixels, (250, 0, 0)), rel=0.1)
    for box in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        assert share(pixels, box) > 0.001


def test_the_large_picture_keeps_its_edges():
    """The picture is resampled once and pasted pixel by pixel, so a step of the image stays as steep as resampling makes it."""
    image = np.zeros((448, 448, 3), dtype=np.uint8)
    image[:, 224:] = 255
    png = sheet.draw_crops(image, box_record(0, 0, 1, 1), [PLAIN["red"]], [[]], "", "")
    row = opened(png)[300, :, 0]
    black = np.flatnonzero(row == 0)
    assert row[black[-1] + 1] == 255
    assert len(black) == 224


def test_a_picture_of_the_same_class_has_a_frame_and_a_mark():
    same, other, unknown = (drawn(2, same_class=value) for value in (True, False, None))
    frames = 4 * 4 * sheet.TILE * 4 / same[:, :, 0].size  # 4 pictures, 4 sides, 4 pixels wide
    assert share(same, HIT) == pytest.approx(frames, rel=0.25)
    assert share(other, HIT) == share(unknown, HIT) == 0
    assert (other != unknown).any()  # a cross


def test_long_names_are_shortened_in_their_middle():
    short, long = drawn(0), drawn(0, title="n01440764/" + "x" * 400 + "293.JPEG")
    assert short.shape == long.shape
    assert (long[:, -10:] == 255).all()
    pictures = [sheet.Picture(pixels=PLAIN["red"], lines=("y" * 90,))] * 2
    beside = opened(sheet.draw_found(PLAIN["blue"], "", "", pictures))
    text = (beside[sheet.TILE + 100 :] < 128).all(axis=2).any(axis=0)
    assert not text[: sheet.TILE + 30].all()
    assert not text[24 + 2 * sheet.TILE + 17 : 24 + 2 * sheet.TILE + 31].any()  # the gap between two pictures


@pytest.mark.parametrize(("found", "rows"), [(1, 1), (5, 1), (6, 2)])
def test_a_query_has_its_pictures_beside_it(found, rows):
    pictures = [sheet.Picture(pixels=PLAIN["red"], lines=("ash", "cosine 0.900", "0.png"))] * found
    pixels = opened(sheet.draw_found(PLAIN["blue"], "query", "note", pictures))
    assert pixels.shape[:2] == (96 + rows * (168 + 16 + 6 + 3 * 21), 48 + 6 * 168 + 5 * 16)
    assert share(pixels, (250, 0, 0)) == pytest.approx(found * share(pixels, (0, 0, 250)), rel=0.01)


PNG = sheet.draw_found(np.zeros((8, 8, 3), dtype=np.uint8), "title", "", [sheet.Picture(pixels=PLAIN["red"])])


def test_a_sheet_replaces_a_sheet(tmp_path):
    path = tmp_path / "sheet.png"
    for _ in range(2):
        sheet.write(path, PNG, "--out")
    with Image.open(path) as picture, Image.open(io.BytesIO(PNG)) as bare:
        picture.load()
        assert len(picture.info["fkd_ssl"]) == 64
        assert np.array_equal(picture, bare)


def test_a_sheet_in_a_missing_folder(tmp_path):
    with pytest.raises(RequestError, match=r"the folder .*/no was not found; make it, or choose another --out"):
        sheet.check_replaceable(tmp_path / "no/sheet.png", "--out")


@pytest.mark.parametrize("kind", ["foreign", "changed", "folder", "link", "empty"])
def test_a_sheet_replaces_nothing_else(tmp_path, kind):
    path = tmp_path / "sheet.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        sheet.write(path, PNG, "--out")
        path.write_bytes({"foreign": PNG, "changed": path.read_bytes()[:-1], "empty": b""}[kind])
    with pytest.raises(
        RequestError, match=r"sheet\.png: exists and is not an unchanged sheet of fkd-ssl; choose another --out"
    ):
        sheet.write(path, PNG, "--out")
    assert kind != "foreign" or path.read_bytes() == PNG


def test_tokens_have_the_colours_of_their_components_where_they_are():
    """Two groups of tokens get two colours; the crop shows through in grey."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 16))
    grid = np.stack([[one, one, other], [one, other, other]]).astype(np.float32)
    found = sheet.Colours(grid.reshape(-1, 16)).over(np.full((20, 30, 3), 100, dtype=np.uint8), grid).astype(int)
    assert found.shape == (20, 30, 3)
    cells = found.reshape(2, 10, 3, 10, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    first, second = cells[0, 0, 0, 0], cells[0, 0, 2, 0]
    assert abs(first - second)[0] > 100
    expected = [[first, first, second], [first, second, second]]
    np.testing.assert_allclose(cells[:, 0, :, 0], expected, atol=1)
    dark = sheet.Colours(grid.reshape(-1, 16)).over(np.zeros((20, 30, 3), dtype=np.uint8), grid)
    np.testing.assert_allclose(found - dark, 35, atol=1)
