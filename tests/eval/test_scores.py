import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval import scores


def test_accuracy_agrees_with_sklearn() -> None:
    generator = np.random.default_rng(0)
    table, labels = generator.normal(size=(500, 9)), generator.integers(0, 9, 500)
    got = scores.accuracy(scores.ranks(table, labels))
    assert got["top1"] == pytest.approx(100 * top_k_accuracy_score(labels, table, k=1, labels=range(9)))
    assert got["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, table, k=5, labels=range(9)))
    np.testing.assert_array_equal(got["correct"], table.argmax(axis=1) == labels)


def test_equal_scores_are_ranked_by_class_index() -> None:
    table = np.array([[1.0, 1.0, 1.0, 2.0]] * 4)
    np.testing.assert_array_equal(scores.ranks(table, np.arange(4)), [1, 2, 3, 0])


@pytest.mark.parametrize("values", [torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True), [[1, 1]] * 3])
def test_features_of_any_kind_become_float32(values: object) -> None:
    features = scores.as_features(values, "features")
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, np.ones((3, 2)))


def test_wrong_features_are_refused() -> None:
    with pytest.raises(RequestError, match=r"queries: expected a non-empty array \[images, dimensions\].*got \[4\]"):
        scores.as_features(np.zeros(4), "queries")
    with pytest.raises(RequestError, match=r"got \[0, 4\]"):
        scores.as_features(np.zeros((0, 4)), "queries")
    bad = np.zeros((5, 2))
    bad[3, 1], bad[4, 0] = np.nan, np.inf
    with pytest.raises(FkdError, match="queries: 2 of 5 rows have NaN or infinity, first row 3"):
        scores.as_features(bad, "queries")
    with pytest.raises(RequestError, match="features have 3 dimensions, the training features 2"):
        scores.same_dimension(np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32))


def test_wrong_labels_are_refused() -> None:
    with pytest.raises(RequestError, match="labels: expected integers, got float64"):
        scores.as_labels([0.0, 1.0], 2, "labels")
    with pytest.raises(RequestError, match=r"one label for each of 3 features, got shape \[2\]"):
        scores.as_labels([0, 1], 3, "labels")
    with pytest.raises(RequestError, match=r"2 of 3 have no class \(label -1\), first row 1"):
        scores.as_labels(torch.tensor([0, -1, -1]), 3, "labels")
    with pytest.raises(RequestError, match="label 4, but there are 4 classes, 0 to 3"):
        scores.as_labels([0, 4], 2, "labels", num_classes=4)


def test_few_classes_are_noted() -> None:
    assert scores.few_classes(6) == []
    assert "there are 5 classes" in scores.few_classes(5)[0]


def test_scores_that_are_nan_are_no_hit() -> None:
    with pytest.raises(FkdError, match="scores are NaN"):
        scores.ranks(np.full((3, 5), np.nan, dtype=np.float32), np.array([0, 2, 4]))
