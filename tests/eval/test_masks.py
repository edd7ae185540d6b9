import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fkd_ssl.errors import ImageError, RequestError
from fkd_ssl.eval import masks
from fkd_ssl.images import open_images
from fkd_ssl.images.decoding import decode_mask


@pytest.fixture
def folder(shapes: Path, tmp_path: Path) -> Path:
    """A copy of `val` that a test may change."""
    return Path(shutil.copytree(shapes / "val", tmp_path / "val"))


def opened(folder: Path) -> masks.Masked:
    return masks.open_masked(open_images(folder / "images"), open_images(folder / "masks"))


def test_masks_are_paired_by_name_and_counted(folder: Path) -> None:
    for name in ("images", "masks"):
        (folder / name / "city").mkdir()
        shutil.move(folder / name / "0.png", folder / name / "city/b.png")
    Image.open(folder / "images/1.png").save(folder / "images/1.jpg")
    (folder / "images/1.png").unlink()
    found = opened(folder)
    lookup = masks.lookup_of([(0, "a"), (1, "b"), (2, "c"), (3, "d")])
    for row, name in enumerate(found.images.names):
        truth = np.asarray(Image.open(folder / "masks" / Path(name).with_suffix(".png")))
        assert np.array_equal(found.labels(row, lookup), truth)
        assert found.pixels[row].tolist() == [int((truth == label).sum()) for label in range(256)]
        assert found.sizes[row] == (60, 80)


def test_a_palette_gives_its_indices_and_grey_its_levels(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4, (9, 7), dtype=np.uint8)
    for bits in (8, 2):
        picture = Image.fromarray(values, mode="P")
        picture.putpalette([9, 9, 9, 200, 0, 0, 9, 9, 9, 0, 0, 255])  # two labels of one colour
        picture.save(tmp_path / "a.png", bits=bits)
        assert np.array_equal(decode_mask((tmp_path / "a.png").read_bytes(), "a"), values)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(decode_mask((tmp_path / "a.png").read_bytes(), "a"), values)


def test_labels_are_looked_up(folder: Path) -> None:
    """The ignored label is no class, and the labels after it move up."""
    found = opened(folder)
    classes = masks.classes_of(found, found, 255, 1)
    assert [label for label, _ in classes] == [0, *range(2, 255)]
    truth = np.asarray(Image.open(folder / "masks/0.png"))
    expected = np.where(truth == 0, 0, np.where((truth == 1) | (truth == 255), 255, truth.astype(int) - 1))
    assert np.array_equal(found.labels(0, masks.lookup_of(classes)), expected)


def test_classes_and_their_names(shapes: Path, folder: Path) -> None:
    train = opened(shapes / "train")
    assert masks.classes_of(train, train, None, 255) == [(0, "0"), (1, "1"), (2, "2"), (3, "3")]
    named = masks.classes_of(train, train, ["floor", "box", "ball", "bar", "never"], 255)
    assert named[-1] == (4, "never")
    with pytest.raises(
        RequestError, match=r"masks/0.png: has label 3, but there are 3 classes, 0 to 2; give the number with --cl"
    ):
        masks.classes_of(train, train, 3, 255)
    with pytest.raises(RequestError, match=r"has label 3, but there are 3 classes, 0 to 2; name them all with --classes"):
        masks.classes_of(train, train, ["floor", "box", "ball"], 255)
    for names, said in (
        (["floor", "", "ball", "bar"], "'' is empty"),
        (["floor", "box", "box", "bar"], "'box' is empty or given twice"),
        ([str(label) for label in range(256)], "256 names; expected between 2 and 255"),
    ):
        with pytest.raises(RequestError, match=said):
            masks.classes_of(train, train, names, 255)
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) * np.uint8(3)).save(path)
    with pytest.raises(
        RequestError, match=r"has label 6, but there are 4 classes, 0 to 3 \(as in the training masks\).*--ignore 6"
    ):
        masks.classes_of(train, opened(folder), None, 255)


def save(folder: Path, name: str, pixels: object, mode: str | None = None) -> None:
    Image.fromarray(np.asarray(pixels), mode).save(folder / name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "masks/2.png").unlink(), r"images: 1 of 6 images have no mask in .*/masks, first '2.png'"),
        (lambda f: (f / "images/2.png").unlink(), r"masks: 1 of 6 masks have no image in .*/images, first '2.png'"),
        (lambda f: shutil.copy(f / "images/1.png", f / "images/1.jpg"), r"'1.jpg' and '1.png' differ only in the extension"),
        (
            lambda f: save(f, "masks/2.png", np.zeros((60, 81), np.uint8)),
            r"masks/2.png: a mask of 81 x 60 px for an image of 80 x 60 px; masks are not resized",
        ),
        (lambda f: save(f, "masks/2.png", np.zeros((60, 80, 3), np.uint8)), r"2.png: expected a mask: a PNG with one byte per"),
        (lambda f: save(f, "masks/2.png", np.zeros((60, 80), np.uint16)), r"2.png: expected a mask: a PNG with one byte per"),
        (lambda f: save(f, "masks/2.png", np.zeros((60, 80), bool)), r"2.png: expected a mask: a PNG with one byte per pixel"),
    ],
)
def test_wrong_masks_are_refused(folder: Path, spoil: object, message: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(RequestError, match=message):
        opened(folder)


def test_a_jpeg_is_no_mask_and_a_damaged_mask_is_named(folder: Path) -> None:
    whole = (folder / "masks/2.png").read_bytes()
    (folder / "masks/2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=re.escape("masks/2.png: not a readable image")):
        opened(folder)
    (folder / "masks/2.png").unlink()
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(folder / "masks/2.jpg")
    with pytest.raises(RequestError, match=r"2.jpg: expected a mask"):
        opened(folder)


def test_one_class_is_refused(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.full((60, 80), 7, np.uint8)).save(path)
    with pytest.raises(RequestError, match=r"its masks have 1 labels apart from ignored ones; expected two or more"):
        masks.classes_of(opened(folder), opened(folder), None, 255)
