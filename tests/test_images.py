import os
import shutil
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fkd_ssl import images
from fkd_ssl.errors import ImageAccessError, ImageError, RequestError
from fkd_ssl.images import source

COLOUR = (200, 80, 40)


def picture(height: int = 24, width: int = 32) -> np.ndarray:
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:] = COLOUR
    return pixels


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.fromarray(picture())).save(path, **options)
    return path


def assert_near(pixels: np.ndarray, colour: tuple[int, int, int], tolerance: int) -> None:
    assert np.abs(pixels.reshape(-1, 3).astype(int) - np.array(colour)).max() <= tolerance


# reading


def test_jpeg_matches_pillow_and_its_size_is_width_and_height(image_folder):
    file = image_folder / "ash" / "000.jpg"
    pixels = images.read_image(file)
    with Image.open(file) as reference:
        assert images.read_size(file) == reference.size == (pixels.shape[1], pixels.shape[0])
        assert np.abs(pixels.astype(int) - np.asarray(reference).astype(int)).max() <= 2
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("suffix", ["jpg", "jfif", "png", "bmp", "webp", "avif", "gif", "jp2", "tga", "tif", "ppm"])
def test_formats(tmp_path, suffix):
    tolerance = {"jpg": 3, "jfif": 3, "webp": 6, "avif": 6}.get(suffix, 0)
    pixels = images.read_image(save(tmp_path / f"a.{suffix}"))
    assert pixels.shape == (24, 32, 3)
    assert_near(pixels, COLOUR, tolerance)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_greyscale_becomes_three_equal_channels(tmp_path, suffix):
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 16, axis=0)
    pixels = images.read_image(save(tmp_path / f"grey.{suffix}", Image.fromarray(ramp)))
    assert pixels.shape == (16, 64, 3)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 1] == pixels[..., 2]).all()
    assert np.abs(pixels[..., 0].astype(int) - ramp).max() <= 3


def test_cmyk_jpeg(tmp_path):
    file = save(tmp_path / "cmyk.jpg", Image.fromarray(picture()).convert("CMYK"), quality=95)
    with Image.open(file) as opened:
        assert opened.mode == "CMYK"
    assert_near(images.read_image(file), COLOUR, 4)


def test_alpha_is_dropped(tmp_path):
    rgba = np.dstack([picture(), np.tile(np.arange(32, dtype=np.uint8), (24, 1))])
    np.testing.assert_array_equal(images.read_image(save(tmp_path / "alpha.png", Image.fromarray(rgba))), picture())


def test_palette(tmp_path):
    pixels = picture()
    pixels[:10] = (0, 0, 255)
    quantised = Image.fromarray(pixels).quantize(4)
    assert quantised.mode == "P"
    np.testing.assert_array_equal(images.read_image(save(tmp_path / "palette.png", quantised)), pixels)


def test_sixteen_bits_lose_the_low_byte(tmp_path):
    deep = np.array([[0, 255, 256, 511], [32768, 40000, 65279, 65535]], dtype=np.uint16)
    file = save(tmp_path / "deep.png", Image.fromarray(deep))
    pixels = images.read_image(file)
    np.testing.assert_array_equal(pixels[..., 0], [[0, 0, 1, 1], [128, 156, 254, 255]])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])
    assert images.read_size(file) == (4, 2)


