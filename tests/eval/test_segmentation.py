"""Linear and nearest-neighbour segmentation against definitions by hand, on shapes that have the colour of their class."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from fkd_ssl.errors import FkdError, ImageError, RequestError
from fkd_ssl.eval import grids, iou, maps, masks, segmentation
from fkd_ssl.images import open_images

CLASSES = [(label, str(label)) for label in range(4)]


class Network(nn.Module):
    """Mixed colours on a grid of stride 4."""

    def __init__(self, channels: int = 12, stride: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Conv2d(3, channels, stride, stride=stride)
        for part in self.layer.parameters():
            part.data = torch.randn(part.shape, generator=generator) / 7

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(images.float() / 127.5 - 1)).permute(0, 2, 3, 1)


def opened(folder: Path) -> masks.Masked:
    return masks.open_masked(open_images(folder / "images"), open_images(folder / "masks"))


@pytest.fixture(scope="module")
def options(shapes: Path) -> dict:
    return {
        "model": Network(),
        "train": opened(shapes / "train"),
        "val": opened(shapes / "val"),
        "classes": CLASSES,
        "pixels": 60,
        "multiple": 4,
        "workers": 0,
        "progress": False,
    }


@pytest.fixture(scope="module")
def result(options: dict) -> dict:
    return segmentation.evaluate(**options, steps=200)


def test_shapes_are_segmented(result: dict) -> None:
    """Colours tell the classes, except on their borders; places alone do not."""
    assert result["miou"] > 75
    assert result["knn_miou"] > 65
    assert result["miou"] > 3 * result["baselines"]["majority"]
    assert result["interval95"][0] < result["miou"] < result["interval95"][1]
    assert (result["map"], result["feature_dim"], result["n_train"], result["n_val"]) == ([15, 20], 12, 16, 6)
    assert result["history"][-1]["loss"] < result["history"][0]["loss"] / 2
    assert result["notes"] == ["departs from the default protocol: steps 200 instead of 500"]
    assert sum(row["share"] for row in result["per_class"].values()) == pytest.approx(100)
    ious = [row["iou"] for row in result["per_class"].values()]
    assert result["miou"] == pytest.approx(np.mean(ious))


def test_the_scores_are_those_of_predictions_by_hand(options: dict, result: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over the images to score, with torch's own BatchNorm2d, Conv2d and interpolate, and all neighbours in NumPy."""
    fitted = {}
    fit = segmentation._fit

    def keep(examples, key, *args, **more):
        fitted[key] = fit(examples, key, *args, **more), examples
        return fitted[key][0]

    monkeypatch.setattr(segmentation, "_fit", keep)
    again = segmentation.evaluate(**options, steps=200)
    assert np.array_equal(again["counts"], result["counts"])  # the same seed
    (head, _), examples = fitted["model"]
    norm, layer = head
    bank = np.concatenate([one.positions["model"].numpy()[one.banked] for one in examples]).astype(np.float64)
    shares = np.concatenate([one.shares for one in examples])
    hits = {"linear": np.zeros((3, 4)), "knn": np.zeros((3, 4))}
    val = options["val"]
    for row in range(len(val)):
        image = torch.from_numpy(val.images.pixels(row)).permute(2, 0, 1)[None]
        truth = np.asarray(Image.open(val.masks.where(row)))
        features = Network()(image).permute(0, 3, 1, 2)
        normed = functional.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        scores = {"linear": functional.conv2d(normed, layer.weight[:, :, None, None], layer.bias)}
        queries = features[0].flatten(1).T.double().detach().numpy()
        cosines = (queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)) @ (
            bank / np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-12)
        ).T
        nearest = np.argsort(-cosines, axis=1)[:, :30]
        weights = np.exp((np.take_along_axis(cosines, nearest, 1) - 1) / 0.02)
        votes = (weights[:, :, None] * shares[nearest]).sum(1) / weights.sum(1, keepdims=True)
        scores["knn"] = torch.from_numpy(votes.T.reshape(1, 4, 15, 20))
        for name, found in scores.items():
            predicted = functional.interpolate(found, truth.shape, mode="bilinear").argmax(dim=1)[0].numpy()
            for label in range(4):
                hits[name][0, label] += ((predicted == label) & (truth == label)).sum()
                hits[name][1, label] += ((predicted == label) & (truth != 255)).sum()
                hits[name][2, label] += (truth == label).sum()
    for name, key in (("linear", "miou"), ("knn", "knn_miou")):
        hit, predicted, true = hits[name]
        assert result[key] == pytest.approx(100 * np.mean(hit / (predicted + true - hit)), abs=0.1), name


