"""Subset: copies the first crops, some columns or some images of a store into a new store. Needs no teacher."""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from fkd_ssl import files, locks
from fkd_ssl.arrays import Int64Array
from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.column import MAX_ARRAY, Column
from fkd_ssl.store.listing import IMAGES, SIZES
from fkd_ssl.store.reader import Store
from fkd_ssl.store.remote import naming_url
from fkd_ssl.store.write import creation

Rows = Int64Array
_PIECE = 2**26  # bytes that are copied at once
_AHEAD = 4  # shards whose sources are fetched ahead


def subset(
    store: Store,
    out: str | Path,
    *,
    crops: int | None = None,
    column: Sequence[str] | None = None,
    paths: Sequence[str] | None = None,
) -> Store:
    """Copies a part of a store into `out`, which appears when it is complete. If the call is killed, call it again to continue.

    The copied data is compared with its checksums, and the source is not changed. The records are identical to those of a
    store precomputed with the same seed, recipe, images and this number of crops. The codes are those of the source: running
    the teacher on fewer crops would divide them into other chunks, so that the last bits would differ.

    Args:
        store: The source. The shards that contain the part must be finished.
        out: The new store.
        crops: Copy only this many crops per image, the first ones.
        column: Copy only these columns. Default: all; an empty list copies the crops only.
        paths: Copy only these images, as listed in images.txt, in any order.

    Raises:
        RequestError: The source has fewer crops or lacks an image or a column, or `out` has other contents.
        StoreError: The source is damaged, or a shard that is needed is not finished.
    """
    with naming_url(store.remote):
        part = Part(store, crops=crops, column=column, paths=paths)
        out = Path(out).resolve()  # a temporary folder is named after it, and '.' has no name
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not part.is_in(out):
                raise RequestError(f"{out}: exists and is not this subset; choose another --out")
            return Store(out)
        part.require()
        with atomic_folder(out) as folder:
            part.write(folder)
        return Store(out)


