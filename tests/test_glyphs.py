import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fkd_ssl import glyphs, images
from fkd_ssl.errors import RequestError
from fkd_ssl.glyphs import CLASSES, glyph_image, make_glyphs

FEW = {"train_per_class": 3, "val_per_class": 2, "progress": False}


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def knn_accuracy(train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray) -> float:
    """kNN-20, cosine, weights exp(similarity / 0.07), as a loop."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    val = val / np.linalg.norm(val, axis=1, keepdims=True)
    right = 0
    for similarities, label in zip(val @ train.T, val_labels, strict=True):
        nearest = np.argsort(-similarities)[:20]
        weights = np.exp(similarities[nearest] / 0.07)
        right += np.bincount(train_labels[nearest], weights=weights).argmax() == label
    return right / len(val)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_glyphs(tmp_path_factory.mktemp("glyphs") / "set", **FEW)


def test_every_split_has_ten_classes_of_the_asked_number_of_rgb_images(few: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        found = images.scan(few / split)
        assert found.classes == sorted(CLASSES)
        assert len(found.classes) == 10
        assert np.bincount(found.labels).tolist() == [count] * 10
        assert all(images.read_image(found.file(i)).shape == (64, 64, 3) for i in range(len(found)))
        with Image.open(found.file(0)) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(few: Path, tmp_path: Path) -> None:
    again = make_glyphs(tmp_path / "again", **FEW)
    other = make_glyphs(tmp_path / "other", seed=1, **FEW)
    assert contents(again) == contents(few)
    assert not set(contents(other).values()) & set(contents(few).values())


def test_no_two_images_are_the_same(few: Path) -> None:
    found = list(contents(few).values())
    assert len(set(found)) == len(found) == 10 * 5 + 1


def test_an_image_does_not_depend_on_how_many_are_made(few: Path, tmp_path: Path) -> None:
    more = contents(make_glyphs(tmp_path / "more", train_per_class=4, val_per_class=2, progress=False))
    assert {name: more[name] for name in contents(few) if name.endswith(".jpg")} == {
        name: digest for name, digest in contents(few).items() if name.endswith(".jpg")
    }


def test_every_glyph_has_ink_of_its_own_in_every_font() -> None:
    for font in glyphs.FONTS:
        stamps = {np.asarray(glyphs._stamp(glyph, font, 32)).tobytes() for glyph in CLASSES.values()}
        missing = np.asarray(glyphs._stamp("\U0010fffd", font, 32)).tobytes()  # the font's symbol for a missing glyph
        assert len(stamps - {missing}) == len(CLASSES)


def test_pixels_sets_the_side() -> None:
    assert glyph_image("moon", "val", 0, pixels=48).shape == (48, 48, 3)


def test_a_complete_set_is_kept(few: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in few.rglob("*")}
    assert make_glyphs(few, **FEW) == few
    assert {path: path.stat().st_mtime_ns for path in few.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    make_glyphs(tmp_path / "set", **FEW)
    assert (tmp_path / "set" / "train" / "moon" / "00002.jpg").is_file()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"has no glyphs\.json"):
        make_glyphs(tmp_path, **FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(RequestError, match="has no"):
        make_glyphs(tmp_path / "set", **FEW)


def test_a_set_of_other_parameters_is_refused(few: Path) -> None:
    with pytest.raises(RequestError, match=r"'seed': 0.*expected.*'seed': 5"):
        make_glyphs(few, seed=5, **FEW)


@pytest.mark.parametrize("damage", ["alter", "add", "delete"])
def test_an_altered_set_is_refused(damage: str, tmp_path: Path) -> None:
    out = make_glyphs(tmp_path / "set", train_per_class=1, val_per_class=1, progress=False)
    picture = out / "train" / "moon" / "00000.jpg"
    if damage == "alter":
        picture.write_bytes(picture.read_bytes()[:-1])
    elif damage == "add":
        picture.with_name("00009.jpg").write_bytes(picture.read_bytes())
    else:
        picture.unlink()
    with pytest.raises(RequestError, match="changed, added or deleted"):
        make_glyphs(out, train_per_class=1, val_per_class=1, progress=False)


def test_an_altered_manifest_is_refused(tmp_path: Path) -> None:
    out = make_glyphs(tmp_path / "set", train_per_class=1, val_per_class=1, progress=False)
    manifest = out / "glyphs.json"
    manifest.write_text(manifest.read_text().replace('"seed":0', '"seed":1'))
    with pytest.raises(RequestError, match=r"glyphs\.json: altered.*choose another folder"):
        make_glyphs(out, train_per_class=1, val_per_class=1, progress=False)


def test_a_run_that_is_stopped_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(name: str, split: str, index: int, **options: int) -> np.ndarray:
        if split == "val":
            raise KeyboardInterrupt
        return np.zeros((64, 64, 3), dtype=np.uint8)

    with monkeypatch.context() as patched:
        patched.setattr(glyphs, "glyph_image", stop)
        with pytest.raises(KeyboardInterrupt):
            make_glyphs(tmp_path / "set", **FEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_per_class": 0}, "train_per_class 0"),
        ({"val_per_class": 100000}, "val_per_class 100000"),
        ({"pixels": 8}, "pixels 8"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_parameters_out_of_range_are_refused(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        make_glyphs(tmp_path / "set", **{**FEW, **options})


def test_the_bar_is_on_standard_error_or_absent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    make_glyphs(tmp_path / "a", train_per_class=1, val_per_class=1)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "glyphs" in shown.err
    make_glyphs(tmp_path / "b", train_per_class=1, val_per_class=1, progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_pixels_and_colours_are_weak_features() -> None:
    train, val = (
        np.stack([glyph_image(name, split, i) for name in CLASSES for i in range(count)])
        for split, count in (("train", 80), ("val", 20))
    )
    train_labels, val_labels = np.repeat(np.arange(10), 80), np.repeat(np.arange(10), 20)

    def small(pictures: np.ndarray) -> np.ndarray:
        return pictures.reshape(len(pictures), 8, 8, 8, 8, 3).mean((2, 4))

    def flat(pictures: np.ndarray) -> np.ndarray:
        return pictures.reshape(len(pictures), -1).astype(np.float64)

    def centred(pictures: np.ndarray) -> np.ndarray:
        return flat(pictures) - flat(pictures).mean(1, keepdims=True)

    def colours(pictures: np.ndarray) -> np.ndarray:
        bins = (pictures >> 5).astype(np.int64) @ np.array([64, 8, 1])
        return np.stack([np.bincount(picture.ravel(), minlength=512) for picture in bins]).astype(np.float64)

    features = {
        "8 x 8": lambda pictures: flat(small(pictures)),
        "8 x 8 centred": lambda pictures: centred(small(pictures)),
        "64 x 64": flat,
        "64 x 64 centred": centred,
        "colours": colours,
    }
    scores = {name: knn_accuracy(f(train), train_labels, f(val), val_labels) for name, f in features.items()}
    assert max(scores.values()) < 0.45, scores


def test_the_bundled_photographs_are_those_of_scikit_learn() -> None:
    """The demo's figures were measured on them; only tests and benchmarks need scikit-learn for this."""
    from sklearn.datasets import load_sample_image

    for found, name in zip(glyphs._photos(), glyphs.PHOTOS, strict=True):
        np.testing.assert_array_equal(found, load_sample_image(name))
