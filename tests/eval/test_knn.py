import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightly.utils.benchmarking import knn_predict as lightly_knn_predict
from sklearn.neighbors import KNeighborsClassifier

import fkd_ssl
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval import knn
from fkd_ssl.eval.knn import knn_predict

N, n, D, C = 300, 80, 12, 7


@pytest.fixture(scope="module")
def clusters():
    """Overlapping clusters, so that neighbours disagree: train [N, D], labels [N], queries [n, D], labels [n]."""
    generator = np.random.default_rng(0)
    means = generator.normal(size=(C, D))
    labels, wanted = generator.integers(0, C, N), generator.integers(0, C, n)
    train = (means[labels] + generator.normal(size=(N, D))) * generator.uniform(0.1, 9, size=(N, 1))
    queries = means[wanted] + generator.normal(size=(n, D))
    return train.astype(np.float32), labels, queries.astype(np.float32), wanted


def by_hand(train, labels, query, k: int, temperature: float) -> list[float]:
    """The definition, one query, in Python floats."""
    cosines = []
    for row, label in zip(train.tolist(), labels.tolist(), strict=True):
        dot = sum(x * y for x, y in zip(row, query.tolist(), strict=True))
        cosines.append((dot / math.sqrt(sum(x * x for x in row) * sum(y * y for y in query.tolist())), label))
    scores = [0.0] * C
    for cosine, label in sorted(cosines, reverse=True)[:k]:
        scores[label] += math.exp(cosine / temperature)
    return scores


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.1), (N, 1.0)])
def test_scores_are_the_definition(clusters, k: int, temperature: float) -> None:
    train, labels, queries, _ = clusters
    got = knn_predict(train, labels, queries, k=k, temperature=temperature)
    assert got.dtype == np.float32
    expected = np.array([by_hand(train, labels, query, k, temperature) for query in queries])
    np.testing.assert_allclose(got, expected, rtol=3e-5)


def test_agrees_with_lightly(clusters) -> None:
    train, labels, queries, _ = clusters
    unit = torch.nn.functional.normalize
    ranked = lightly_knn_predict(
        unit(torch.from_numpy(queries)),
        unit(torch.from_numpy(train)).T,
        torch.from_numpy(labels),
        num_classes=C,
        knn_k=200,
        knn_t=0.1,
    ).numpy()
    got = knn_predict(torch.from_numpy(train), torch.from_numpy(labels), torch.from_numpy(queries), k=200, temperature=0.1)
    np.testing.assert_array_equal(got.argmax(axis=1), ranked[:, 0])
    everywhere = (got > 0).all(axis=1)
    assert everywhere.sum() > n // 2
    np.testing.assert_array_equal(np.argsort(-got[everywhere], axis=1), ranked[everywhere])


def test_agrees_with_sklearn(clusters) -> None:
    train, labels, queries, wanted = clusters
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    probabilities = oracle.fit(train, labels).predict_proba(queries)
    got = knn_predict(train, labels, queries)
    np.testing.assert_allclose(got / got.sum(axis=1, keepdims=True), probabilities, rtol=1e-4, atol=1e-7)
    result = knn.evaluate_features(train_features=train, train_labels=labels, features=queries, labels=wanted)
    assert result["top1"] == pytest.approx(100 * oracle.score(queries, wanted))
    np.testing.assert_array_equal(result["correct"], oracle.predict(queries) == wanted)


def test_chunks_change_nothing(clusters, monkeypatch) -> None:
    train, labels, queries, _ = clusters
    whole = knn_predict(train, labels, queries)
    monkeypatch.setattr(knn, "_CHUNK_BYTES", 16 * 20 * 7)
    np.testing.assert_allclose(knn_predict(train, labels, queries), whole, rtol=1e-5)


def test_a_low_temperature_is_the_nearest_neighbour(clusters) -> None:
    train, labels, queries, _ = clusters
    got = knn_predict(train, labels, queries, k=50, temperature=1e-5)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got.argmax(axis=1), knn_predict(train, labels, queries, k=1).argmax(axis=1))


def test_the_class_list_sets_the_width(clusters) -> None:
    train, labels, queries, _ = clusters
    assert knn_predict(train, labels, queries).shape == (n, C)
    wide = knn_predict(train, labels, queries, num_classes=C + 3)
    assert wide.shape == (n, C + 3)
    assert (wide[:, C:] == 0).all()


def test_more_neighbours_than_images_warns_and_clamps(clusters) -> None:
    train, labels, queries, wanted = clusters
    with pytest.warns(UserWarning, match=f"k is 1000, but there are {N} training images"):
        clamped = knn_predict(train, labels, queries, k=1000)
    np.testing.assert_array_equal(clamped, knn_predict(train, labels, queries, k=N))
    with pytest.warns(UserWarning, match="all of them vote"):
        result = knn.evaluate_features(train_features=train, train_labels=labels, features=queries, labels=wanted, k=1000)
    assert result["k"] == N
    assert result["notes"] == [f"k 1000 was cut to the {N} training images"]


