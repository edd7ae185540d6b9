"""Exact nearest neighbours in blocks of bounded memory: a matrix product, and the k largest values of each row.

The product uses numpy on the CPU and torch on a GPU. faiss's exact index is not used: it has a third of the speed on
processors unknown to the OpenBLAS in its wheel, about the same speed elsewhere, and needs normalised copies of the features
(benchmarks/knn.py). For the cosine, products are divided by the lengths, so that the training features are neither copied nor
normalised and can be memory-mapped files.

On a GPU, a group of queries stays there while the training features pass through in blocks, so its memory (`gpu_bytes`) does
not depend on N. On paper, ImageNet with a ResNet-50 (N 1.28 M, n 50,000, D 2048, k 20) needs 1.4 GB there and 2 N n D
operations, 262 TFLOP: 6 s at 45 TFLOP/s, which an H100 reaches in float32. The products are written and read about eight times
(2 TB, 1 s), and 4 N D bytes (10.5 GB) cross the bus while products are computed. Before that, the CPU reads the features twice,
to check them and to measure their lengths.

Legend: `N` training images, `n` queries, `D` feature dimension, `G` queries in a group, `Q` queries in a chunk, `W` training
images in a block.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.errors import FkdError, RequestError

Metric = Literal["cosine", "euclidean"]

QUERIES, WIDTH = 512, 65536
"""Largest number of queries in a chunk and of training images in a block: their products take 128 MiB."""
GPU_BYTES = 2**29
"""Bytes on a GPU of a group of queries, with their neighbours, and of a block of training features."""


def nearest(
    train: Float32Array,
    queries: Float32Array | None,
    k: int,
    *,
    metric: Metric = "cosine",
    device: torch.device | str = "cpu",
) -> Iterator[tuple[slice, Float32Array, Int64Array]]:
    """The k most similar training images of each query, in chunks of queries.

    Products are in float32, on a GPU with TF32 only if torch is told to use it (it is not by default). Euclidean distances are
    computed by products, after the mean is subtracted: exact to about 1e-6 of the largest squared length. They take a copy of
    the training features.

    Args:
        train: Finite, float32 [N, D].
        queries: Finite, float32 [n, D]; None for the training images themselves, each without itself.
        k: Neighbours, at most N (N - 1 without queries).
        metric: `cosine`, where a vector of zeros has similarity 0 to all, or `euclidean`.
        device: Where the products are computed.

    Yields:
        The rows of the queries, their similarities float32 [Q, k] in descending order, and their neighbours int64 [Q, k]. The
        similarity is the cosine, or minus half the squared distance: on vectors of length 1 both give the same order. Ties at
        the k-th place are broken arbitrarily.

    Raises:
        RequestError: k is larger than the number of neighbours, or the metric is unknown.
    """
    if metric not in ("cosine", "euclidean"):
        raise RequestError(f"metric {metric!r}: expected cosine or euclidean")
    count = len(train) - (queries is None)
    if not 1 <= k <= count:
        raise RequestError(f"k {k}: must be 1 to {count}, the number of neighbours")
    device = torch.device(device)
    wanted = train if queries is None else queries
    if metric == "euclidean":
        centre = train.mean(axis=0, dtype=np.float64).astype(np.float32)
        train = train - centre
        side: Float32Array = (lengths(train) ** 2 / -2).astype(np.float32)
    else:
        centre = np.zeros(train.shape[1], dtype=np.float32)
        side = _inverse(lengths(train))
    by_train = torch.from_numpy(side).to(device)
    group_size, width = sizes(device, train.shape[1], k)
    width = min(width, len(train))
    buffer = torch.empty(min(QUERIES, len(wanted)) * width, device=device)
    for start in range(0, len(wanted), group_size):
        group = wanted[start : start + group_size] - centre
        length = lengths(group)
        if metric == "cosine":
            group *= _inverse(length)[:, None]
        on_device = torch.from_numpy(group).to(device)
        chunks = [slice(first, min(first + QUERIES, len(group))) for first in range(0, len(group), QUERIES)]
        found = [(torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)) for _ in chunks]
        for first, last, block in _blocks(train, width, device):
            for number, rows in enumerate(chunks):
                products = buffer[: (rows.stop - rows.start) * (last - first)].view(-1, last - first)
                if block is None:
                    np.matmul(group[rows], train[first:last].T, out=products.numpy())
                else:
                    torch.mm(on_device[rows], block.T, out=products)
                if metric == "cosine":
                    products *= by_train[first:last]
                else:
                    products += by_train[first:last]
                if queries is None:
                    place = start + rows.start
                    own = torch.arange(max(place, first), max(place, first, min(start + rows.stop, last)), device=device)
                    products[own - place, own - first] = -torch.inf
                found[number] = _merged(*found[number], products, first, k)
        for rows, (similarity, neighbours) in zip(chunks, found, strict=True):
            result: Float32Array = similarity.cpu().numpy()
            if metric == "euclidean":
                result -= (length[rows] ** 2 / 2).astype(np.float32)[:, None]
            yield slice(start + rows.start, start + rows.stop), result, neighbours.cpu().numpy()


def sizes(device: torch.device, dim: int, k: int) -> tuple[int, int]:
    """Returns G and W. On the CPU, a group has the size of a chunk."""
    if device.type == "cpu":
        return QUERIES, WIDTH
    return max(QUERIES, GPU_BYTES // (4 * dim + 24 * k)), max(1, min(WIDTH, GPU_BYTES // (4 * dim)))


def gpu_bytes(train: int, queries: int, dim: int, k: int) -> int:
    """Maximum GPU memory of a search: a group, a block, the products with their k largest values, and the lengths."""
    group, width = sizes(torch.device("cuda"), dim, k)
    group, width, chunk = min(group, queries), min(width, train), min(QUERIES, queries)
    return group * (4 * dim + 24 * k) + 4 * width * dim + 3 * 4 * chunk * width + 4 * train


def _blocks(train: Float32Array, width: int, device: torch.device) -> Iterator[tuple[int, int, torch.Tensor | None]]:
    """The first and last row of each block, and its features on a GPU, which are valid until the next block.

    The next block is copied to pinned memory while the GPU works on this one.
    """
    if _reads_memory(device):
        for first in range(0, len(train), width):
            yield first, min(first + width, len(train)), None
        return
    cuda = device.type == "cuda"
    staged = torch.empty(width, train.shape[1], pin_memory=cuda)
    block = torch.empty_like(staged, device=device)
    copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
    for first in range(0, len(train), width):
        rows = train[first : first + width]
        if copied is not None:
            copied.synchronize()
        staged[: len(rows)].numpy()[:] = rows
        block[: len(rows)].copy_(staged[: len(rows)], non_blocking=True)
        if copied is not None:
            copied.record(torch.cuda.current_stream(device))
        yield first, first + len(rows), block[: len(rows)]


def _reads_memory(device: torch.device) -> bool:
    """Whether the device reads the training features in place, without a copy."""
    return device.type == "cpu"


def _merged(
    similarity: torch.Tensor, neighbours: torch.Tensor, products: torch.Tensor, first: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges the neighbours found so far with the products of the rows from `first` on; returns the k best."""
    values, found = products.topk(min(k, products.shape[1]), dim=1)
    if not len(similarity):
        return values, found + first
    similarity, neighbours = torch.cat([similarity, values], dim=1), torch.cat([neighbours, found + first], dim=1)
    similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
    return similarity, neighbours.gather(1, best)


def lengths(features: Float32Array) -> Float32Array:
    """The Euclidean length of each row: float32 [n], also if the squares overflow or underflow float32.

    Raises:
        FkdError: A length is too large for float32.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found: Float32Array = np.sqrt(np.einsum("nd,nd->n", features, features))
        odd = np.flatnonzero(~((found > 1e-15) & (found < 1e19)))
        found[odd] = np.sqrt(np.square(features[odd], dtype=np.float64).sum(axis=1))
    if not np.isfinite(found).all():
        raise FkdError(f"features with values up to {np.abs(features[odd]).max():.3g} are too large for float32; scale them")
    return found


def _inverse(values: Float32Array) -> Float32Array:
    nonzero = values > np.finfo(np.float32).tiny
    inverse: Float32Array = np.where(nonzero, 1 / np.where(nonzero, values, 1), 0).astype(np.float32)
    return inverse