class Part:
    """A part of a store. Arguments and errors are those of `subset`."""

    def __init__(
        self,
        store: Store,
        *,
        crops: int | None = None,
        column: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
    ) -> None:
        m = store.manifest
        self.store = store
        self.crops = m.crops_per_image if crops is None else crops
        if not 1 <= self.crops <= m.crops_per_image:
            raise RequestError(f"--crops {crops}: {store.folder} holds {m.crops_per_image} of each image")
        if column is None and (broken := store.broken_columns()):
            raise StoreError(f"{broken[0]}; or name the columns to copy (--column)")
        names = store.column_names if column is None else list(dict.fromkeys(column))
        absent = sorted(set(names) - set(store.column_names))
        if absent:
            raise RequestError(f"{store.folder}: no targets of {absent[0]!r}; there are {store.column_names or 'none'}")
        self.columns = [store.column(name) for name in names]
        self.rows = _rows(store, paths)
        self._listing = store.paths.take(self.rows).lines
        sizes = np.ascontiguousarray(store.sizes[self.rows])
        self._sizes = files.npy_header(sizes.dtype, sizes.shape) + sizes.tobytes()
        self.manifest = replace(
            m,
            crops_per_image=self.crops,
            count=len(self.rows),
            images_sha256=files.sha256(self._listing),
            sizes_sha256=files.sha256(self._sizes),
            extensions=(),
        )

    def is_in(self, folder: Path) -> bool:
        """Whether a folder is the finished copy of this part."""
        try:
            there = Store(folder)
            digests = {name: there.column(name).digest for name in there.column_names}
        except StoreError:
            return False
        return there.manifest == self.manifest and digests == {column.name: column.digest for column in self.columns}

    def require(self) -> None:
        """Raises StoreError if a shard that is needed is not finished."""
        for shard in np.unique(self.store.manifest.shards_of(self.rows)).tolist():
            path = layout.crops_file(self.store.folder, shard)
            if not self.store.has_crops(shard):
                raise StoreError(f"{path}: this shard is not finished; run the same fkd-ssl precompute again")
            for column in self.columns:
                try:
                    column.require(shard)
                except StoreError as error:
                    raise StoreError(f"{error}, or leave out {column.name}") from error

    def write(self, folder: Path, *, beside: str | None = None) -> None:
        """Writes the missing files of the part.

        Args:
            folder: A folder of `atomic_folder`.
            beside: Name of another column that the folder may have.

        Raises:
            RequestError: The folder has other contents.
            StoreError: The source is damaged.
        """
        for name in (layout.CROPS, layout.TARGETS):
            (folder / name).mkdir(exist_ok=True)
        columns = {path.name for path in (folder / layout.TARGETS).iterdir()} - {column.name for column in self.columns}
        if columns - {beside}:
            raise RequestError(_other(folder))
        try:
            self.manifest.write(folder)
        except StoreError as error:
            raise RequestError(_other(folder)) from error
        for name, data in ((IMAGES, self._listing), (SIZES, self._sizes)):
            _write(folder, folder / name, data)
        for column in self.columns:
            place = folder / layout.TARGETS / column.name
            place.mkdir(exist_ok=True)
            for name, data in _column_files(column):
                _write(folder, place / name, data)
        total, missing = self.manifest.shards, [s for s in range(self.manifest.shards) if not self._copied(folder, s)]
        ahead = self.store.prefetcher(self.columns)
        for k, shard in enumerate(tqdm(missing, total=total, initial=total - len(missing), desc="copy", unit="shard")):
            if self.store.remote is not None:
                near = np.concatenate([self.rows[np.asarray(self.manifest.shard_rows(s))] for s in missing[k : k + _AHEAD]])
                ahead.expect(np.unique(self.store.manifest.shards_of(near)).tolist())
            rows = self.rows[np.asarray(self.manifest.shard_rows(shard))]
            self._copy_crops(folder, shard, rows)
            for column in self.columns:
                self._copy_codes(column, folder, shard, rows)

    def _copied(self, folder: Path, shard: int) -> bool:
        codes = [layout.codes_file(folder, column.name, shard) for column in self.columns]
        return all(path.with_suffix(".json").exists() for path in (layout.crops_file(folder, shard), *codes))

    def _copy_crops(self, folder: Path, shard: int, rows: Rows) -> None:
        if layout.crops_file(folder, shard).with_suffix(".json").exists():
            return
        store = self.store
        parts = _gather(store, rows, store.crops_file, store.crops_sidecar, CROP_DTYPE, (self.crops,))
        checksums = [""] * len(rows)
        for source, here, within in store.by_shard(rows):
            of_shard = store.crops_sidecar(source)["images"]
            for place, k in zip(here.tolist(), within.tolist(), strict=True):
                checksums[place] = of_shard[k]
        creation.write_crops(folder, self.manifest, shard, np.concatenate([*parts]), checksums)

    def _copy_codes(self, column: Column, folder: Path, shard: int, rows: Rows) -> None:
        if layout.codes_file(folder, column.name, shard).with_suffix(".json").exists():
            return
        dtype, shape = np.dtype(np.uint8), (self.crops, column.meta.code_size)
        parts = _gather(self.store, rows, column.file, column.sidecar, dtype, shape)
        write = functools.partial(files.write_npy_parts, dtype=dtype, shape=(len(rows), *shape), parts=parts)
        creation.write_codes(folder, self.manifest, shard, write, column=column.name, digest=column.digest)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields a folder that becomes `target` if the block ends without an error. After a kill, the next call continues in it.

    Raises:
        RequestError: Another process is writing it now.
    """
    folder = target.with_name(f".unfinished-{target.name}")
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not locks.try_lock(handle):
            raise RequestError(f"{target}: another process is writing it; wait for it")
        for left in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            files.remove_leftovers(left, seconds=0)  # of a killed call; no other process writes here
        try:
            yield folder
        except BaseException:
            with suppress(OSError):
                folder.rmdir()  # fails if it has contents to continue from
            raise
        if target.exists():
            target.rmdir()  # it is empty, since other contents were rejected
        folder.rename(target)
        files.sync_folder(target.parent)
    finally:
        os.close(handle)


def _rows(store: Store, paths: Sequence[str] | None) -> Rows:
    """Returns the rows of some images in the order of their names, like those of a new store."""
    if paths is None:
        rows = np.arange(store.manifest.count)
    else:
        rows = store.paths.positions(paths)
        absent = np.flatnonzero(rows < 0).tolist()
        if absent:
            raise RequestError(
                f"{store.folder}: lacks {len(absent)} of the requested images, for instance {paths[absent[0]]!r}"
            )
        if not len(rows):
            raise RequestError("the list of images is empty")
        rows = np.unique(rows)
    order, _ = store.paths.take(rows).order()
    return rows if order is None else rows[order]


def _other(folder: Path) -> str:
    return f"{folder}: holds other unfinished work; delete this folder, or choose another --out"


def _write(folder: Path, path: Path, data: bytes) -> None:
    """Writes a file of `folder`. Raises RequestError if it exists with other contents."""
    try:
        with files.create(path) as file:
            file.write(data)
    except StoreError as error:
        raise RequestError(_other(folder)) from error


def _column_files(column: Column) -> Iterator[tuple[str, bytes]]:
    """Yields name and bytes of meta.json and of each array. Raises StoreError if they changed since the column was opened."""
    path = column.folder / "meta.json"
    values = files.read_json(path)
    if files.sha256(files.canonical(values)) != column.digest:
        raise StoreError(f"{path}: changed since the store was opened; repeat the command")
    yield path.name, files.with_checksum(values)
    for name, digest in column.meta.arrays.items():
        path = column.folder / f"{name}.npy"
        data = files.read_regular(path, MAX_ARRAY + files.MAX_HEADER)
        if files.sha256(data) != digest:
            raise StoreError(f"{path}: damaged: its sha256 differs from the one in meta.json; restore it from a backup")
        yield path.name, data


def _gather(
    store: Store,
    rows: Rows,
    locate: Callable[[int], Path],
    sidecar: Callable[[int], dict[str, Any]],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> Iterator[npt.NDArray[Any]]:
    """Yields the first crops of some rows, each part of the given `shape` without its first axis, from the files of shards.

    Raises:
        StoreError: A checksum differs.
    """
    crops, *crop_shape = shape
    arrays = {}
    for shard, _, _ in store.by_shard(rows):
        path = locate(shard)
        count = len(store.manifest.shard_rows(shard))
        arrays[shard] = files.map_npy(path, dtype, (count, store.crops_per_image, *crop_shape))
        if files.sha256_file(path) != sidecar(shard)["file"]:
            raise StoreError(
                f"{path}: damaged: its sha256 differs from the one in its .json; fkd-ssl verify {store.folder} says more"
            )
    step = max(1, _PIECE // (math.prod(shape) * dtype.itemsize))
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        found = np.empty((len(some), *shape), dtype=dtype)
        for shard, here, within in store.by_shard(some):
            found[here] = arrays[shard][within, :crops]
        yield found
