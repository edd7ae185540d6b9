import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as vision

from fkd_ssl import crops, images
from fkd_ssl.errors import FkdError, ImageError, RequestError
from fkd_ssl.eval import features


def flat(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.flatten(1).float()


def test_the_transform_is_resize_and_centre_crop(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i, (height, width) in enumerate([(90, 120), (200, 130), (64, 64), (48, 500), (300, 400)]):
        field = cv2.GaussianBlur(generator.normal(size=(height, width, 3)), (0, 0), min(height, width) / 8)
        Image.fromarray((128 + 50 * field / field.std()).clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
    found = images.scan(tmp_path)
    got, _ = features.extract(flat, found, pixels=32, workers=0, progress=False)
    for i in range(len(found)):
        picture = Image.open(found.file(i))

        def error(short: int, row=got[i], picture=picture) -> float:
            expected = np.asarray(vision.center_crop(vision.resize(picture, short), [32, 32]))
            return float(np.square(row.reshape(3, 32, 32) - expected.transpose(2, 0, 1)).mean())

        assert error(37) < 65  # 30 dB or more means the same view to half a pixel; 37 is round(8/7 x 32)
        assert error(32) > 2 * error(37)
    record = crops.box_record(20, 70, 259, 259)  # 300 x 32 / 37 = 259, in the middle of 300 x 400
    exact = crops.replay(images.read_image(found.file(4)), record, 32)
    np.testing.assert_array_equal(got[4], exact.reshape(-1))


def test_order_labels_and_bytes_do_not_depend_on_batches_or_workers(make_set) -> None:
    found = make_set("train", per_class=3)
    once, labels = features.extract(flat, found, pixels=8, batch_size=64, workers=0, progress=False)
    again, _ = features.extract(flat, found, pixels=8, batch_size=5, workers=2, progress=False)
    assert once.dtype == np.float32
    assert once.shape == (12, 3 * 64)
    np.testing.assert_array_equal(once, again)
    np.testing.assert_array_equal(labels, found.labels)
    one, _ = features.extract(flat, found.subset([7]), pixels=8, workers=0, progress=False)
    np.testing.assert_array_equal(one[0], once[7])


def test_a_training_around_it_is_left_alone(make_set, backbone) -> None:
    backbone.train()
    backbone.body[1].eval()  # a frozen BatchNorm inside a model that trains
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    torch.manual_seed(1)
    state, own = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, _ = features.extract(backbone, make_set("train", per_class=1), pixels=8, workers=0, progress=False)
    second, _ = features.extract(backbone, images.scan(first_root(make_set)), pixels=8, workers=1, progress=False)
    np.testing.assert_allclose(first, second, rtol=1e-5)  # no dropout
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == own).all()  # noqa: NPY002
    assert backbone.training
    assert not backbone.body[1].training
    assert backbone.body[3].training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def first_root(make_set) -> Path:
    return make_set("again", per_class=1).root


def test_modes_come_back_after_an_error(backbone) -> None:
    def fail() -> None:
        with features.frozen(backbone):
            assert not backbone.training
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert backbone.training


def test_progress_goes_to_standard_error(make_set, capfd, monkeypatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    features.extract(flat, make_set("train", per_class=1), pixels=8, workers=0, desc="gallery")
    out, err = capfd.readouterr()
    assert out == ""
    assert "gallery" in err


class Wrong(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0

    def forward(self, pixels: torch.Tensor) -> object:
        self.calls += 1
        good = flat(pixels)
        good[0, 0] = float("nan") if self.kind == "nan" else 0.0
        return {
            "tuple": (good, good),
            "array": good.numpy(),
            "map": pixels.float(),
            "rows": good[:-1],
            "ints": pixels.flatten(1),
            "nan": good,
            "size": good[:, : 10 + self.calls],
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tuple", r"the model returned a tuple of 2: expected one tensor \[B, D\]"),
        ("array", "the model returned a ndarray: expected"),
        ("map", r"returned torch.float32 \[2, 3, 8, 8\] for 2 images: expected one tensor"),
        ("rows", r"returned torch.float32 \[1, 192\] for 2 images"),
        ("ints", r"returned torch.uint8 \[2, 192\] for 2 images"),
        ("nan", "returned NaN or infinity for 1 of 2 images, first 'blue/0.png'"),
        ("size", "returned 11 dimensions, then 12"),
    ],
)
def test_what_is_no_feature_is_named(make_set, kind: str, message: str) -> None:
    with pytest.raises(FkdError, match=message):
        features.extract(Wrong(kind), make_set("x", per_class=1), pixels=8, batch_size=2, workers=0, progress=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_without_a_traceback(make_set, workers: int) -> None:
    found = make_set("train", per_class=1)
    found.file(2).write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"red/0\.png: not a readable image: unknown image format$") as error:
        features.extract(flat, found, pixels=8, workers=workers, progress=False)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_can_be_left_out(
    make_set, workers: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"pixels": 8, "batch_size": 2, "workers": workers}
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    found = make_set("train", per_class=2)
    whole, labels = features.extract(flat, found, **options)
    split = features.extract_split(flat, found, found, **options)
    broken = [0, 2, 3]  # part of a batch, and all of one
    for i in broken:
        found.file(i).write_bytes(b"no picture")
    skipped: set[str] = set()
    capsys.readouterr()
    left, left_labels = features.extract(flat, found, skipped=skipped, **options)
    assert f"features: 100%|██████████| {len(found)}/{len(found)} " in capsys.readouterr().err
    assert skipped == {f"{found.file(i)}: not a readable image: unknown image format" for i in broken}
    assert np.array_equal(left, np.delete(whole, broken, axis=0))
    assert np.array_equal(left_labels, np.delete(labels, broken))
    other = features.extract_split(flat, found, found, skipped=set(), **options)
    assert np.array_equal(other.features, left)
    assert np.array_equal(other.labels, np.delete(split.labels, broken))
    for i in range(len(found)):
        found.file(i).write_bytes(b"no picture")
    with pytest.raises(ImageError, match=rf"none of its {len(found)} images can be read"):
        features.extract(flat, found, skipped=set(), **options)


def test_wrong_numbers_are_refused(make_set) -> None:
    found = make_set("train", per_class=1)
    with pytest.raises(RequestError, match="pixels must be at least 1, got 0"):
        features.extract(flat, found, pixels=0)
    with pytest.raises(RequestError, match="batch_size must be at least 1, got -1"):
        features.extract(flat, found, pixels=8, batch_size=-1)
    with pytest.raises(RequestError, match="workers must not be negative, got -2"):
        features.extract(flat, found, pixels=8, workers=-2)
    with pytest.raises(RequestError, match="no images to evaluate"):
        features.extract(flat, found.subset([]), pixels=8)


def test_classes_are_matched_by_name(make_set) -> None:
    train = make_set("train", per_class=2, classes=("blue", "green", "red"))
    val = make_set("val", per_class=1, classes=("green", "red"))
    np.testing.assert_array_equal(features.match_classes(train, val), [1, 2])
    split = features.extract_split(flat, train, val, pixels=8, workers=0, progress=False)
    assert split.classes == ["blue", "green", "red"]
    np.testing.assert_array_equal(split.train_labels, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(split.labels, [1, 2])
    assert split.features.shape == (2, 192)


def test_a_class_without_a_training_picture_is_named(make_set) -> None:
    train = make_set("train", per_class=2, classes=("blue", "red"))
    val = make_set("val", per_class=1, classes=("blue", "green", "sand"))
    with pytest.raises(RequestError, match=r"val: 2 of its 3 classes have no image in \S+train: 'green', 'sand';"):
        features.match_classes(train, val)
    three = make_set("three", per_class=1, classes=("blue", "green", "red"))
    with pytest.raises(RequestError, match=r"1 of its 3 classes have no image in \S+: 'red'"):
        features.match_classes(three.subset([0, 1]), three)  # the class is listed, but has no image left


def test_one_class_is_refused_and_a_level_too_many_is_named(make_set) -> None:
    """With one class every prediction is correct: 100 % would be reported."""
    inner = make_set("set/imgs", per_class=2)
    outer = images.scan(inner.root.parent)
    assert outer.classes == ["imgs"]
    expected = r"set: one class only, 'imgs'; expected a folder for each of two or more classes: 'imgs' holds only folders; if"
    with pytest.raises(RequestError, match=expected + r" these are the classes, give \S+set/imgs$"):
        features.match_classes(outer, outer)
    with pytest.raises(RequestError, match=r"1 of its 1 classes .*'imgs'.*holds only folders; if these .* give \S+set/imgs$"):
        features.match_classes(inner, outer)
    single = make_set("single", per_class=2, classes=("blue",))
    with pytest.raises(
        RequestError, match=r"single: one class only, 'blue'; expected a folder for each of two or more classes$"
    ):
        features.match_classes(single, single)


def test_pictures_outside_any_class_are_refused(make_set) -> None:
    train = make_set("train", per_class=1)
    stray = train.root / "stray.png"
    stray.write_bytes(train.file(0).read_bytes())
    with pytest.raises(RequestError, match=r"1 of 5 images are outside any class folder \(first 'stray.png'\)"):
        features.match_classes(train, images.scan(train.root))
    with pytest.raises(RequestError, match="no images to evaluate"):
        features.match_classes(train, train.subset([]))


def test_labels_outside_classes_are_kept_for_retrieval(make_set) -> None:
    found = make_set("train", per_class=1)
    found.labels[:] = -1
    _, labels = features.extract(flat, found, pixels=8, workers=0, progress=False)
    assert (labels == -1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_features(make_set, backbone, monkeypatch) -> None:
    """Batches are copied back one behind, so the last one and a smaller one are in their rows too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # TF32 changes features of flat images by up to 3e-4
    images = make_set("set", per_class=5)
    options = {"pixels": 16, "workers": 0, "progress": False, "batch_size": 8, "with_baselines": True}
    here, _ = features.extract_rows(backbone, images, **options)
    moved = copy.deepcopy(backbone).eval().cuda()
    there, rows = features.extract_rows(lambda views: moved(views.cuda(non_blocking=True)), images, **options)
    np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-4)
    assert rows.tolist() == list(range(20))
