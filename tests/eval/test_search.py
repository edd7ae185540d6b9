import numpy as np
import pytest
import torch

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval import search


def features(n: int, dim: int = 24, seed: int = 0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 3, 60, 1000])
@pytest.mark.parametrize(("queries", "width"), [(512, 65536), (7, 333), (64, 100)])
def test_it_is_a_sort_of_all_products(monkeypatch, metric: str, k: int, queries: int, width: int) -> None:
    monkeypatch.setattr(search, "QUERIES", queries)
    monkeypatch.setattr(search, "WIDTH", width)
    train, wanted = features(1000), features(50, seed=1)
    a, b = wanted.astype(np.float64), train.astype(np.float64)
    if metric == "cosine":
        table = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    else:
        table = -0.5 * ((a[:, None] - b[None]) ** 2).sum(axis=2)
    seen = []
    for rows, similarity, neighbours in search.nearest(train, wanted, k, metric=metric):
        assert (similarity.dtype, neighbours.dtype) == (np.float32, np.int64)
        np.testing.assert_allclose(similarity, -np.sort(-table[rows], axis=1)[:, :k], rtol=1e-4, atol=1e-5)
        assert all(len(set(row)) == k for row in neighbours)
        np.testing.assert_allclose(np.take_along_axis(table[rows], neighbours, 1), similarity, rtol=1e-4, atol=1e-5)
        seen += range(rows.start, rows.stop)
    assert seen == list(range(50))


def test_a_mapped_file_is_searched_where_it_lies(tmp_path) -> None:
    np.save(tmp_path / "train.npy", features(90))
    mapped = np.load(tmp_path / "train.npy", mmap_mode="r", allow_pickle=False)
    ((_, similarity, neighbours),) = search.nearest(mapped, features(90)[40:50], 1)
    assert neighbours.ravel().tolist() == list(range(40, 50))
    np.testing.assert_allclose(similarity, 1, rtol=1e-6)


def test_lengths_outside_float32s_squares() -> None:
    rows = features(6) * np.array([1, 1e30, 1e-30, 0, 1e20, 1e-20], dtype=np.float32)[:, None]
    np.testing.assert_allclose(search.lengths(rows), np.linalg.norm(rows.astype(np.float64), axis=1), rtol=1e-6)


def test_lengths_outside_float32() -> None:
    with pytest.raises(FkdError, match=r"features with values up to 3e\+38 are too large for float32; scale them"):
        list(search.nearest(np.full((3, 40), 3e38, dtype=np.float32), None, 1))
    tiny = np.full((3, 4), 1e-42, dtype=np.float32)
    ((_, similarity, _),) = search.nearest(tiny, features(2, 4), 3)
    assert similarity.tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize(("queries", "k", "most"), [(features(2), 11, 10), (None, 10, 9), (features(2), 0, 10)])
def test_an_impossible_k(queries, k: int, most: int) -> None:
    with pytest.raises(RequestError, match=f"k {k}: must be 1 to {most}, the number of neighbours"):
        list(search.nearest(features(10), queries, k))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_the_same() -> None:
    train, wanted = features(1000), features(50, seed=1)
    here, there = (next(search.nearest(train, wanted, 20, device=device)) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(here[1], there[1], rtol=1e-5, atol=1e-6)
