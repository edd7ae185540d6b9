"""A smaller copy of an image set: sizes, formats, fidelity, existing files, unreadable images."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fkd_ssl.errors import FkdError, ImageError, RequestError
from fkd_ssl.images import open_images, read_image, scan
from fkd_ssl.images.shrinking import encode, shrink, shrink_set


@pytest.fixture
def own_folder(image_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(image_folder, tmp_path / "own"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("height", "width", "found"), [(375, 500, (128, 171)), (500, 333, (192, 128)), (129, 129, (128, 128)), (90, 400, (90, 400))]
)
def test_the_short_side_is_what_was_asked_for(smooth, height, width, found):
    small = shrink(smooth(0, height, width), 128)
    assert small.shape == (*found, 3)
    assert small.dtype == np.uint8


def test_shrinking_takes_means_of_areas(smooth):
    image = smooth(0, 96, 120)
    expected = image.reshape(32, 3, 40, 3, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(shrink(image, 32) - expected).max() <= 0.51


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "bmp", "webp", "ppm", "pgm", "tif", "tiff"])
def test_every_format_comes_back_as_itself(smooth, tmp_path, suffix):
    image = smooth(0, 60, 80)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encode(image, path.name, 95))
    with Image.open(path) as picture:
        assert picture.format in {"JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF"}
        assert picture.format[:2] == Image.registered_extensions()[path.suffix.lower()][:2]
    assert np.abs(read_image(path).astype(int) - image).mean() < 2


def test_names_without_a_suffix_are_rejected_before_anything_is_written(smooth, tmp_path):
    """Rows of a table without a column of names are named FILE/ROW."""
    shard = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [encode(smooth(0, 60, 80), "a.png", 95)]}), shard)
    with pytest.raises(RequestError, match=r"1 names have no suffix of an image format.*\n  'a/00000000'"):
        shrink_set(open_images(shard), tmp_path / "copy", short_side=32)
    assert not (tmp_path / "copy").exists()


def test_a_copy_has_the_same_paths_and_smaller_pictures(image_folder, tmp_path):
    images, said = scan(image_folder), []
    done = shrink_set(images, tmp_path / "copy", short_side=40, log=said.append)
    copy = scan(tmp_path / "copy")
    assert (copy.names, copy.classes, copy.labels.tolist()) == (images.names, images.classes, images.labels.tolist())
    assert (done.written, done.unreadable) == (24, [])
    assert done.bytes == sum(map(len, bytes_of(tmp_path / "copy").values()))
    assert done.source_bytes == sum(map(len, bytes_of(image_folder).values()))
    assert "24 images, about" in said[0]
    for i in range(24):
        expected = shrink(read_image(images.file(i)), 40)
        found = read_image(copy.file(i))
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 2.5


def test_small_pictures_are_copied_byte_for_byte(image_folder, tmp_path):
    shrink_set(scan(image_folder), tmp_path / "copy", short_side=500)
    assert bytes_of(tmp_path / "copy") == bytes_of(image_folder)


def test_what_is_there_is_kept_and_the_rest_is_made(image_folder, tmp_path):
    copy = tmp_path / "copy"
    shrink_set(scan(image_folder), copy, short_side=40)
    before = bytes_of(copy)
    (copy / "ash/003.jpg").unlink()
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*.jpg")}
    assert shrink_set(scan(image_folder), copy, short_side=40).written == 1
    assert bytes_of(copy) == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.parametrize("content", [b"", b"a letter", None])
def test_a_file_that_is_no_copy_is_neither_kept_nor_overwritten(image_folder, tmp_path, smooth, content):
    copy = tmp_path / "copy"
    shrink_set(scan(image_folder), copy, short_side=40)
    content = encode(smooth(0, 33, 44), "a.jpg", 90) if content is None else content
    (copy / "ash/003.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=r"copy/ash/003\.jpg: exists and is not a copy of .*ash/003\.jpg at this size"):
        shrink_set(scan(image_folder), copy, short_side=40)
    assert (copy / "ash/003.jpg").read_bytes() == content


def test_an_unreadable_picture_stops_or_is_left_out(own_folder, tmp_path):
    (own_folder / "birch/002.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(ImageError, match=r"birch/002\.jpg: not a readable image.*--on_unreadable skip"):
        shrink_set(scan(own_folder), tmp_path / "copy", short_side=40)
    done = shrink_set(scan(own_folder), tmp_path / "copy", short_side=40, skip_unreadable=True)
    assert done.unreadable == ["birch/002.jpg"]
    assert len(scan(tmp_path / "copy")) == 23


@pytest.mark.parametrize("where", [".", "small", ".."])
def test_a_copy_within_the_images_is_refused(own_folder, where):
    with pytest.raises(RequestError, match=r"choose an --out outside the folder of images"):
        shrink_set(scan(own_folder), own_folder / where, short_side=40)


@pytest.mark.parametrize("wrong", [{"short_side": 7}, {"short_side": 4097}, {"quality": 0}, {"quality": 101}, {"threads": 0}])
def test_impossible_settings_are_refused(image_folder, tmp_path, wrong):
    with pytest.raises(RequestError, match="expected 0 or 8 to 4096, 1 to 100, at least 1"):
        shrink_set(scan(image_folder), tmp_path / "copy", **{"short_side": 40, **wrong})
    assert not (tmp_path / "copy").exists()


def test_a_full_disk_is_said_before_anything_is_written(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**6, 10**6, 100))  # type: ignore[attr-defined]
    with pytest.raises(FkdError, match=r"needs about .* more and the disk has .* free: free some"):
        shrink_set(scan(image_folder), tmp_path / "copy", short_side=40)
    assert not (tmp_path / "copy").exists()
