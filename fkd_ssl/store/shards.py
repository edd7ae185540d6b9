"""Reads crops from shard files by position, without memory maps, which bounds the memory and the number of open files.

A memory map kills the process if its disk disappears, keeps its file open (a store of ImageNet has 2,504 files), and its pages
count as memory of the process.
"""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fkd_ssl import files
from fkd_ssl.arrays import Int64Array
from fkd_ssl.errors import StoreError

Index = slice | Int64Array
MAX_OPEN_FILES = 128  # per reader; many systems limit a process to 1024 open files


class _OpenFile:
    """A descriptor that is closed when the last thread has released it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = files.open_descriptor(path)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # opening may have failed
            os.close(self.descriptor)


@dataclass(frozen=True)
class _Shard:
    """A shard with a valid header."""

    path: Path
    offset: int
    size: int


class ShardFiles:
    """The .npy files [rows, C, ...] of all shards of one kind.

    Args:
        locate: Returns the file of a shard, after it is fetched, and its number of rows. Raises StoreError if the shard is not
            finished.
        dtype: dtype of the arrays.
        row_shape: Shape of a row: C, and the shape of a crop.
    """

    def __init__(self, locate: Callable[[int], tuple[Path, int]], dtype: np.dtype[Any], row_shape: tuple[int, ...]) -> None:
        self._locate = locate
        self._dtype = dtype
        self._row_shape = row_shape
        self._crop_bytes = math.prod(row_shape[1:]) * dtype.itemsize
        self._known: dict[int, _Shard] = {}
        self._open: dict[int, _OpenFile] = {}  # in the order of opening

    def map(self, shard: int) -> npt.NDArray[Any]:
        """Maps a whole shard into memory. Raises StoreError if its file is not such an array."""
        path, rows = self._locate(shard)
        return files.map_npy(path, self._dtype, (rows, *self._row_shape))

    def read(self, shard: int, within: int, index: Index) -> npt.NDArray[Any]:
        """Reads the crops `index` of row `within` of a shard: [m, ...], read-only.

        Raises:
            IndexError: A crop does not exist.
            StoreError: The file is missing, cannot be read, is not such an array, or was truncated after it was opened.
        """
        unit, crops, parts = self._crop_bytes, self._row_shape[0], []
        try:
            file = self._open.get(shard) or self._enter(shard)
            known = self._known[shard]
            for first, count in _runs(index, crops):
                part = os.pread(file.descriptor, count * unit, known.offset + (within * crops + first) * unit)
                if len(part) != count * unit:
                    raise StoreError(f"{known.path}: became shorter since it was opened; run fkd-ssl verify")
                parts.append(part)
        except OSError as error:
            raise StoreError(f"{self._locate(shard)[0]}: cannot be read: {error.strerror}") from error
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return np.frombuffer(data, dtype=self._dtype).reshape(-1, *self._row_shape[1:])

    def _enter(self, shard: int) -> _OpenFile:
        """Opens a shard's file, checks its header the first time, and releases the oldest open file if there are too many."""
        known = self._known.get(shard)
        if known is None or not known.path.exists():  # a fetched file can be removed from the cache
            path, rows = self._locate(shard)
            file = _OpenFile(path)
            with os.fdopen(os.dup(file.descriptor), "rb") as reader:
                offset, _ = files.npy_body(reader, path, self._dtype, (rows, *self._row_shape))
                self._known[shard] = _Shard(path, offset, os.fstat(file.descriptor).st_size)
        else:
            file = _OpenFile(known.path)
            if os.fstat(file.descriptor).st_size != known.size:
                raise StoreError(f"{known.path}: its size changed since it was first read; run fkd-ssl verify")
        while len(self._open) >= MAX_OPEN_FILES:
            with suppress(KeyError, StopIteration, RuntimeError):  # another thread did it
                del self._open[next(iter(self._open))]
        self._open[shard] = file
        return file


def _runs(index: Index, crops: int) -> list[tuple[int, int]]:
    """Returns the crops `index` as contiguous runs in the file: first crop and number of crops of each run."""
    if isinstance(index, slice):
        chosen = range(crops)[index]
        if chosen.step == 1:
            return [(chosen.start, len(chosen))]
        positions = list(chosen)
    else:
        positions = np.arange(crops)[index].tolist()
    runs: list[tuple[int, int]] = []
    for position in positions:
        first, count = runs[-1] if runs else (0, 0)
        if count and position == first + count:
            runs[-1] = (first, count + 1)
        else:
            runs.append((position, 1))
    return runs