@pytest.mark.parametrize(
    ("suffix", "values", "expected"),
    [
        ("tif", np.array([[0, 1, 128, 255]], dtype=np.int32), [0, 1, 128, 255]),
        ("tif", np.array([[0, 255, 256, 65535]], dtype=np.int32), [0, 0, 1, 255]),
        ("pgm", np.array([[0, 100, 256, 65535]], dtype=np.uint16), [0, 0, 1, 255]),
        ("pgm", np.array([[0, 0, 100, 255]], dtype=np.uint16), [0, 0, 0, 0]),  # the file states a range of 16 bits
        ("tif", np.array([[0, 100, 256, 65535]], dtype=np.uint16), [0, 0, 1, 255]),
        ("tif", np.array([[0, 0.25, 0.5, 1]], dtype=np.float32), [0, 64, 128, 255]),
        ("tif", np.array([[0, 1, 100.4, 255]], dtype=np.float32), [0, 1, 100, 255]),
    ],
)
def test_greyscale_of_more_bits_keeps_its_range(tmp_path, suffix, values, expected):
    pixels = images.read_image(save(tmp_path / f"deep.{suffix}", Image.fromarray(values)))
    np.testing.assert_array_equal(pixels[0], np.repeat(np.array(expected)[:, None], 3, axis=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 70000]], dtype=np.int32), "integers from 0 to 70000; expected 0 to 255 or 0 to 65535"),
        (np.array([[-1, 7]], dtype=np.int32), "integers from -1 to 7"),
        (np.array([[0, 300]], dtype=np.float32), "float values from 0 to 300; expected 0 to 1 or 0 to 255"),
        (np.array([[0, np.nan]], dtype=np.float32), "float values from nan to nan"),
        (np.array([[0, np.inf]], dtype=np.float32), "float values from 0 to inf"),
    ],
)
def test_values_of_no_known_range_are_refused(tmp_path, values, message):
    with pytest.raises(ImageError, match=rf"deep\.tif: not a readable image: {message}"):
        images.read_image(save(tmp_path / "deep.tif", Image.fromarray(values)))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_tiff_is_ignored_though_pillow_applies_it(tmp_path, compression, orientation, smooth):
    pixels = smooth(0, 24, 32)
    turned = save(tmp_path / "turned.tif", Image.fromarray(pixels), tiffinfo={0x0112: orientation}, compression=compression)
    assert images.read_size(turned) == (32, 24)
    np.testing.assert_array_equal(images.read_image(turned), pixels)


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path / "turned.jpg", exif=exif)
    plain = save(tmp_path / "plain.jpg")
    with Image.open(turned) as opened:
        assert opened.getexif()[0x0112] == 6
    assert images.read_size(turned) == (32, 24)
    np.testing.assert_array_equal(images.read_image(turned), images.read_image(plain))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3000), (3000, 2)])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_extreme_sizes(tmp_path, height, width, suffix):
    file = save(tmp_path / f"odd.{suffix}", Image.fromarray(picture(height, width)))
    assert images.read_size(file) == (width, height)
    assert images.read_image(file).shape == (height, width, 3)


def test_side_over_uint16_is_refused(tmp_path):
    file = save(tmp_path / "long.png", Image.fromarray(picture(1, 65536)))
    with pytest.raises(ImageError, match=r"long\.png: 65536 x 1 pixels; the maximum is 65535 per side"):
        images.read_size(file)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file_is_refused(tmp_path, image_folder, suffix, share):
    with Image.open(image_folder / "ash" / "001.jpg") as source:
        whole = save(tmp_path / f"whole.{suffix}", source.copy()).read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=rf"cut\.{suffix}: not a readable image: \w+"):
        images.read_image(cut)


@pytest.mark.parametrize(
    ("content", "what"), [(b"", "empty"), (b"these are words, not pixels\n", "text"), (b"\xff\xd8\xff", "start")]
)
def test_no_picture_is_refused_by_both_readers(tmp_path, content, what):
    file = tmp_path / f"{what}.jpg"
    file.write_bytes(content)
    for read in (images.read_size, images.read_image):
        with pytest.raises(ImageError, match=rf"{what}\.jpg: not a readable image: \w+"):
            read(file)


def test_missing_file_is_named(tmp_path):
    for read in (images.read_size, images.read_bytes, images.read_image):
        with pytest.raises(ImageAccessError, match=r"gone\.jpg: .*No such file"):
            read(tmp_path / "gone.jpg")


def test_a_failing_disk_is_not_a_damaged_image(tmp_path):
    """An image that may be intact must not count as damaged: /proc/self/mem gives a real EIO."""
    (tmp_path / "failing.jpg").symlink_to("/proc/self/mem")
    for read in (images.read_size, images.read_bytes, images.read_image):
        with pytest.raises(ImageAccessError, match=r"failing\.jpg: cannot be read: Input/output error"):
            read(tmp_path / "failing.jpg")


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for read in (images.read_size, images.read_bytes, images.read_image):
        with pytest.raises(ImageAccessError, match=r"pipe\.jpg: not a regular file"):
            read(tmp_path / "pipe.jpg")


