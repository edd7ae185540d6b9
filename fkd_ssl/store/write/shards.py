"""Writes shards: runs the teachers on the crops of each shard, and writes their codes with the crops."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from fkd_ssl.arrays import Float32Array
from fkd_ssl.progress import advance_done
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.column import Column
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write import work
from fkd_ssl.store.write.columns import Request
from fkd_ssl.store.write.creation import write_codes
from fkd_ssl.store.write.pipeline import Pipeline
from fkd_ssl.store.write.rows import Row, RowReader, write_crops
from fkd_ssl.store.write.streams import Pass, TeacherStream, feed, image_checksums, merged


class ShardWriter:
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
        pipeline: Pipeline,
        bar: Any,
    ) -> None:
        self.seen = 0
        self._store = store
        self._requests = requests
        self._columns = columns
        self._reader = reader
        self._pipeline = pipeline
        self._bar = bar
        self._counted = {(c.name, s) for c in columns for s in range(store.manifest.shards)} - {
            (c.name, s) for c in columns for s in c.missing_shards
        }

    def write(self, shards: Sequence[int]) -> list[int]:
        """Completes these shards; returns those with a column that another process is writing now."""
        with ExitStack() as files:
            passes = (self._begin(shard, files.enter_context(ExitStack())) for shard in self._announced(shards))
            feed(self._reader, passes, self._store.crops_per_image, self._pipeline)
        return [shard for shard in shards if not finished(self._store, self._columns, shard)]

    def _announced(self, shards: Sequence[int]) -> Iterator[int]:
        """Yields the shards; tells the source before each which of its groups this one and the next one need."""
        images = self._reader.images
        for k, shard in enumerate(shards):
            near = (s for s in shards[k : k + 2] if not finished(self._store, self._columns, s))  # others may have written them
            rows = (row for s in near for row in self._store.manifest.shard_rows(s))
            images.expect(dict.fromkeys(images.group(row) for row in rows))
            yield shard

    def _begin(self, shard: int, files: ExitStack) -> Pass:
        """Opens the work files of the columns of a shard that no other process is writing."""
        store, per_row = self._store, self._store.crops_per_image
        rows = store.manifest.shard_rows(shard)
        held: list[tuple[Column, work.WorkFile, int]] = []
        streams = []
        for request, column in zip(self._requests, self._columns, strict=True):
            codes = layout.codes_file(store.folder, column.name, shard)
            if codes.with_suffix(".json").exists():  # another process may have finished it since we looked
                self._count(column, shard, len(rows) * per_row)
                continue
            unit, there = column.meta.code_size, len(rows) * per_row
            progress = files.enter_context(
                work.open_work(work.shard_file(codes), column.digest, unit=unit, crops=there, per_row=per_row)
            )
            if progress is None or codes.with_suffix(".json").exists():
                continue
            advance_done(self._bar, progress.crops)
            held.append((column, progress, progress.crops))
            streams.append(self._stream(request, column, progress))
        known = store.crops_sidecar(shard)["images"] if store.has_crops(shard) else None
        end = functools.partial(self._end, shard, held, known is None, files)
        return Pass(rows=rows, streams=merged(streams), checksums=known, end=end)

    def _end(self, shard: int, held: list[tuple[Column, work.WorkFile, int]], without_crops: bool, files: ExitStack) -> None:
        """Writes a shard whose targets are written, and removes its work files."""
        store, m = self._store, self._store.manifest
        rows = m.shard_rows(shard)
        if without_crops and (held or _encoded(store, self._columns, shard)):
            checksums = held[0][1].checksums if held else image_checksums(self._reader, rows, self._pipeline)
            write_crops(self._reader, shard, checksums)
        for column, progress, already in held:
            self.seen += progress.crops - already
            shape = (len(rows), m.crops_per_image, column.meta.code_size)
            write = functools.partial(progress.finish, dtype=np.dtype(np.uint8), shape=shape)
            write_codes(store.folder, m, shard, write, column=column.name, digest=column.digest)
            self._counted.add((column.name, shard))
        files.close()

    def _count(self, column: Column, shard: int, crops: int) -> None:
        """Advances the progress bar for a shard that another process has finished."""
        if (column.name, shard) not in self._counted:
            self._counted.add((column.name, shard))
            advance_done(self._bar, crops)

    def _stream(self, request: Request, column: Column, progress: work.WorkFile) -> TeacherStream:
        per_row, bar = self._store.crops_per_image, self._bar
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


def finished(store: Store, columns: Sequence[Column], shard: int) -> bool:
    """Whether a shard now has its crops and the codes of every column."""
    return store.has_crops(shard) and _encoded(store, columns, shard)


def _encoded(store: Store, columns: Sequence[Column], shard: int) -> bool:
    """Whether a shard has the codes of every column. If only its crops are missing, no teacher is needed."""
    return all(layout.codes_file(store.folder, c.name, shard).with_suffix(".json").exists() for c in columns)