def test_top5_counts_only_classes_that_a_neighbour_belongs_to(clusters) -> None:
    train, labels, queries, wanted = clusters
    one = knn.evaluate_features(train_features=train, train_labels=labels, features=queries, labels=wanted, k=1)
    assert one["top5"] == one["top1"]  # a single neighbour names a single class
    assert one["notes"] == ["top5 counts at most 1 classes: k is 1"]
    most = knn.evaluate_features(train_features=train, train_labels=labels, features=queries, labels=wanted, k=4)
    named = [
        w in {labels[i] for i in np.argsort(-cosines)[:4]} for w, cosines in zip(wanted, cosine(queries, train), strict=True)
    ]
    assert most["top5"] == pytest.approx(100 * np.mean(named))
    assert one["top5"] < most["top5"] < 100


def cosine(a, b):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a.astype(np.float64), b.astype(np.float64)))
    return a @ b.T


def test_lengths_do_not_matter_and_zeros_are_harmless(clusters) -> None:
    train, labels, queries, _ = clusters
    np.testing.assert_allclose(knn_predict(train * 1e25, labels, queries), knn_predict(train, labels, queries), rtol=1e-4)
    assert np.isfinite(knn_predict(np.vstack([train, np.zeros((1, D))]), [*labels, 0], queries * 0, k=N + 1)).all()


def test_evaluate_on_images(make_set, backbone) -> None:
    train, val = make_set("train", seed=0), make_set("val", per_class=3, classes=("green", "red", "sand"), seed=1)
    backbone.train()
    result = knn.evaluate(model=backbone, train=train, val=val, pixels=16, k=5, workers=0, progress=False)
    assert result["top1"] == 100  # the classes are colours
    assert result["top5"] == 100
    correct = result.pop("correct")
    assert correct.dtype == np.bool_
    assert correct.all()
    assert {key: result[key] for key in ("k", "n_train", "n_val", "classes", "feature_dim", "pixels", "notes")} == {
        "k": 5,
        "n_train": 24,
        "n_val": 9,
        "classes": 4,
        "feature_dim": 16,
        "pixels": 16,
        "notes": [],
    }
    assert backbone.training


def test_presets_are_the_published_ones() -> None:
    assert knn.PRESETS == {"dino": ((10, 20, 100, 200), 0.07), "instdisc": ((200,), 0.07), "lightly": ((200,), 0.1)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, RequestError, "k must be at least 1, got 0"),
        ({"temperature": 0.0}, RequestError, "temperature must be above 0, got 0.0"),
        ({"temperature": math.nan}, RequestError, "temperature must be above 0, got nan"),
        ({"train_labels": np.full(N, -1)}, RequestError, rf"train_labels: {N} of {N} have no class \(label -1\)"),
        (
            {"train_labels": np.zeros(N - 1, int)},
            RequestError,
            f"train_labels: expected one label for each of {N} features",
        ),
        (
            {"features": np.zeros((2, D + 1))},
            RequestError,
            f"features have {D + 1} dimensions, the training features {D}",
        ),
        ({"features": np.zeros(D)}, RequestError, rf"features: expected \[images, dimensions\].*got \[{D}\]"),
        ({"train_features": np.full((N, D), np.nan)}, FkdError, f"train_features: {N} of {N} rows hold NaN"),
        ({"num_classes": 3}, RequestError, "train_labels: label 6, but there are 3 classes"),
    ],
)
def test_wrong_requests_are_named(clusters, change, error, message: str) -> None:
    train, labels, queries, _ = clusters
    with pytest.raises(error, match=message):
        knn_predict(**{"train_features": train, "train_labels": labels, "features": queries, **change})


def test_a_label_that_train_lacks_is_refused(clusters) -> None:
    train, labels, queries, _ = clusters
    with pytest.raises(RequestError, match="labels: label 9, but there are 7 classes"):
        knn.evaluate_features(train_features=train, train_labels=labels, features=queries, labels=[9] * n)


def test_the_package_offers_it_and_imports_late() -> None:
    assert fkd_ssl.eval.knn_predict is knn_predict
    assert "knn_predict" in dir(fkd_ssl.eval)
    with pytest.raises(AttributeError, match="no attribute 'knn_predic'"):
        _ = fkd_ssl.eval.knn_predic
    code = (
        "import sys, fkd_ssl.eval; assert 'torch' not in sys.modules; "
        "fkd_ssl.eval.stats.wilson; assert 'torch' not in sys.modules; "
        "fkd_ssl.eval.knn_predict; assert not {'faiss', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