def test_error_message_is_one_line_without_source_positions(tmp_path):
    file = tmp_path / "cut.jpg"
    file.write_bytes(save(tmp_path / "a.jpg").read_bytes()[:200])
    with pytest.raises(ImageError) as caught:
        images.read_image(file)
    assert "\n" not in str(caught.value)
    assert ".cpp" not in str(caught.value)


# listing


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_scan_sorts_and_labels_by_first_folder(tmp_path):
    root = touch(tmp_path / "set", "zebra/1.jpg", "ant/deep/er/2.PNG", "ant/10.jpeg", "ant/9.jpeg", "top.jpg", "ant/readme.txt")
    found = images.scan(root)
    assert found.names == ["ant/10.jpeg", "ant/9.jpeg", "ant/deep/er/2.PNG", "top.jpg", "zebra/1.jpg"]
    assert found.classes == ["ant", "zebra"]
    np.testing.assert_array_equal(found.labels, [0, 0, 0, -1, 1])
    assert found.labels.dtype == np.int64
    assert len(found) == 5
    assert found.file(4) == root / "zebra/1.jpg"


def test_scan_does_not_depend_on_how_the_folder_is_spelled(tmp_path, monkeypatch):
    root = touch(tmp_path / "set", "a/1.jpg", "b/2.jpg")
    monkeypatch.chdir(tmp_path)
    expected = images.scan(root).names
    for spelling in ("set", "./set", "set/", f"{root}/", f"{root}/../set", root):
        found = images.scan(spelling)
        assert found.names == expected
        assert all(found.file(k).is_file() for k in range(2))
    monkeypatch.chdir(root)
    assert images.scan(".").names == expected
    with pytest.raises(RequestError, match="the name of the folder is empty"):
        images.scan("")


def test_classes_are_folders_with_pictures_only(tmp_path):
    root = touch(tmp_path, "full/1.jpg", "other/notes.txt")
    (root / "empty").mkdir()
    assert images.scan(root).classes == ["full"]