def test_the_sampled_loss_is_that_of_all_pixels() -> None:
    """At the centres of all pixels, interpolation at points is torch's interpolation to the size of the mask."""
    generator = torch.Generator().manual_seed(0)
    scores, (height, width) = torch.randn(5, 3, 7, generator=generator), (20, 31)
    labels = np.full((height, width), 2, dtype=np.uint8)
    labels[4, 9] = labels[19, 30] = 1
    labels[:3] = 255
    example = segmentation._example(labels, (3, 7), {}, 5, 10, np.random.default_rng(0))
    whole = functional.interpolate(scores[None], (height, width), mode="bilinear")[0]
    y, x = ((example.points.double() + 1) / 2 * torch.tensor([width, height]) - 0.5).round().long().flip(1).unbind(1)
    assert torch.equal(torch.from_numpy(labels)[y, x].long(), example.labels)
    assert {(4, 9), (19, 30)} & set(zip(y.tolist(), x.tolist(), strict=True))
    torch.testing.assert_close(grids.sample(scores, example.points), whole[:, y, x].T, rtol=1e-4, atol=1e-5)
    assert torch.equal(grids.classes_at(scores, height, width), whole.argmax(0))


def test_large_masks_are_labelled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(1))
    whole = grids.classes_at(scores, 50, 40)
    monkeypatch.setattr(grids, "_VALUES", 7 * 40 * 5)
    assert torch.equal(grids.classes_at(scores, 50, 40), whole)


def test_shares_of_a_cell_are_counted() -> None:
    labels = np.array([[0, 0, 1, 255], [0, 2, 1, 255], [1, 1, 255, 255], [1, 0, 255, 255]], dtype=np.uint8)
    shares = grids.shares_of(labels, (2, 2), 3)
    np.testing.assert_allclose(shares, [[0.75, 0, 0.25], [0, 1, 0], [0.25, 0.75, 0], [0, 0, 0]])
    random = np.random.default_rng(0).integers(0, 3, (24, 36)).astype(np.uint8)
    onehot = functional.one_hot(torch.from_numpy(random).long(), 3).permute(2, 0, 1).float()
    expected = functional.adaptive_avg_pool2d(onehot, (4, 6)).flatten(1).T
    np.testing.assert_allclose(grids.shares_of(random, (4, 6), 3), expected, rtol=1e-5)


