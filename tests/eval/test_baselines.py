"""The features of the baselines against loops over pixels, and what is said about a score beside them."""

import math

import numpy as np
import pytest
import torch

from fkd_ssl.eval import baselines, knn
from fkd_ssl.eval.features import extract_rows


@pytest.mark.parametrize("pixels", [16, 64, 160])
def test_they_are_mean_colours_and_a_histogram(pixels: int) -> None:
    views = torch.randint(0, 256, (2, 3, pixels, pixels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = baselines.by_name(baselines.features(views).numpy())
    step = {16: 1, 64: 1, 160: 2}[pixels]
    for k, view in enumerate(views[:, :, ::step, ::step].numpy()):
        side = view.shape[1] // 8
        cells = [
            view[c, i * side : (i + 1) * side, j * side : (j + 1) * side].mean() / 255 - 0.5
            for c in range(3)
            for i in range(8)
            for j in range(8)
        ]
        np.testing.assert_allclose(found["pixels"][k], cells, atol=1e-6)
        counts = [0] * 64
        for red, green, blue in view.reshape(3, -1).T.tolist():
            counts[red // 64 * 16 + green // 64 * 4 + blue // 64] += 1
        np.testing.assert_allclose(found["colours"][k], [math.sqrt(count / view[0].size) for count in counts], atol=1e-6)
    assert sum(part.shape[1] for part in found.values()) == baselines.DIM == 256


def test_they_are_extracted_beside_the_models_features(make_set, backbone) -> None:
    images = make_set("set", per_class=5)
    options = {"pixels": 16, "workers": 0, "progress": False, "batch_size": 8}
    plain, _ = extract_rows(backbone, images, **options)
    both, rows = extract_rows(backbone, images, with_baselines=True, **options)
    alone, _ = extract_rows(baselines.features, images, **options)
    np.testing.assert_array_equal(both, np.hstack([plain, alone]))
    assert rows.tolist() == list(range(20))


def test_scores_are_of_the_same_protocol_best_first() -> None:
    train, val, known, truth = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32), np.arange(4) // 2, np.arange(4) // 2
    swapped = val[[2, 3, 0, 1]]

    def evaluate(**features):
        return knn.evaluate_features(**features, train_labels=known, labels=truth, num_classes=2, k=1)

    found = baselines.scores(evaluate, {"pixels": (train, swapped), "colours": (train, val)}, known, truth)
    assert list(found.items()) == [("colours", 100), ("pixels", 0), ("chance", 50)]
    assert baselines.scores(evaluate, {}, known, truth) == {"chance": 50}


def test_chance_is_the_most_frequent_training_class() -> None:
    assert baselines.chance(np.array([0, 1, 1, 2]), np.array([1, 1, 0, 2, 1])) == 60


def test_a_score_at_or_below_the_best_baseline_is_noted() -> None:
    found = {"colours": 41.0, "pixels": 37.0, "chance": 10.0}
    assert baselines.note(41.01, found) == []
    assert baselines.note(41.0, found, "The teacher") == [
        "The teacher (41.00 %) is no better than a colour histogram (41.00 %)"
    ]
    assert baselines.note(9.0, {"chance": 10.0}) == ["the model (9.00 %) is no better than chance (10.00 %)"]
