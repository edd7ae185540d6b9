import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightly.utils.benchmarking import KNNClassifier
from lightly.utils.benchmarking import knn_predict as lightly_knn_predict
from sklearn.neighbors import KNeighborsClassifier

import fkd_ssl
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval import knn, search
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
    """The definition for one query, in Python floats."""
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
    monkeypatch.setattr(search, "QUERIES", 7)
    monkeypatch.setattr(search, "WIDTH", 23)
    monkeypatch.setattr(knn, "_VOTES", 30)
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
    with pytest.warns(UserWarning, match="using all of them"):
        result = knn.evaluate_features(train_features=train, train_labels=labels, features=queries, labels=wanted, k=1000)
    assert result["k"] == N
    assert result["notes"] == [f"k 1000 was reduced to {N}, the number of training images"]


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


def score(clusters, **options):
    train, labels, queries, wanted = clusters
    return knn.evaluate_features(train_features=train, train_labels=labels, features=queries, labels=wanted, **options)


def test_a_sweep_is_each_alone(clusters) -> None:
    swept = score(clusters, k=[5, 20, 100], temperature=[0.07, 1.0])
    assert [(row["k"], row["temperature"]) for row in swept["grid"]] == [(k, t) for k in (5, 20, 100) for t in (0.07, 1.0)]
    for row in swept["grid"]:
        alone = score(clusters, k=row["k"], temperature=row["temperature"])
        assert (row["top1"], row["top5"]) == (alone["top1"], alone["top5"])
    assert (swept["k"], swept["top1"]) == (20, score(clusters, k=20)["top1"])  # the headline is not the best of them
    assert score(clusters, k=[5, 100])["k"] == 5


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, math.inf), (200, 0.5)])
def test_euclidean_agrees_with_sklearn(clusters, k: int, temperature: float) -> None:
    train, labels, queries, _wanted = (part + 30 if part.ndim == 2 else part for part in clusters)  # far from the origin

    def weights(distance):
        return np.exp((distance.min(axis=1, keepdims=True) ** 2 - distance**2) / (2 * temperature))

    oracle = KNeighborsClassifier(k, algorithm="brute", weights=weights).fit(train.astype(np.float64), labels)
    got = knn_predict(train, labels, queries, k=k, temperature=temperature, metric="euclidean")
    expected = oracle.predict_proba(queries.astype(np.float64))
    np.testing.assert_allclose(got / got.sum(axis=1, keepdims=True), expected, rtol=2e-3, atol=1e-5)


def test_euclidean_and_cosine_are_one_on_the_sphere(clusters) -> None:
    train, labels, queries, _ = (search_unit(part) if part.ndim == 2 else part for part in clusters)
    by_cosine, by_distance = (knn_predict(train, labels, queries, metric=metric) for metric in ("cosine", "euclidean"))
    by_cosine, by_distance = (part / part.sum(axis=1, keepdims=True) for part in (by_cosine, by_distance))
    np.testing.assert_allclose(by_cosine, by_distance, rtol=1e-4, atol=1e-6)


def search_unit(part):
    return (part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32)


def test_leave_one_out_is_n_searches_without_one(clusters, monkeypatch) -> None:
    train, labels, *_ = clusters
    train, labels = np.vstack([train[:59], train[:1]]), np.append(labels[:59], labels[0])  # an image and its copy
    monkeypatch.setattr(search, "QUERIES", 11)
    monkeypatch.setattr(search, "WIDTH", 32)
    result = knn.evaluate_features(train_features=train, train_labels=labels, k=5, num_classes=C)
    for row in range(60):
        others = np.arange(60) != row
        alone = knn_predict(train[others], labels[others], train[row : row + 1], k=5, num_classes=C)
        assert result["correct"][row] == (alone.argmax() == labels[row])
    with pytest.warns(UserWarning, match="k is 60, but there are 59"):
        assert knn.evaluate_features(train_features=train, train_labels=labels, k=60)["k"] == 59
    with pytest.raises(RequestError, match="has one image; leave-one-out needs at least two"):
        knn.evaluate_features(train_features=train[:1], train_labels=labels[:1])


def test_a_class_of_one_image_is_noted_when_it_is_left_out(clusters) -> None:
    train, labels, *_ = clusters
    result = knn.evaluate_features(train_features=train, train_labels=np.append(labels[:-1], 1000))
    assert result["notes"] == ["1 of 8 classes have only one image, which the others cannot classify correctly"]
    assert result["per_class"]["1000"] == {"n": 1, "top1": 0.0}


