import numpy as np
import pytest

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval import indexes, retrieval


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    means = generator.normal(size=(5, 8))
    labels, wanted = generator.integers(0, 5, 120), generator.integers(0, 5, 40)
    gallery = (means[labels] + generator.normal(size=(120, 8))).astype(np.float32)
    return gallery, labels, (means[wanted] + generator.normal(size=(40, 8))).astype(np.float32), wanted


def by_hand(gallery, labels, queries, wanted, *, alone: bool):
    """Each measure by its definition, in Python loops."""
    recall, precision, ap = {1: [], 5: [], 10: []}, {1: [], 5: [], 10: []}, []
    for number, (query, label) in enumerate(zip(queries, wanted, strict=True)):
        order = sorted(
            (row for row in range(len(gallery)) if not (alone and row == number)),
            key=lambda row: -float(query @ gallery[row] / np.linalg.norm(query) / np.linalg.norm(gallery[row])),
        )
        right = [labels[row] == label for row in order]
        total = sum(right)
        if not total:
            continue
        for k in recall:
            recall[k].append(any(right[:k]))
            precision[k].append(sum(right[:k]) / k)
        ap.append(sum(sum(right[: i + 1]) / (i + 1) for i in range(total) if right[i]) / total)
    percent = {key: {str(k): 100 * np.mean(v) for k, v in table.items()} for key, table in (("r", recall), ("p", precision))}
    return percent["r"], percent["p"], 100 * np.mean(ap)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", [None, "exact", "hnsw"])
def test_measures_are_their_definitions(data, alone: bool, kind) -> None:
    gallery, labels, queries, wanted = data
    labels = np.append(labels[:-1], 77) if alone else labels  # an image alone in its class is not a query
    asked = {} if alone else {"queries": queries, "labels": wanted}
    index = None if kind is None else indexes.build(gallery, kind)
    approximate = index and (lambda values, k: index.search(values, k, 10**4))
    found = retrieval.evaluate(gallery=gallery, gallery_labels=labels, approximate=approximate, **asked)
    recall, precision, map_at_r = by_hand(gallery, labels, *((gallery, labels) if alone else (queries, wanted)), alone=alone)
    assert found["recall"] == pytest.approx(recall)
    assert found["precision"] == pytest.approx(precision)
    assert found["map_at_r"] == pytest.approx(map_at_r)
    assert found["correct"].mean() * 100 == pytest.approx(found["recall"]["1"])
    assert found["n_queries"] == (119 if alone else 40)
    assert found["notes"] == (["1 images are the only ones of their class and are not searched for"] if alone else [])


def test_what_an_index_does_not_find_is_a_miss(data) -> None:
    gallery, labels, queries, wanted = data
    nothing = retrieval.evaluate(
        gallery=gallery,
        gallery_labels=labels,
        queries=queries,
        labels=wanted,
        approximate=lambda values, k: (np.zeros((len(values), k)), np.full((len(values), k), -1)),
    )
    assert (nothing["recall"]["10"], nothing["map_at_r"]) == (0, 0)


def test_a_gallery_smaller_than_ten(data) -> None:
    gallery, _, queries, wanted = data
    found = retrieval.evaluate(gallery=gallery[:4], gallery_labels=[0, 1, 1, 0], queries=queries, labels=wanted % 2)
    assert found["recall"]["10"] == 100
    assert found["notes"] == ["precision@10 is below 100 by definition: only 4 images can be found"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": np.full(40, 9)}, RequestError, "labels: label 9 is not one of the 5 classes in the training"),
        ({"labels": np.full(40, -1)}, RequestError, "labels: 40 of 40 have no class"),
        ({"queries": np.full((40, 8), np.nan)}, FkdError, "queries: 40 of 40 rows have NaN"),
        ({"queries": np.zeros((40, 7))}, RequestError, "features have 7 dimensions, the training features 8"),
        ({"gallery_labels": np.zeros(3, int)}, RequestError, "gallery_labels: expected one label for each of 120"),
        ({"queries": None, "gallery_labels": np.arange(120)}, RequestError, "every class has one image"),
    ],
)
def test_wrong_requests_are_named(data, change, error, message: str) -> None:
    gallery, labels, queries, wanted = data
    given = {"gallery": gallery, "gallery_labels": labels, "queries": queries, "labels": wanted}
    with pytest.raises(error, match=message):
        retrieval.evaluate(**{**given, **change})
