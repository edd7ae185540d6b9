"""Retrieval: how many of a query's nearest images have its class.

- recall@k: the share of queries with an image of their class among the k nearest.
- precision@k: the share of the k nearest images that have the query's class, averaged over queries.
- mAP@R (Musgrave et al., "A Metric Learning Reality Check", ECCV 2020, arXiv 2003.08505, section 3.2): the sum of precision@i
  over those i up to R whose image has the query's class, divided by R and averaged over queries. R is the number of gallery
  images of the class.

Legend: `N` images in the gallery, `n` queries, `D` feature dimension, `Q` queries in a chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fkd_ssl.arrays import BoolArray, Float32Array, Int64Array
from fkd_ssl.errors import RequestError
from fkd_ssl.eval import search
from fkd_ssl.eval.scores import as_features, as_labels, compact, feature_notes, require_two_classes, same_dimension

DEPTHS = (1, 5, 10)

Search = Callable[[Float32Array, int], tuple[Float32Array, Int64Array]]
"""Maps queries [Q, D] and k to similarities [Q, k], in descending order, and rows of the gallery [Q, k]; -1 is not found."""

_CHUNK = 1024


def evaluate(
    *,
    gallery: Any,
    gallery_labels: Any,
    queries: Any = None,
    labels: Any = None,
    approximate: Search | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Scores a search for queries in a gallery by cosine.

    Args:
        gallery: Array or tensor [N, D].
        gallery_labels: Array or tensor [N] of integers from 0.
        queries: Array or tensor [n, D]; None searches for each gallery image among the others.
        labels: Array or tensor [n] of labels that occur in the gallery.
        approximate: Search of an index of the gallery; exact search by default.
        device: Where the exact search runs.

    Returns:
        `recall` and `precision`, each by k (`"1"`, `"5"`, `"10"`), and `map_at_r`, all in percent; `correct` bool [n], whether
        the nearest image has the query's class; `n_gallery`, `n_queries`, `classes`, `feature_dim`, `notes`.

    Raises:
        RequestError: Shapes or labels are invalid, or no query has an image to find.
        FkdError: A feature is not finite.
    """
    base = as_features(gallery, "gallery")
    known = as_labels(gallery_labels, len(base), "gallery_labels")
    if queries is None:
        if len(base) < 2:
            raise RequestError("gallery: has one image; at least two are needed without queries")
        wanted, truth = None, known
    else:
        wanted = as_features(queries, "queries")
        same_dimension(base, wanted)
        truth = as_labels(labels, len(wanted), "labels")
    require_two_classes(known, "gallery_labels")
    known, truth, names = compact(known, truth)
    relevant = np.bincount(known)[truth] - (wanted is None)  # R of each query
    if not relevant.any():
        raise RequestError("gallery: every class has one image, so there is nothing to find without queries")
    available = len(base) - (wanted is None)
    k = min(max(int(relevant.max()), *DEPTHS), available)
    recall, precision = (np.zeros((len(DEPTHS), len(truth))) for _ in range(2))
    mean_precision = np.zeros(len(truth))
    for rows, neighbours in _neighbours(base, wanted, k, approximate, device):
        hit: BoolArray = (known[neighbours] == truth[rows, None]) & (neighbours >= 0)
        for place, depth in enumerate(DEPTHS):
            recall[place, rows] = hit[:, :depth].any(axis=1)
            precision[place, rows] = hit[:, :depth].sum(axis=1) / depth
        within = hit & (np.arange(k) < relevant[rows, None])
        at = np.cumsum(within, axis=1) / np.arange(1, k + 1)
        mean_precision[rows] = (at * within).sum(axis=1) / np.maximum(relevant[rows], 1)
    searched = relevant > 0
    notes = feature_notes(base, wanted)
    notes += (
        [] if searched.all() else [f"{int((~searched).sum())} images are the only ones of their class and are not searched for"]
    )
    if available < max(DEPTHS):
        notes.append(f"precision@10 is below 100 by definition: only {available} images can be found")
    return {
        "recall": {str(depth): 100 * float(row[searched].mean()) for depth, row in zip(DEPTHS, recall, strict=True)},
        "precision": {str(depth): 100 * float(row[searched].mean()) for depth, row in zip(DEPTHS, precision, strict=True)},
        "map_at_r": 100 * float(mean_precision[searched].mean()),
        "correct": recall[0, searched] > 0,
        "n_gallery": len(base),
        "n_queries": int(searched.sum()),
        "classes": len(names),
        "feature_dim": base.shape[1],
        "notes": notes,
    }


def _neighbours(
    base: Float32Array, wanted: Float32Array | None, k: int, approximate: Search | None, device: torch.device | str
) -> Iterator[tuple[slice, Int64Array]]:
    if approximate is None:
        for rows, _, neighbours in search.nearest(base, wanted, k, device=device):
            yield rows, neighbours
        return
    queries = base if wanted is None else wanted
    for start in range(0, len(queries), _CHUNK):
        rows = slice(start, min(start + _CHUNK, len(queries)))
        _, neighbours = approximate(queries[rows], k + (wanted is None))
        yield rows, neighbours if wanted is not None else _without_self(neighbours, np.arange(rows.start, rows.stop), k)


def _without_self(neighbours: Int64Array, own: Int64Array, k: int) -> Int64Array:
    """Removes each query's own image from its neighbours [Q, k + 1]: int64 [Q, k]."""
    last = np.argsort(neighbours == own[:, None], axis=1, kind="stable")
    found: Int64Array = np.take_along_axis(neighbours, last, axis=1)[:, :k]
    return found