def test_labels_with_gaps_are_the_same_labels(clusters) -> None:
    train, labels, queries, wanted = clusters
    plain, gaps = score(clusters), score((train, labels * 10**9 + 5, queries, wanted * 10**9 + 5))
    np.testing.assert_array_equal(plain["correct"], gaps["correct"])
    assert list(gaps["per_class"]) == [str(label * 10**9 + 5) for label in range(C)]
    n_3, hits_3 = (wanted == 3).sum(), plain["correct"][wanted == 3].sum()
    assert gaps["per_class"][str(3 * 10**9 + 5)] == {"n": n_3, "top1": pytest.approx(100 * hits_3 / n_3)}


def test_few_shot_draws_are_searches_of_their_rows(clusters) -> None:
    train, labels, queries, wanted = clusters
    common = {"train_features": train, "train_labels": labels, "features": queries, "labels": wanted, "k": 3}
    result = knn.few_shot(shots=4, draws=3, seed=2, **common)
    tops = []
    for draw in range(3):
        rows = knn.shot_rows(labels, 4, np.random.default_rng([2, draw]))
        assert np.bincount(labels[rows]).tolist() == [4] * C
        tops.append(score((train[rows], labels[rows], queries, wanted), k=3)["top1"])
    assert len(set(tops)) > 1
    assert (result["top1"], result["top1_std"]) == (pytest.approx(np.mean(tops)), pytest.approx(np.std(tops, ddof=1)))
    assert [draw["top1"] for draw in result["draws"]] == tops
    assert knn.few_shot(shots=0.1, draws=1, **common)["top1_std"] == 0
    tenth = np.bincount(labels[knn.shot_rows(labels, 0.1, np.random.default_rng(0))])
    assert tenth.tolist() == [max(1, round(0.1 * count)) for count in np.bincount(labels)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 1.5}, "shots 1.5: expected an integer number of images per class, or a share"),
        ({"shots": 0}, "shots 0: expected an integer number"),
        ({"shots": 1000}, r"shots 1000: class 0 has \d+ training images"),
        ({"shots": 5, "draws": 0}, "draws must be at least 1, got 0"),
    ],
)
def test_impossible_shots_are_named(clusters, options, message: str) -> None:
    train, labels, queries, wanted = clusters
    with pytest.raises(RequestError, match=message):
        knn.few_shot(train_features=train, train_labels=labels, features=queries, labels=wanted, **options)


def test_agrees_with_lightlys_classifier_to_the_sample(clusters) -> None:
    train, labels, queries, wanted = (torch.from_numpy(part) for part in clusters)

    class Alone(KNNClassifier):  # without a Trainer
        trainer = None
        all_gather = staticmethod(lambda part: part)

    theirs = Alone(None, num_classes=C, knn_k=20, knn_t=0.1, topk=(1,), train_dataloader_idx=0, val_dataloader_idx=1)
    theirs.validation_step((train, labels), 0, 0)
    each = [theirs.validation_step((queries[i : i + 1], wanted[i : i + 1]), i, 1) for i in range(n)]
    correct = [bool(next(iter(said.values()))) for said in each]
    np.testing.assert_array_equal(score(clusters, k=20, temperature=0.1)["correct"], correct)


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
        ({"temperature": 0.0}, RequestError, "temperature must be positive, got 0.0"),
        ({"temperature": math.nan}, RequestError, "temperature must be positive, got nan"),
        ({"train_labels": np.full(N, -1)}, RequestError, rf"train_labels: {N} of {N} have no class \(label -1\)"),
        ({"metric": "manhattan"}, RequestError, "metric 'manhattan': expected cosine or euclidean"),
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
        ({"features": np.zeros(D)}, RequestError, rf"features: expected a non-empty array \[images, dimensions\].*got \[{D}\]"),
        ({"train_features": np.full((N, D), np.nan)}, FkdError, f"train_features: {N} of {N} rows have NaN"),
        ({"num_classes": 3}, RequestError, "train_labels: label 6, but there are 3 classes"),
    ],
)
def test_wrong_requests_are_named(clusters, change, error, message: str) -> None:
    train, labels, queries, _ = clusters
    with pytest.raises(error, match=message):
        knn_predict(**{"train_features": train, "train_labels": labels, "features": queries, **change})


def test_a_label_that_train_lacks_is_refused(clusters) -> None:
    train, labels, queries, _ = clusters
    with pytest.raises(RequestError, match="labels: label 9 is not one of the 7 classes"):
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