def test_hidden_files_and_folders_are_skipped(tmp_path):
    root = touch(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.hidden.jpg", ".cache/2.jpg")
    assert images.scan(root).names == ["a/1.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = touch(tmp_path / "set", "a/1.jpg")
    outside = touch(tmp_path / "outside", "2.jpg")
    (root / "linked").symlink_to(outside)
    (root / "a" / "loop").symlink_to(root)
    assert images.scan(root).names == ["a/1.jpg", "linked/2.jpg"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    (touch(tmp_path, "a/1.jpg") / "self").symlink_to(tmp_path / "self")
    with pytest.raises(RequestError, match="self: cannot be listed: Too many levels"):
        images.scan(tmp_path)


def test_no_folder_is_refused(tmp_path):
    file = touch(tmp_path, "a.jpg") / "a.jpg"
    for root in (tmp_path / "nowhere", file):
        with pytest.raises(RequestError, match=rf"{root.name}: no such folder of images"):
            images.scan(root)


def test_folder_without_images_is_refused(tmp_path):
    touch(tmp_path, "a/notes.txt")
    with pytest.raises(RequestError, match=r"no images in this folder \(looked for \.avif, \.bmp"):
        images.scan(tmp_path)


def test_names_are_listed_in_nfc_and_opened_as_they_are(tmp_path):
    decomposed = unicodedata.normalize("NFD", "café")
    root = touch(tmp_path, f"{decomposed}/é.jpg")
    found = images.scan(root)
    assert found.names == [unicodedata.normalize("NFC", "café/é.jpg")]
    assert found.file(0).is_file()


def test_two_spellings_of_one_name_are_refused(tmp_path):
    root = touch(tmp_path, "a/é.jpg", "a/" + unicodedata.normalize("NFD", "é") + ".jpg")
    if len(list((root / "a").iterdir())) == 1:
        pytest.skip("this file system normalises names")
    with pytest.raises(RequestError, match="2 names are the same in Unicode's NFC form as another one; rename them"):
        images.scan(root)


LATIN = b"latin-\xe9.jpg".decode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    "name", ["line\nbreak.jpg", "bell\a.jpg", "next\x85.jpg", "line\u2028.jpg", "paragraph\u2029.jpg", LATIN]
)
def test_names_that_a_line_cannot_hold_are_refused(tmp_path, name):
    with pytest.raises(RequestError) as caught:
        images.scan(touch(tmp_path, name))
    assert "1 names have control characters, line separators or bytes that are not UTF-8; rename them" in str(caught.value)
    assert repr(name) in str(caught.value)


def test_all_wrong_names_are_counted_and_the_first_ten_listed(tmp_path):
    with pytest.raises(RequestError, match="12 names have control") as caught:
        images.scan(touch(tmp_path, *(f"bell{k:02d}\a.jpg" for k in range(12)), "good.jpg"))
    assert str(caught.value).count("bell") == 10
    assert str(caught.value).endswith("and 2 more")


@pytest.mark.parametrize("name", ["Screenshot at 9.41\u202fAM.jpg", "no\u00a0break.jpg", "zero\u200bwidth.jpg", "\ue000.jpg"])
def test_other_spaces_and_formatting_characters_are_names_like_any(tmp_path, name):
    assert images.scan(touch(tmp_path, name)).names == [name]


def test_files_with_other_suffixes_are_counted(tmp_path):
    names = ["a.avif", "b.GIF", "c.jfif", "x/d.heic", "x/e.HEIC", "notes.txt", "LICENCE", ".hidden.heic"]
    found = images.scan(touch(tmp_path, *names))
    assert found.names == ["a.avif", "b.GIF", "c.jfif"]
    assert found.notes == [f"{tmp_path}: 4 files are not images by their names: 2 .heic, 1 .txt, 1 without a suffix"]
    with pytest.raises(RequestError, match=r"it holds 2 \.heic"):
        images.scan(tmp_path / "x")


def test_a_format_that_this_pillow_lacks_stops_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda feature: feature != "avif")
    with pytest.raises(RequestError, match=r"this Pillow was built without \.avif"):
        images.scan(touch(tmp_path, "a.avif", "b.webp"))


def test_subset_keeps_classes_and_order(image_folder):
    found = images.scan(image_folder)
    part = found.subset([20, 3])
    assert part.names == [found.names[20], found.names[3]]
    np.testing.assert_array_equal(part.labels, found.labels[[20, 3]])
    assert part.classes == found.classes
    assert (part.where(1), part.read(1), part.size(1)) == (found.where(3), found.read(3), found.size(3))
    assert part.subset([1]).read(0) == found.read(3)


class TestDigest:
    """`digest` reads every image once, and again only if a file may have changed."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(source, "_SETTLED", -60)  # treats new files as settled
        for k in range(3):
            save(tmp_path / "set" / "ash" / f"{k}.bmp", Image.fromarray(np.full((8, 8, 3), k, dtype=np.uint8)))
        return tmp_path / "set"

    def test_it_is_kept_while_no_file_changes(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = images.scan(folder).digest()
        monkeypatch.setattr(images.Folder, "read", lambda self, index: pytest.fail("an image was read again"))
        assert images.scan(folder).digest() == first

    def test_another_content_of_the_same_size_and_time_is_noticed(self, folder: Path) -> None:
        first = images.scan(folder).digest()
        path = folder / "ash" / "1.bmp"
        before = path.stat()
        time.sleep(0.05)  # change times advance in ticks
        save(path, Image.fromarray(np.full((8, 8, 3), 9, dtype=np.uint8)))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
        assert images.scan(folder).digest() != first

    def test_a_copy_has_the_same_one(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "copy")
        assert images.scan(tmp_path / "copy").digest() == images.scan(folder).digest()

    def test_files_that_changed_just_now_are_read_each_time(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source, "_SETTLED", 3600)
        images.scan(folder).digest()
        assert not (tmp_path / "cache").exists()

    def test_a_damaged_entry_is_ignored(self, folder: Path, tmp_path: Path) -> None:
        first = images.scan(folder).digest()
        (kept,) = (tmp_path / "cache" / "digests").iterdir()
        kept.write_text("not a digest")
        assert images.scan(folder).digest() == first
