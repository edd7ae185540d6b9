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


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("group", "queries", "width"), [(20, 7, 33), (1000, 64, 100), (64, 64, 1000), (50, 512, 90)])
def test_groups_and_blocks_of_a_gpu_find_the_same(
    monkeypatch, metric: str, alone: bool, group: int, queries: int, width: int
) -> None:
    """The loops of a GPU, on the CPU: groups of queries, copied blocks of training features, products by torch."""
    train, wanted = features(300), None if alone else features(111, seed=1)
    train[200:] = train[:100]  # ties
    plain = [
        np.concatenate(part) for part in zip(*(x[1:] for x in search.nearest(train, wanted, 9, metric=metric)), strict=True)
    ]
    monkeypatch.setattr(search, "QUERIES", queries)
    monkeypatch.setattr(search, "sizes", lambda device, dim, k: (group, width))
    monkeypatch.setattr(search, "_reads_memory", lambda device: False)
    found = list(search.nearest(train, wanted, 9, metric=metric))
    assert [row for rows, _, _ in found for row in range(rows.start, rows.stop)] == list(range(len(plain[0])))
    assert max(len(similarity) for _, similarity, _ in found) <= queries
    similarity, neighbours = (np.concatenate(part) for part in zip(*(x[1:] for x in found), strict=True))
    np.testing.assert_allclose(similarity, plain[0], rtol=1e-5, atol=1e-5)
    assert all(len(set(row)) == 9 for row in neighbours)
    clear = (np.diff(plain[0], axis=1) < -1e-4).all(axis=1)  # rows without ties
    assert clear.any()
    np.testing.assert_array_equal(neighbours[clear][:, :8], plain[1][clear][:, :8])
    if alone:
        assert (neighbours != np.arange(300)[:, None]).all()


def test_a_gpus_memory_does_not_depend_on_the_training_images() -> None:
    bytes_of = [search.gpu_bytes(n, 50_000, 2048, 20) - 4 * n for n in (1_281_167, 10**8)]
    assert bytes_of[0] == bytes_of[1] < 1.5e9
    assert search.gpu_bytes(100, 10, 8, 1) == 10 * (4 * 8 + 24) + 4 * 100 * 8 + 12 * 10 * 100 + 400
    assert all(search.gpu_bytes(10**7, 10**7, dim, 1000) < 3 * 2**29 + 4e7 for dim in (1, 100, 5000, 200_000))


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
    train, wanted = features(200_000, 64), features(600, 64, seed=1)
    torch.cuda.reset_peak_memory_stats()
    for metric in ("cosine", "euclidean"):
        here, there = (
            [np.concatenate(part) for part in zip(*(x[1:] for x in search.nearest(train, wanted, 20, **options)), strict=True)]
            for options in ({"metric": metric}, {"metric": metric, "device": "cuda"})
        )
        np.testing.assert_allclose(here[0], there[0], rtol=1e-5, atol=1e-5)
        assert (here[1] == there[1]).mean() > 0.999
    assert torch.cuda.max_memory_allocated() <= search.gpu_bytes(200_000, 600, 64, 20)
