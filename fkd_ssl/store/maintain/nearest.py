"""Finds the nearest stored crops of other images by the cosine of a teacher's targets."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fkd_ssl.arrays import Float32Array
from fkd_ssl.errors import RequestError
from fkd_ssl.store.column import Column

_BLOCK = 2**23  # values that are decoded at once


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A nearby crop of another image."""

    row: int
    crop: int
    cosine: float


def nearest(
    column: Column,
    targets: Float32Array,
    *,
    count: int,
    crops: int,
    without: int,
    done: Callable[[int], object] = lambda n: None,
) -> list[list[Neighbour]]:
    """Finds the nearest crops of each target by cosine, at most one per image.

    It reads all finished shards, with one shard in memory at a time.

    Args:
        column: The column to search.
        targets: float32 [m, *shape].
        count: Number of neighbours per target.
        crops: Number of crops to search per image, the first ones.
        without: Row of an image to exclude.
        done: Called with the number of images that were searched.

    Returns:
        The neighbours of each target, nearest first; fewer than `count` if there are fewer images.
    """
    if not 1 <= crops <= column.store.crops_per_image:
        raise RequestError(f"crops {crops}: {column.store.folder} holds {column.store.crops_per_image} crops of each image")
    unit = _normalised(targets)
    cosines = np.zeros((len(unit), 0), dtype=np.float32)
    found = np.zeros((len(unit), 0, 2), dtype=np.int64)  # row and crop
    readable = column.rows[column.rows != without]
    block = max(1, _BLOCK // column.meta.target.size)
    for shard, here_rows, within in column.store.by_shard(readable):
        rows = readable[here_rows]
        codes = np.asarray(column.shard(shard)[within, :crops])
        flat = codes.reshape(-1, codes.shape[-1])
        parts = [unit @ _normalised(column.codec.decode(flat[k : k + block])).T for k in range(0, len(flat), block)]
        here = np.concatenate(parts, axis=1).reshape(len(unit), *codes.shape[:2])
        best = here.argmax(axis=2)
        cosines = np.concatenate([cosines, np.take_along_axis(here, best[:, :, None], axis=2)[:, :, 0]], axis=1)
        places = np.stack([np.broadcast_to(rows, best.shape), best], axis=2)
        found = np.concatenate([found, places], axis=1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        cosines = np.take_along_axis(cosines, order, axis=1)
        found = np.take_along_axis(found, order[:, :, None], axis=1)
        done(len(rows))
    return [
        [Neighbour(row=int(row), crop=int(crop), cosine=float(c)) for (row, crop), c in zip(places, near, strict=True)]
        for places, near in zip(found, cosines, strict=True)
    ]


def _normalised(vectors: Float32Array) -> Float32Array:
    vectors = vectors.reshape(len(vectors), -1)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Float32Array = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit
