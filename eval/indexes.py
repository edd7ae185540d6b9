"""faiss indexes of a gallery: how many of the exact neighbours they find, how fast, and in how many bytes.

The similarity is the cosine: vectors are normalised and compared by inner product. An index is built from the features each
time and never read from a file, since faiss trusts what it reads.

Legend: `N` images in the gallery, `D` feature dimension, `Q` queries.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.errors import RequestError
from fkd_ssl.eval import search

IndexKind = Literal["exact", "hnsw", "ivfflat", "ivfpq"]
KINDS: dict[str, tuple[int, ...]] = {
    "exact": (0,),
    "hnsw": (16, 32, 64, 128, 256, 512),
    "ivfflat": (1, 2, 4, 8, 16, 32, 64),
    "ivfpq": (1, 2, 4, 8, 16, 32, 64),
}
"""Name -> search efforts of the curve, in ascending order: HNSW's efSearch, or the number of lists that IVF searches."""
DEFAULT_EFFORT = {"exact": 0, "hnsw": 128, "ivfflat": 16, "ivfpq": 16}

_HNSW_LINKS, _HNSW_BUILD_EFFORT = 32, 80
_IMAGES_PER_LIST = 39  # faiss recommends this many training vectors per centroid


@dataclass(frozen=True)
class GalleryIndex:
    """An index of a gallery; `faiss` is None for exact search."""

    kind: str
    unit: Float32Array
    """The gallery, float32 [N, D] of length 1."""
    faiss: Any

    def search(self, queries: Float32Array, k: int, effort: int | None = None) -> tuple[Float32Array, Int64Array]:
        """Similarities float32 [Q, k], largest first, and rows int64 [Q, k], with -1 for not found."""
        if self.faiss is None:
            parts = list(search.nearest(self.unit, queries, min(k, len(self.unit))))
            return np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])
        effort = DEFAULT_EFFORT[self.kind] if effort is None else effort
        if self.kind == "hnsw":
            self.faiss.hnsw.efSearch = max(effort, k)
        else:
            self.faiss.nprobe = min(effort, self.faiss.nlist)
        similarity, rows = self.faiss.search(normalised(queries), k)
        return similarity, rows.astype(np.int64)

    def bytes_per_vector(self) -> float:
        """Size of the index in a file, divided by the number of images."""
        import faiss

        return self.unit.shape[1] * 4.0 if self.faiss is None else faiss.serialize_index(self.faiss).nbytes / len(self.unit)


def normalised(features: Float32Array) -> Float32Array:
    """Scales rows to length 1; rows of zeros do not change."""
    length = search.lengths(features)
    unit: Float32Array = (features / np.where(length > 0, length, 1)[:, None]).astype(np.float32)
    return unit


def build(gallery: Float32Array, kind: IndexKind) -> GalleryIndex:
    """An index of finite features float32 [N, D]; raises RequestError if the gallery is too small for the kind."""
    if kind not in KINDS:
        raise RequestError(f"index {kind!r}: expected {', '.join(KINDS)}")
    unit = normalised(gallery)
    count, dim = unit.shape
    if kind == "exact":
        return GalleryIndex(kind, unit, None)
    import faiss

    index: Any
    lists = max(1, min(int(4 * math.sqrt(count)), count // _IMAGES_PER_LIST))
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _HNSW_BUILD_EFFORT
    elif kind == "ivfflat":
        index = faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    else:
        bits = 8 if count >= 256 else 4
        if count < 2**bits:
            raise RequestError(f"index ivfpq: {count} images in the gallery; product quantisation needs at least {2**bits}")
        pieces = max(m for m in range(1, max(1, dim // 8) + 1) if dim % m == 0)
        index = faiss.index_factory(dim, f"IVF{lists},PQ{pieces}x{bits}", faiss.METRIC_INNER_PRODUCT)
        index.do_polysemous_training = False  # takes seconds, and this search does not use it
        index.pq.cp.min_points_per_centroid = 1
    if kind != "hnsw":
        index.cp.min_points_per_centroid = 1  # otherwise faiss warns about small galleries
        index.train(unit)
    index.add(unit)
    return GalleryIndex(kind, unit, index)


def curve(
    gallery: Float32Array, queries: Float32Array, *, kinds: Sequence[str] = tuple(KINDS), k: int = 10, seconds: float = 0.5
) -> list[dict[str, Any]]:
    """Recall of the exact k neighbours and speed of each index at each effort, as in ann-benchmarks.

    Args:
        gallery: Finite, float32 [N, D].
        queries: Finite, float32 [Q, D].
        kinds: Names in KINDS.
        k: Neighbours to find.
        seconds: Time for which queries are repeated to measure their speed.

    Returns:
        `index`, `effort`, `recall` in percent, `queries_per_second`, `bytes_per_vector`, `build_seconds`.
    """
    k = min(k, len(gallery))
    exact, _ = build(gallery, "exact").search(queries, k)
    rows = []
    for kind in kinds:
        started = time.perf_counter()
        index = build(gallery, kind)  # type: ignore[arg-type]  # checked there
        built = time.perf_counter() - started
        size = index.bytes_per_vector()
        for effort in KINDS[kind]:
            _, found = index.search(queries, k, effort)
            started, rounds = time.perf_counter(), 0
            while rounds == 0 or time.perf_counter() - started < seconds:
                index.search(queries, k, effort)
                rounds += 1
            speed = rounds * len(queries) / (time.perf_counter() - started)
            rows.append(
                {
                    "index": kind,
                    "effort": effort,
                    "recall": 100 * _recall(index.unit, normalised(queries), found, exact),
                    "queries_per_second": speed,
                    "bytes_per_vector": size,
                    "build_seconds": built,
                }
            )
    return rows


def _recall(unit: Float32Array, queries: Float32Array, found: Int64Array, exact: Float32Array) -> float:
    """The share of the k results that are at least as similar as the exact k-th neighbour, as in ann-benchmarks."""
    threshold = exact[:, -1:] - 1e-6
    near = np.einsum("qkd,qd->qk", unit[found], queries) >= threshold
    return float((near & (found >= 0)).mean())
