"""Precompute: runs teachers once on every stored crop of every image, and writes their targets into columns of a store.

A shard is a pure function of images, recipe, seed, teacher and codec. Its crops are divided, in order, into chunks of a fixed
size. A teacher runs on one chunk at a time, and a killed run resumes at a chunk.
"""

import functools
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fkd_ssl import files
from fkd_ssl.arrays import Float32Array
from fkd_ssl.crops import CROP_DTYPE, IMPORTED, Recipe
from fkd_ssl.errors import RequestError
from fkd_ssl.images import ImageSource
from fkd_ssl.progress import hidden
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.listing import MANIFEST
from fkd_ssl.store.reader import MAX_ARRAY, Column, Store
from fkd_ssl.store.write import advice, work
from fkd_ssl.store.write.columns import Request, check_sample, open_or_train, sample_targets
from fkd_ssl.store.write.publish import create_store, publish_codes, require_space
from fkd_ssl.store.write.recording import recorded_bytes, require_not_recording
from fkd_ssl.store.write.rows import Row, RowReader, Teacher, image_checksums, publish_crops
from fkd_ssl.store.write.streams import TeacherStream, feed
from fkd_ssl.text import format_bytes


@dataclass(frozen=True, kw_only=True)
class Share:
    """A process's share of the shards: every `of`-th shard, starting at `index`."""

    index: int
    of: int
    steal: bool = False
    """Whether to continue with the shards of other processes that are not begun, after its own."""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise RequestError(f"--shards {self.index}/{self.of}: i/n with i from 0 to n - 1 is expected, for instance 0/4")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Result of `precompute`."""

    shards: int
    """Number of shards of the store."""
    busy: list[int]
    """Shards that another process is writing now."""
    left: list[int]
    """Unfinished shards that belong to other shares."""
    crops: int
    """Number of crops that the teachers saw in this call, without those for training a codec."""
    seconds: float
    """Wall-clock time of this call."""
    store_bytes: int
    """Total bytes of the files of the store."""


def precompute(
    images: ImageSource,
    folder: str | Path,
    teacher: Teacher | Sequence[Teacher],
    *,
    crops: int = 400,
    recipe: Recipe,
    codec: str | None = None,
    pixels: int | Sequence[int],
    seed: int = 0,
    limit: int | None = None,
    chunk_size: int = 128,
    name: str | Sequence[str] | None = None,
    skip_unreadable: bool = False,
    threads: int = 2,
    device: str | None = None,
    share: Share | None = None,
    progress: bool = True,
    log: Callable[[str], None] = lambda message: None,
) -> Summary:
    """Writes the targets of teachers into the store `folder`, which is created if it does not exist.

    After a kill, call it again with the same arguments to continue. Several processes can write one store. With several
    teachers, each image is read and decoded once, and its crops are replayed once per size.

    Args:
        images: The image set.
        folder: The store.
        teacher: The frozen network, or several.
        crops: Number of crops per image C; fixed when the store is created.
        recipe: Recipe that the crops are drawn from; fixed when the store is created.
        codec: Codec of each column: a faiss factory string for embeddings, one of FKD's names for class probabilities. Default:
            SQ8 for embeddings, marginal_smoothing_k5 for class probabilities (full for up to 10 classes).
        pixels: Side of the crops that the teachers see: one for all, or one per teacher.
        seed: Seed of the crops.
        limit: Use only this many images, the first in hash order.
        chunk_size: Number of crops per forward pass of a teacher.
        name: Name of each teacher's column. Default: the teacher's name.
        skip_unreadable: Skip images that cannot be decoded, and record this in the store, instead of stopping.
        threads: Number of threads that read, decode and replay while the teacher runs.
        device: torch device that makes the crops. Default: the threads make them. The pixels are the same.
        share: The shards that this process writes. Default: all.
        progress: Whether to show a progress bar.
        log: Called with each line for the user.

    Raises:
        RequestError: The store or the column was created with other arguments.
        ImageError: An image cannot be read, or has changed since the store's crops were drawn.
        FkdError: There is not enough disk space for the store.
    """
    started = time.perf_counter()
    requests = _requests(teacher, codec, pixels, chunk_size, name, device)
    names = [request.name for request in requests]
    images = layout.limit_images(images, limit)
    store = _begin(
        images,
        Path(folder),
        requests,
        crops=crops,
        recipe=recipe,
        seed=seed,
        skip_unreadable=skip_unreadable,
        threads=threads,
        progress=progress,
        log=log,
    )
    reader = RowReader(store, images, skip_unreadable, ahead=threads + 1, device=device)
    with ThreadPoolExecutor(threads) as pool:
        columns = open_or_train(store, requests, reader, pool, log)
        for column in columns:
            require_not_recording(column)
        missing = [shard for shard in range(store.manifest.shards) if any(shard in c.missing_shards for c in columns)]
        mine = missing if share is None else [shard for shard in missing if shard % share.of == share.index]
        others = [shard for shard in missing if shard not in mine]
        bar = tqdm(
            total=store.manifest.count * crops * len(columns),
            initial=sum(store.manifest.count - _rows(store, c.missing_shards) for c in columns) * crops,
            unit="crop",
            desc=f"precompute {', '.join(names)}",
            smoothing=0.05,
            disable=hidden(show=progress),
        )
        with bar:
            writer = _Writer(store, requests, columns, reader, pool, bar)
            busy = writer.write(mine + others if share is None or share.steal else mine)
            busy = writer.write(busy)  # the processes that wrote them may have been killed
    for column in columns:  # work files that killed processes did not remove
        for path in column.folder.glob(".work-codes-*[0-9]"):
            if (column.folder / f"{path.name.removeprefix('.work-')}.json").exists():
                work.clear(path)
    return Summary(
        shards=store.manifest.shards,
        busy=busy,
        left=[] if share is None or share.steal else [s for s in others if not _finished(store, columns, s)],
        crops=writer.seen,
        seconds=time.perf_counter() - started,
        store_bytes=files.total_bytes(store.folder),
    )


def prepare(
    images: ImageSource,
    folder: str | Path,
    teacher: Sequence[Teacher],
    *,
    crops: int,
    recipe: Recipe,
    codec: str | None,
    pixels: int,
    seed: int,
    chunk_size: int,
    skip_unreadable: bool = False,
    threads: int = 2,
    log: Callable[[str], None] = lambda message: None,
) -> list[Column]:
    """Creates a store for teachers whose targets will be recorded: everything but the codes.

    Arguments and errors are those of `precompute`. An existing column keeps its chunk_size, which is the batch size with which
    the training began.

    Returns:
        The column of each teacher, in a store that has all crops.
    """
    requests = _requests(teacher, codec, pixels, chunk_size, None, None)
    store = _begin(
        images,
        Path(folder),
        requests,
        crops=crops,
        recipe=recipe,
        seed=seed,
        skip_unreadable=skip_unreadable,
        threads=threads,
        progress=True,
        log=log,
    )
    requests = [
        replace(request, chunk_size=store.column(request.name).meta.chunk_size) if request.name in store.teachers else request
        for request in requests
    ]
    reader = RowReader(store, images, skip_unreadable, ahead=threads + 1)
    with ThreadPoolExecutor(threads) as pool:
        open_or_train(store, requests, reader, pool, log)
        there = store.shards_with_crops()
        absent = [shard for shard in range(store.manifest.shards) if shard not in there]
        with tqdm(total=_rows(store, absent), desc="crops", unit="img", disable=hidden(show=bool(absent))) as bar:
            for shard in random.sample(absent, len(absent)):  # in random order, to share them between processes
                rows = store.manifest.shard_rows(shard)
                if store.has_crops(shard):
                    bar.update(len(rows))
                else:
                    publish_crops(reader, shard, image_checksums(reader, rows, pool, bar))
    store = Store(store.folder)
    return [store.column(request.name) for request in requests]


def _requests(
    teacher: Teacher | Sequence[Teacher],
    codec: str | None,
    pixels: int | Sequence[int],
    chunk_size: int,
    name: str | Sequence[str] | None,
    device: str | None,
) -> list[Request]:
    """Returns the requested columns. Raises RequestError if one is invalid."""
    teachers = [*teacher] if isinstance(teacher, Sequence) else [teacher]
    sides = [pixels] * len(teachers) if isinstance(pixels, int) else [*pixels]
    names = [t.info.name for t in teachers] if name is None else [name] if isinstance(name, str) else [*name]
    for what, value, most in (("chunk_size", chunk_size, 2**16), *(("pixels", side, 4096) for side in sides)):
        _in_range(what, value, most)
    if not len(teachers) == len(names) == len(sides) or len(set(names)) < len(names):
        raise RequestError(
            f"{len(teachers)} teachers, columns {names}, pixels {sides}: each teacher needs one size and a name of its own "
            "(--name a,b)"
        )
    for each in (teacher.info for teacher in teachers):
        if strange := [key for key in each.arrays if not layout.COLUMN_NAME.fullmatch(f"teacher-{key}")]:
            raise RequestError(
                f"teacher {each.name}: an array named {strange[0]!r} cannot be stored; letters, digits, '.', '_' and '-' only"
            )
        size = sum(array.nbytes + files.MAX_HEADER for array in each.arrays.values())
        if size > MAX_ARRAY:
            raise RequestError(f"teacher {each.name}: its arrays have {size:,} bytes, and a column holds at most {MAX_ARRAY:,}")
    return [
        Request(
            name=layout.checked_name(n),
            teacher=t,
            codec=codec or t.info.spec.rules.default_codec(t.info.spec.shape),
            pixels=side,
            chunk_size=chunk_size,
            device=device,
        )
        for n, t, side in zip(names, teachers, sides, strict=True)
    ]


def _in_range(what: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise RequestError(f"--{what} {value}: must lie in 1 to {most}")


def _begin(
    images: ImageSource,
    folder: Path,
    requests: Sequence[Request],
    *,
    crops: int,
    recipe: Recipe,
    seed: int,
    skip_unreadable: bool,
    threads: int,
    progress: bool,
    log: Callable[[str], None],
) -> Store:
    """Announces the size of the store, then opens it, and creates it if it does not exist."""
    _in_range("crops", crops, layout.MAX_CROPS)
    if threads < 1:
        raise RequestError(f"--threads {threads}: must be at least 1")
    for request in requests:
        if not (folder / layout.TARGETS / request.name / "meta.json").exists():  # an existing column has its codec
            check_sample(request.codec, request.target, sample_targets(request.codec, request.target, len(images) * crops))
    log(_announce(folder, len(images), crops, requests))
    for request in requests:
        if warning := advice.on_size(request.target, request.codec, len(images) * crops):
            log(warning)
    store = _open_or_create(
        folder, images, seed=seed, recipe=recipe, crops=crops, skip_unreadable=skip_unreadable, progress=progress
    )
    columns = [folder / layout.TARGETS / request.name for request in requests]
    for part in (folder, folder / layout.CROPS, folder / layout.TARGETS, *columns):
        files.remove_leftovers(part)
    return store


def _open_or_create(
    folder: Path, images: ImageSource, *, seed: int, recipe: Recipe, crops: int, skip_unreadable: bool, progress: bool
) -> Store:
    if not (folder / MANIFEST).exists():
        if recipe == IMPORTED:
            raise RequestError(f"recipe {recipe.name}: is for stores made by import-fkd, and {folder} is not one")
        create_store(folder, images, seed=seed, recipe=recipe, crops=crops, skip_unreadable=skip_unreadable, progress=progress)
        return Store(folder)
    store = Store(folder)
    m = store.manifest
    for what, here, asked in (
        ("seed", m.seed, seed),
        ("crops per image", m.crops_per_image, crops),
        ("recipe", m.recipe, recipe),
    ):
        if here != asked:
            raise RequestError(f"{folder}: this store's {what} is {here}, not {asked}; give the same, or choose another folder")
    if images.names != store.paths:
        stored, given = set(store.paths), set(images.names)
        first = sorted(stored ^ given)[0]
        where = f"{images.spec} lacks" if first in stored else "the store lacks"
        raise RequestError(
            f"{folder}: a store of other images: it lists {m.count}, {images.spec} (with --limit, if any) gives "
            f"{len(images)}; {where} {first!r}. Give the same images, or choose another folder"
        )
    return store


def _announce(folder: Path, count: int, crops: int, requests: Sequence[Request]) -> str:
    """Describes what will be written. Raises FkdError, before anything is written, if there is not enough disk space."""
    sizes = [request.target.check_codec(request.codec, request.name) for request in requests]
    needed = count * crops * (CROP_DTYPE.itemsize + sum(sizes))
    own = [*(folder / layout.CROPS).glob("*.npy")]
    recorded = 0
    for request in requests:
        column = folder / layout.TARGETS / request.name
        own += column.glob("codes-*.npy")
        recorded += recorded_bytes(column)
    missing = needed - recorded - sum(path.stat().st_size for path in own)
    free = require_space(folder, missing, "choose a smaller --codec (SQ4, PQ16x8) or fewer --crops")
    shards = -(-count // layout.ROWS_PER_SHARD)
    each = " and ".join(
        f"{count * crops:,} targets of {request.name!r} at {size}" for request, size in zip(requests, sizes, strict=True)
    )
    return (
        f"{count:,} images x {crops} crops = {each} + {CROP_DTYPE.itemsize} bytes: "
        f"{format_bytes(needed)} in {shards} shards; {format_bytes(free)} free on the disk"
    )


def _rows(store: Store, shards: Sequence[int]) -> int:
    return sum(len(store.manifest.shard_rows(shard)) for shard in shards)


def _finished(store: Store, columns: Sequence[Column], shard: int) -> bool:
    """Whether a shard now has its crops and the codes of every column."""
    sidecars = [layout.codes_file(store.folder, c.name, shard).with_suffix(".json") for c in columns]
    return store.has_crops(shard) and all(path.exists() for path in sidecars)


class _Writer:
    """Writes shards of some columns.

    Attributes:
        seen: Number of crops that the teachers saw.
    """

    def __init__(
        self,
        store: Store,
        requests: Sequence[Request],
        columns: Sequence[Column],
        reader: RowReader,
        pool: ThreadPoolExecutor,
        bar: Any,
    ) -> None:
        self.seen = 0
        self._store = store
        self._requests = requests
        self._columns = columns
        self._reader = reader
        self._pool = pool
        self._bar = bar
        self._counted = {(c.name, s) for c in columns for s in range(store.manifest.shards)} - {
            (c.name, s) for c in columns for s in c.missing_shards
        }

    def write(self, shards: Sequence[int]) -> list[int]:
        """Completes these shards; returns those with a column that another process is writing now."""
        return [shard for shard in shards if not self._shard(shard)]

    def _shard(self, shard: int) -> bool:
        """Writes the columns of a shard that no other process is writing. Returns whether the shard is finished."""
        store, m = self._store, self._store.manifest
        rows, per_row = m.shard_rows(shard), m.crops_per_image
        with ExitStack() as stack:
            held: list[tuple[Column, work.WorkFile, int]] = []
            streams = []
            for request, column in zip(self._requests, self._columns, strict=True):
                codes = layout.codes_file(store.folder, column.name, shard)
                if codes.with_suffix(".json").exists():  # another process may have finished it since we looked
                    self._count(column, shard, len(rows) * per_row)
                    continue
                unit, there = column.meta.code_size, len(rows) * per_row
                progress = stack.enter_context(
                    work.open_work(work.shard_file(codes), column.digest, unit=unit, crops=there, per_row=per_row)
                )
                if progress is None or codes.with_suffix(".json").exists():
                    continue
                self._bar.update(progress.crops)
                held.append((column, progress, progress.crops))
                streams.append(self._stream(request, column, progress))
            known = store.crops_sidecar(shard)["images"] if store.has_crops(shard) else None
            feed(self._reader, rows, per_row, streams, self._pool, known)
            if known is None and (held or self._encoded(shard)):
                checksums = held[0][1].checksums if held else image_checksums(self._reader, rows, self._pool)
                publish_crops(self._reader, shard, checksums)
            for column, progress, already in held:
                self.seen += progress.crops - already
                publish = functools.partial(
                    progress.publish, dtype=np.dtype(np.uint8), shape=(len(rows), per_row, column.meta.code_size)
                )
                publish_codes(store.folder, m, shard, publish, column=column.name, digest=column.digest)
                self._counted.add((column.name, shard))
        return _finished(store, self._columns, shard)

    def _encoded(self, shard: int) -> bool:
        """Whether the codes of every column exist, so that only the crops are missing. Those need no teacher."""
        paths = [layout.codes_file(self._store.folder, column.name, shard) for column in self._columns]
        return all(path.with_suffix(".json").exists() for path in paths)

    def _count(self, column: Column, shard: int, crops: int) -> None:
        """Advances the progress bar for a shard that another process has finished."""
        if (column.name, shard) not in self._counted:
            self._counted.add((column.name, shard))
            self._bar.update(crops)

    def _stream(self, request: Request, column: Column, progress: work.WorkFile) -> TeacherStream:
        per_row, bar = self._store.manifest.crops_per_image, self._bar
        first, skip = divmod(progress.crops, per_row)
        del progress.checksums[first:]

        def on_row(row: Row) -> bool:
            progress.checksums.append(row.checksum)
            return True

        def on_targets(targets: Float32Array) -> None:
            progress.add(column.codec.encode(targets))
            bar.update(len(targets))
            rate = (bar.format_dict["rate"] or 0) / per_row / len(self._columns)
            bar.set_postfix_str(f"{rate:.1f} img/s", refresh=False)

        return TeacherStream(
            request.teacher,
            pixels=request.pixels,
            chunk_size=request.chunk_size,
            first=first,
            skip=skip,
            on_row=on_row,
            on_targets=on_targets,
            device=request.device,
        )
