import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from torchmetrics.functional.classification import multiclass_jaccard_index

from fkd_ssl.errors import RequestError
from fkd_ssl.eval import iou

C = 5


@pytest.fixture(scope="module")
def segmented():
    """Predictions and masks of 6 images [6, 12, 10], with ignored pixels and a class (4) that no mask has."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, (6, 12, 10))
    predicted = np.where(generator.random(labels.shape) < 0.6, labels, generator.integers(0, C, labels.shape))
    labels[generator.random(labels.shape) < 0.1] = 255
    return predicted, labels


def counts_of(predicted, labels):
    return np.stack([iou.count(torch.from_numpy(p), torch.from_numpy(m), C) for p, m in zip(predicted, labels, strict=True)])


def test_counts_are_the_definition(segmented) -> None:
    for predicted, labels, found in zip(*segmented, counts_of(*segmented), strict=True):
        for c in range(C):
            scored = [(p, m) for p, m in zip(predicted.ravel(), labels.ravel(), strict=True) if m != 255]
            expected = [sum(p == m == c for p, m in scored), sum(p == c for p, m in scored), sum(m == c for p, m in scored)]
            assert found[:, c].tolist() == expected


def test_scores_are_those_of_scikit_learn_and_torchmetrics(segmented) -> None:
    predicted, labels = segmented
    sums = counts_of(predicted, labels).sum(axis=0)
    p, m = predicted[labels != 255], labels[labels != 255]
    np.testing.assert_allclose(iou.per_class(sums), 100 * jaccard_score(m, p, average=None, labels=range(C)))
    assert iou.mean(sums) == pytest.approx(100 * jaccard_score(m, p, average="macro", labels=range(C)))
    given = torch.from_numpy(predicted), torch.from_numpy(labels)
    assert iou.mean(sums) == pytest.approx(100 * float(multiclass_jaccard_index(*given, C, ignore_index=255)), rel=1e-5)
    assert iou.pixel_accuracy(sums) == pytest.approx(100 * accuracy_score(m, p))
    assert np.array_equal(sums[0], confusion_matrix(m, p, labels=range(C)).diagonal())


def test_a_class_without_pixels_is_left_out(segmented) -> None:
    predicted, labels = segmented
    predicted = np.where(predicted == 4, 0, predicted)
    sums = counts_of(predicted, labels).sum(axis=0)
    assert np.isnan(iou.per_class(sums)).tolist() == [False] * 4 + [True]
    assert iou.mean(sums) == pytest.approx(iou.per_class(sums)[:4].mean())


def test_the_interval_is_a_bootstrap_over_images(segmented) -> None:
    counts = counts_of(*segmented)
    generator = np.random.default_rng(0)
    drawn = [iou.mean(counts[generator.integers(0, 6, 6)].sum(axis=0)) for _ in range(2000)]
    np.testing.assert_allclose(iou.interval(counts), np.quantile(drawn, [0.025, 0.975]))
    low, high = iou.interval(np.repeat(counts[:1], 6, axis=0))
    assert low == high == pytest.approx(iou.mean(counts[0]))


def test_a_difference_is_paired_over_images_and_seeds(segmented) -> None:
    predicted, labels = segmented
    worse = predicted.copy()
    worse[:, :3] = (worse[:, :3] + 1) % 4
    a = np.stack([counts_of(predicted, labels), counts_of(np.roll(predicted, 1, axis=2), labels)])
    b = np.stack([counts_of(worse, labels), counts_of(np.roll(predicted, 2, axis=2), labels)])
    difference, low, high = iou.paired_bootstrap(a, b)
    means = [[float(iou.mean(seed.sum(axis=0))) for seed in arm] for arm in (a, b)]
    assert difference == pytest.approx(np.mean(means[0]) - np.mean(means[1]))
    generator, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        seeds, rows = generator.integers(0, 2, 2), generator.integers(0, 6, 6)
        arms = [np.mean([iou.mean(arm[seed][rows].sum(axis=0)) for seed in seeds]) for arm in (a, b)]
        drawn.append(arms[0] - arms[1])
    np.testing.assert_allclose([low, high], np.quantile(drawn, [0.05, 0.95]))
    assert iou.paired_bootstrap(a, a) == (0, 0, 0)
    with pytest.raises(RequestError, match="expected arms of one shape"):
        iou.paired_bootstrap(a, b[:1])
