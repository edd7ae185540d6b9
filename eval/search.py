"""Exact nearest neighbours in blocks of bounded memory: a matrix product, and the k largest of each row.

The product is numpy's on the CPU and torch's on a GPU. faiss's exact index is not used: it multiplies with an OpenBLAS of
its own wheel (of 2021 in 1.15), which picks its kernels by a list of processors and falls back to SSE3 on one that it does
not know: a third of the speed. Where it knows the processor its bare search is level with this one or a little ahead, and
behind once the normalised copies that it needs are counted (benchmarks/knn.py). The training features are read where they
lie, mapped files too: for the cosine they are neither copied nor normalised, since it is the products that are divided by
their lengths.

Legend: `N` training images, `n` queries, `D` feature dimension, `Q` queries in a chunk, `W` training images in a block.
"""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval.scores import Float32Array, Int64Array

Metric = Literal["cosine", "euclidean"]

QUERIES, WIDTH = 512, 65536
"""Most queries in a chunk and training images in a block: their products take 128 MiB."""
FOLD = 16

Found = tuple[torch.Tensor, torch.Tensor]  # similarities and rows, [Q, k]


def nearest(
    train: Float32Array,
    queries: Float32Array | None,
    k: int,
    *,
    metric: Metric = "cosine",
    device: torch.device | str = "cpu",
) -> Iterator[tuple[slice, Float32Array, Int64Array]]:
    """The k most similar training images of each query, in chunks of queries.

    On a GPU the training features are held there whole. Euclidean distances are of float32 products of features whose
    mean was taken off: exact to about 1e-6 of the squared length of the longest.

    Args:
        train: Finite, float32 [N, D].
        queries: Finite, float32 [n, D]; None for the training images themselves, none being its own neighbour.
        k: Neighbours, at most N (N - 1 without queries).
        metric: `cosine`, where a vector of zeros has similarity 0 to all, or `euclidean`.
        device: Where the product is made.

    Yields:
        The queries' rows, and of each the similarities float32 [Q, k], largest first, and the neighbours int64 [Q, k].
        The similarity is the cosine, or minus half the squared distance: the same order on vectors of length 1, and there
        the same up to a constant.

    Raises:
        RequestError: k is above what there is, or the metric unknown.
    """
    if metric not in ("cosine", "euclidean"):
        raise RequestError(f"metric {metric!r}: expected cosine or euclidean")
    most = len(train) - (queries is None)
    if not 1 <= k <= most:
        raise RequestError(f"k {k}: must lie in 1 to {most}, the neighbours that there are")
    where = torch.device(device)
    wanted = train if queries is None else queries
    if metric == "euclidean":
        centre = train.mean(axis=0, dtype=np.float64).astype(np.float32)
        train = train - centre
        side: Float32Array = (lengths(train) ** 2 / -2).astype(np.float32)
    else:
        centre = np.zeros(train.shape[1], dtype=np.float32)
        side = _inverse(lengths(train))
    by_train = torch.from_numpy(side).to(where)
    gpu = None if where.type == "cpu" else torch.tensor(train, device=where)
    at_once, width = min(QUERIES, len(wanted)), min(WIDTH, len(train))
    buffer = torch.empty(at_once * (width + FOLD), device=where)
    for start in range(0, len(wanted), at_once):
        rows = slice(start, min(start + at_once, len(wanted)))
        chunk = wanted[rows] - centre
        length = lengths(chunk)
        if metric == "cosine":
            chunk *= _inverse(length)[:, None]
        best: Found | None = None
        for first in range(0, len(train), width):
            last = min(first + width, len(train))
            padded = math.ceil((last - first) / FOLD) * FOLD
            table = buffer[: len(chunk) * padded].view(len(chunk), padded)
            table[:, last - first :] = -torch.inf
            products = table[:, : last - first]
            if gpu is None:
                np.matmul(chunk, train[first:last].T, out=products.numpy())
            else:
                torch.mm(torch.from_numpy(chunk).to(where), gpu[first:last].T, out=products)
            if metric == "cosine":
                products *= by_train[first:last]
            else:
                products += by_train[first:last]
            if queries is None:
                own = range(max(start, first), min(rows.stop, last))
                products[[row - start for row in own], [row - first for row in own]] = -torch.inf
            best = _merged(best, table, first, min(k, last - first), k)
        assert best is not None
        similarity: Float32Array = best[0].cpu().numpy()
        if metric == "euclidean":
            similarity -= (length**2 / 2).astype(np.float32)[:, None]
        yield rows, similarity, best[1].cpu().numpy()


def lengths(features: Float32Array) -> Float32Array:
    """The Euclidean length of each row: float32 [n], also where the squares leave float32; raises FkdError where it does."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: Float32Array = np.sqrt(np.einsum("nd,nd->n", features, features))
        odd = np.flatnonzero(~((found > 1e-15) & (found < 1e19)))
        found[odd] = np.sqrt(np.square(features[odd], dtype=np.float64).sum(axis=1))
    if not np.isfinite(found).all():
        raise FkdError(f"features with values up to {np.abs(features[odd]).max():.3g} are too long for float32; scale them")
    return found


def _inverse(values: Float32Array) -> Float32Array:
    some = values > np.finfo(np.float32).tiny
    inverse: Float32Array = np.where(some, 1 / np.where(some, values, 1), 0).astype(np.float32)
    return inverse


def _merged(best: Found | None, table: torch.Tensor, first: int, most: int, k: int) -> Found:
    """The k best of those found before and of a block's products [Q, W], largest first; `first` is the block's first row.

    Each of the k largest lies in one of the k columns of largest maximum, once the row is folded into FOLD lines: reading
    only those takes half the time.
    """
    columns = table.shape[1] // FOLD
    if columns > most:
        folded = table.view(len(table), FOLD, columns)
        _, column = folded.amax(dim=1).topk(most, dim=1, sorted=False)
        rows = (column[:, None] + torch.arange(0, table.shape[1], columns, device=table.device)[:, None]).flatten(1)
        values, order = table.gather(1, rows).topk(most, dim=1)
        rows = rows.gather(1, order)
    else:
        values, rows = table.topk(most, dim=1)
    rows += first
    if best is None:
        return values, rows
    values, rows = torch.cat([best[0], values], dim=1), torch.cat([best[1], rows], dim=1)
    values, order = values.topk(min(k, values.shape[1]), dim=1)
    return values, rows.gather(1, order)
