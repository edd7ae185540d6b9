"""Exact nearest neighbours in blocks of bounded memory: a matrix product, and the k largest values of each row.

The product uses numpy on the CPU and torch on a GPU. faiss's exact index is not used: it has a third of the speed on
processors unknown to the OpenBLAS in its wheel, about the same speed elsewhere, and needs normalised copies of the features
(benchmarks/knn.py). For the cosine, products are divided by the lengths, so that the training features are neither copied nor
normalised and can be memory-mapped files.

Legend: `N` training images, `n` queries, `D` feature dimension, `Q` queries in a chunk, `W` training images in a block.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.errors import FkdError, RequestError

Metric = Literal["cosine", "euclidean"]

QUERIES, WIDTH = 512, 65536
"""Maximum of queries in a chunk and of training images in a block: their products take 128 MiB."""


def nearest(
    train: Float32Array,
    queries: Float32Array | None,
    k: int,
    *,
    metric: Metric = "cosine",
    device: torch.device | str = "cpu",
) -> Iterator[tuple[slice, Float32Array, Int64Array]]:
    """The k most similar training images of each query, in chunks of queries.

    A GPU holds all training features. Euclidean distances are computed by float32 products, after the mean is subtracted: exact
    to about 1e-6 of the largest squared length.

    Args:
        train: Finite, float32 [N, D].
        queries: Finite, float32 [n, D]; None for the training images themselves, each without itself.
        k: Neighbours, at most N (N - 1 without queries).
        metric: `cosine`, where a vector of zeros has similarity 0 to all, or `euclidean`.
        device: Where the product is computed.

    Yields:
        The rows of the queries, their similarities float32 [Q, k] in descending order, and their neighbours int64 [Q, k]. The
        similarity is the cosine, or minus half the squared distance: on vectors of length 1 both give the same order.

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
    on_gpu = None if device.type == "cpu" else torch.tensor(train, device=device)
    chunk_size, width = min(QUERIES, len(wanted)), min(WIDTH, len(train))
    buffer = torch.empty(chunk_size * width, device=device)
    for start in range(0, len(wanted), chunk_size):
        rows = slice(start, min(start + chunk_size, len(wanted)))
        chunk = wanted[rows] - centre
        length = lengths(chunk)
        if metric == "cosine":
            chunk *= _inverse(length)[:, None]
        similarity = torch.empty(len(chunk), 0, device=device)
        neighbours = torch.empty(len(chunk), 0, dtype=torch.int64, device=device)
        for first in range(0, len(train), width):
            last = min(first + width, len(train))
            products = buffer[: len(chunk) * (last - first)].view(len(chunk), last - first)
            if on_gpu is None:
                np.matmul(chunk, train[first:last].T, out=products.numpy())
            else:
                torch.mm(torch.from_numpy(chunk).to(device), on_gpu[first:last].T, out=products)
            if metric == "cosine":
                products *= by_train[first:last]
            else:
                products += by_train[first:last]
            if queries is None:
                own = torch.from_numpy(np.arange(max(start, first), min(rows.stop, last))).to(device)
                products[own - start, own - first] = -torch.inf
            values, found = products.topk(min(k, last - first), dim=1)
            similarity, neighbours = torch.cat([similarity, values], dim=1), torch.cat([neighbours, found + first], dim=1)
            similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
            neighbours = neighbours.gather(1, best)
        result: Float32Array = similarity.cpu().numpy()
        if metric == "euclidean":
            result -= (length**2 / 2).astype(np.float32)[:, None]
        yield rows, result, neighbours.cpu().numpy()


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