def test_images_of_several_sizes(shapes: Path, options: dict, tmp_path: Path) -> None:
    """Sizes are batched apart; a mask keeps its size, and the scores are interpolated to it."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for k in range(6):
            picture = Image.open(shapes / f"val/{name}/{k}.png")
            size = [(80, 60), (121, 91), (60, 80)][k % 3]
            picture.resize(size, Image.Resampling.NEAREST).save(tmp_path / name / f"{k}.png")
    val = opened(tmp_path)
    sizes = [maps.resized(size, 60, 4) for size in val.sizes]
    assert sizes == [(60, 80), (60, 80), (80, 60)] * 2
    found = segmentation.evaluate(**{**options, "val": val}, steps=50)
    assert found["miou"] > 60
    total = [int((np.asarray(Image.open(tmp_path / f"masks/{k}.png")) != 255).sum()) for k in range(6)]
    assert found["counts"][:, 2].sum(axis=1).tolist() == total


def test_the_baseline_is_the_colours_of_the_cells() -> None:
    views = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = maps._colours(views, 2, 3)
    cell = views[1, :, 4:8, 8:12].double() / 255 - 0.5
    expected = [*cell.mean(dim=(1, 2)), *cell.std(dim=(1, 2), correction=0), 0.25, 1 / 3]
    torch.testing.assert_close(found[1, 5], torch.tensor(expected).float(), rtol=1e-4, atol=1e-5)


def test_the_memory_is_estimated(options: dict) -> None:
    given = {key: options[key] for key in ("model", "train", "pixels", "multiple")}
    size, shape = segmentation.map_bytes(**given)
    assert shape == (15, 20, 12)
    held = 16 * 15 * 20 * (12 + 8) * 4
    assert held < size < 4 * held


@pytest.mark.parametrize(("patch", "multiple"), [(14, 28), (16, 32), (4, 32), (8, 32), (32, 32)])
def test_the_multiple_suits_the_patches(patch: int, multiple: int) -> None:
    assert maps.multiple_of(nn.Sequential(nn.Conv2d(3, 8, patch, stride=patch))) == multiple


def test_images_without_labels_are_left_out(shapes: Path, options: dict, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shapes / "val", tmp_path / "val")
    Image.fromarray(np.full((60, 80), 255, np.uint8)).save(tmp_path / "val/masks/2.png")
    found = segmentation.evaluate(**{**options, "val": opened(tmp_path / "val")}, steps=20)
    assert found["n_val"] == 5
    assert "1 of 6 images of val have only ignored pixels and were left out" in found["notes"]
    for path in (tmp_path / "val/masks").iterdir():
        Image.fromarray(np.full((60, 80), 255, np.uint8)).save(path)
    with pytest.raises(RequestError, match="val/masks: no mask has a pixel of the classes"):
        segmentation.evaluate(**{**options, "val": opened(tmp_path / "val")}, steps=20)


def test_absent_classes_and_the_same_images_are_noted(options: dict) -> None:
    found = segmentation.evaluate(**{**options, "val": options["train"], "classes": [*CLASSES, (4, "boat")]}, steps=20)
    assert found["per_class"]["boat"]["share"] == 0
    notes = " | ".join(found["notes"])
    assert "no mask of train has a pixel of 1 of the 5 classes (boat)" in notes
    assert "val has the same images as train; use other images" in notes


def test_what_cannot_be_is_refused(options: dict, shapes: Path, tmp_path: Path) -> None:
    for changed, error, message in (
        ({"steps": 0}, RequestError, "steps must be at least 1, got 0"),
        ({"lr": float("nan")}, RequestError, "lr and temperature must be positive, got nan"),
        ({"k": 0}, RequestError, "k must be at least 1"),
        ({"lr": 1e30}, RequestError, "the linear layer's loss is .* choose a lower lr"),
        ({"model": lambda x: x.float().mean(dim=(2, 3))}, FkdError, r"returned \[16, 3\] for 16 images: expected maps"),
        ({"model": lambda x: Network()(x) * float("nan")}, FkdError, "returned NaN or infinity for '0.png'"),
    ):
        with pytest.raises(error, match=message):
            segmentation.evaluate(**{**options, "steps": 40, **changed})
    import shutil

    shutil.copytree(shapes / "val", tmp_path / "val")
    data = (tmp_path / "val/images/3.png").read_bytes()
    (tmp_path / "val/images/3.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"images/3.png: not a readable image"):
        segmentation.evaluate(**{**options, "train": opened(tmp_path / "val")}, steps=5)


def test_the_model_is_not_changed(options: dict) -> None:
    network = nn.Sequential(Network(), nn.BatchNorm1d(20)).train()
    network[1].forward = lambda x: x  # type: ignore[method-assign]
    segmentation.evaluate(**{**options, "model": network}, steps=2)
    assert network.training
    assert all(part.grad is None for part in network.parameters())


def test_pairs_of_counts_compare_models(result: dict) -> None:
    difference, low, high = iou.paired_bootstrap(result["counts"][None], result["counts"][None])
    assert (difference, low, high) == (0, 0, 0)
