import numpy as np
import pytest

from fkd_ssl.errors import RequestError
from fkd_ssl.eval import indexes


def vectors(n: int, seed: int = 0):
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(20, 32))[generator.integers(0, 20, n)] + 0.4 * generator.normal(size=(n, 32))).astype("f4")


def test_the_curve_is_what_a_sort_of_all_products_says() -> None:
    gallery, queries = vectors(600), vectors(30, seed=1)
    rows = indexes.curve(gallery, queries, seconds=0)
    assert {row["index"] for row in rows} == set(indexes.KINDS)
    built = {kind: indexes.build(gallery, kind) for kind in indexes.KINDS}
    for row in rows:
        _, found = built[row["index"]].search(queries, 10, row["effort"])
        order = np.argsort(-indexes.normalised(queries).astype("f8") @ indexes.normalised(gallery).astype("f8").T, axis=1)
        expected = np.mean([len(set(a) & set(b[:10])) / 10 for a, b in zip(found.tolist(), order.tolist(), strict=True)])
        assert row["recall"] == pytest.approx(100 * expected, abs=0.5)
        assert row["queries_per_second"] > 0
    most = {kind: max(row["recall"] for row in rows if row["index"] == kind) for kind in indexes.KINDS}
    assert most["exact"] == 100
    assert most["hnsw"] > 99
    assert most["ivfflat"] == 100  # all lists are searched
    assert 30 < most["ivfpq"] < 100
    size = {row["index"]: row["bytes_per_vector"] for row in rows}
    assert size["exact"] == 128
    assert size["hnsw"] > size["ivfflat"] > 128 > size["ivfpq"]


def test_galleries_that_are_too_small() -> None:
    assert indexes.build(vectors(40), "ivfpq").search(vectors(2), 3)[1].shape == (2, 3)
    with pytest.raises(RequestError, match="index ivfpq: 7 images in the gallery; product quantisation needs at least 16"):
        indexes.build(vectors(7), "ivfpq")
    with pytest.raises(RequestError, match="index 'lsh': expected exact, hnsw, ivfflat, ivfpq"):
        indexes.build(vectors(7), "lsh")
