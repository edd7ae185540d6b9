import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fkd_ssl import images
from fkd_ssl.errors import ImageError, RequestError

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


@pytest.mark.parametrize(("suffix", "tolerance"), [("jpg", 3), ("png", 0), ("bmp", 0), ("webp", 6), ("tif", 0), ("ppm", 0)])
def test_formats(tmp_path, suffix, tolerance):
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
    with pytest.raises(ImageError, match=r"long\.png: 65536 x 1 pixels; a side may have 65535 at most"):
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
        with pytest.raises(ImageError, match=r"gone\.jpg: .*No such file"):
            read(tmp_path / "gone.jpg")


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
    assert found.paths == ["ant/10.jpeg", "ant/9.jpeg", "ant/deep/er/2.PNG", "top.jpg", "zebra/1.jpg"]
    assert found.classes == ["ant", "zebra"]
    np.testing.assert_array_equal(found.labels, [0, 0, 0, -1, 1])
    assert found.labels.dtype == np.int64
    assert len(found) == 5
    assert found.file(4) == root / "zebra/1.jpg"


def test_scan_does_not_depend_on_how_the_folder_is_spelled(tmp_path, monkeypatch):
    root = touch(tmp_path / "set", "a/1.jpg", "b/2.jpg")
    monkeypatch.chdir(tmp_path)
    expected = images.scan(root).paths
    for spelling in ("set", "./set", "set/", f"{root}/", f"{root}/../set", root):
        found = images.scan(spelling)
        assert found.paths == expected
        assert all(found.file(k).is_file() for k in range(2))
    monkeypatch.chdir(root)
    assert images.scan(".").paths == expected
    with pytest.raises(RequestError, match="an empty name"):
        images.scan("")


def test_classes_are_folders_with_pictures_only(tmp_path):
    root = touch(tmp_path, "full/1.jpg", "other/notes.txt")
    (root / "empty").mkdir()
    assert images.scan(root).classes == ["full"]


def test_hidden_files_and_folders_are_skipped(tmp_path):
    root = touch(tmp_path, "a/1.jpg", "a/._1.jpg", "a/.hidden.jpg", ".cache/2.jpg")
    assert images.scan(root).paths == ["a/1.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = touch(tmp_path / "set", "a/1.jpg")
    outside = touch(tmp_path / "outside", "2.jpg")
    (root / "linked").symlink_to(outside)
    (root / "a" / "loop").symlink_to(root)
    assert images.scan(root).paths == ["a/1.jpg", "linked/2.jpg"]


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
    with pytest.raises(RequestError, match=r"no images in this folder \(looked for \.bmp"):
        images.scan(tmp_path)


def test_names_are_listed_in_nfc_and_opened_as_they_are(tmp_path):
    decomposed = unicodedata.normalize("NFD", "café")
    root = touch(tmp_path, f"{decomposed}/é.jpg")
    found = images.scan(root)
    assert found.paths == [unicodedata.normalize("NFC", "café/é.jpg")]
    assert found.file(0).is_file()


def test_two_spellings_of_one_name_are_refused(tmp_path):
    root = touch(tmp_path, "a/é.jpg", "a/" + unicodedata.normalize("NFD", "é") + ".jpg")
    if len(list((root / "a").iterdir())) == 1:
        pytest.skip("this file system normalises names")
    with pytest.raises(RequestError, match="are one name in Unicode's NFC form; rename one"):
        images.scan(root)


@pytest.mark.parametrize("name", ["line\nbreak.jpg", "bell\a.jpg", b"latin-\xe9.jpg".decode("utf-8", "surrogateescape")])
def test_names_that_no_text_file_holds_are_refused(tmp_path, name):
    with pytest.raises(RequestError, match="has characters that cannot be listed; rename it"):
        images.scan(touch(tmp_path, name))


def test_subset_keeps_classes_and_order(image_folder):
    found = images.scan(image_folder)
    part = found.subset([20, 3])
    assert part.paths == [found.paths[20], found.paths[3]]
    np.testing.assert_array_equal(part.labels, found.labels[[20, 3]])
    assert part.classes == found.classes
    assert part.file(1) == found.file(3)
