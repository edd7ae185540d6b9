"""Passes over rows for one or more teachers. Each image is read and decoded once, and replayed once per size."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from fkd_ssl.arrays import Float32Array
from fkd_ssl.store.write.pipeline import Pipeline
from fkd_ssl.store.write.rows import Row, RowReader, Teacher, Views, read_ahead
from fkd_ssl.targets.sharing import network_key


class TeacherStream:
    """The crops that one teacher has not seen yet, divided into chunks of a fixed size.

    Args:
        teacher: The frozen network.
        pixels: Side of its crops.
        chunk_size: Number of crops per forward pass.
        first: Position of the first row with crops that the teacher has not seen.
        skip: Number of crops of that row that the teacher has seen.
        on_row: Called with each row from `first` on; returns whether the teacher should see its crops.
        on_targets: Called with the targets float32 [n, D] of each chunk, in the thread that writes.
        device: Device that makes the crops; None if the rows contain them.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        pixels: int,
        chunk_size: int,
        first: int,
        skip: int,
        on_row: Callable[[Row], bool],
        on_targets: Callable[[Float32Array], None],
        device: str | None = None,
    ) -> None:
        self.pixels = pixels
        self.first = first
        self.skip = skip
        self.on_row = on_row
        self.on_targets = on_targets
        self._teacher = teacher
        self._twins: list[TeacherStream] = []
        self._chunk_size = chunk_size
        self._device = device
        self._parts: list[Views] = []
        self._held = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for streams of the same chunks through the same network."""
        network = network_key(self._teacher.embed)
        return network, self.pixels, self._chunk_size, self.first, self.skip, self._device

    def join(self, other: "TeacherStream") -> None:
        """Adds a stream of the same key, which gets its targets from this stream's forward passes."""
        self._twins.append(other)

    def crops_seen(self, position: int) -> int:
        """Returns the number of crops that the teacher has seen of the row at `position`, which is at least `first`."""
        return self.skip if position == self.first else 0

    def push(self, position: int, row: Row, count: int, pipeline: Pipeline) -> None:
        """Adds those of the `count` crops of a row that the teacher has not seen. `row` may contain earlier ones."""
        if position < self.first:
            return
        wanted = [stream.on_row(row) for stream in (self, *self._twins)]
        if not all(wanted):
            return
        of_row = row.views[self.pixels]
        views = of_row[len(of_row) - (count - self.crops_seen(position)) :]
        while len(views):
            part = views[: self._chunk_size - self._held]
            self._parts.append(part)
            self._held += len(part)
            views = views[len(part) :]
            if self._held == self._chunk_size:
                self.flush(pipeline)

    def flush(self, pipeline: Pipeline) -> None:
        """Runs the teacher on the crops added so far: a full chunk, or the last one."""
        if self._held:
            parts, self._parts, self._held = self._parts, [], 0
            streams = (self, *self._twins)

            def done(found: list[Float32Array]) -> None:
                for stream, targets in zip(streams, found, strict=True):
                    stream.on_targets(targets)

            pipeline.embed(
                [stream._teacher for stream in streams],
                parts,
                done,
                pixels=self.pixels,
                chunk_size=self._chunk_size,
                device=self._device,
            )


def merged(streams: Iterable[TeacherStream]) -> list[TeacherStream]:
    """Joins streams that need the same forward passes."""
    found: dict[tuple[Any, ...], TeacherStream] = {}
    for stream in streams:
        first = found.setdefault(stream.key, stream)
        if first is not stream:
            first.join(stream)
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Rows that every teacher sees, for instance those of a shard."""

    rows: Sequence[int]
    """Rows of the store. The positions in `streams` are indices into this list."""
    streams: Sequence[TeacherStream]
    """One stream per network."""
    checksums: Sequence[str] | None = None
    """sha256 of each row's image, empty for a skipped image; None if they are unknown."""
    end: Callable[[], None] = lambda: None
    """Called in the thread that writes after the last targets."""


def feed(reader: RowReader, passes: Iterable[Pass], count: int, pipeline: Pipeline) -> None:
    """Runs every teacher on the crops that it has not seen, in order. `count` is the number of crops per row.

    The next pass is begun, and its images are read, before the last one has ended.
    """

    def calls() -> Iterator[Callable[[], tuple[Pass, int, Row | None]]]:
        for one in passes:
            for k in range(min((stream.first for stream in one.streams), default=len(one.rows)), len(one.rows)):
                seen: dict[int, int] = {}  # number of crops that all teachers have seen, by size
                for stream in one.streams:
                    if k >= stream.first:
                        seen[stream.pixels] = min(stream.crops_seen(k), seen.get(stream.pixels, count))
                expected = one.checksums[k] if one.checksums else None
                yield functools.partial(_read, reader, one, k, count, seen, expected)
            yield functools.partial(_end, one)

    found = read_ahead(pipeline.pool, calls(), pipeline.ahead)
    with closing(found), pipeline.draining():
        while True:
            started = time.perf_counter()
            one, k, row = next(found, (None, 0, None))
            pipeline.stages.crops += time.perf_counter() - started
            if one is None:
                return
            for stream in one.streams:
                if row is None:
                    stream.flush(pipeline)
                else:
                    stream.push(k, row, count, pipeline)
            if row is None:
                pipeline.later(one.end)


def _read(
    reader: RowReader, one: Pass, k: int, count: int, seen: dict[int, int], expected: str | None
) -> tuple[Pass, int, Row | None]:
    return one, k, reader(one.rows[k], count, seen, expected)


def _end(one: Pass) -> tuple[Pass, int, Row | None]:
    return one, len(one.rows), None


def image_checksums(reader: RowReader, rows: Sequence[int], pipeline: Pipeline, bar: Any = None) -> list[str]:
    """Returns the sha256 of the rows' images, empty for those skipped as unreadable. Advances `bar` with each."""
    calls = (functools.partial(reader, row, 0, {}) for row in rows)
    checksums = []
    for row in read_ahead(pipeline.pool, calls, pipeline.ahead):
        checksums.append(row.checksum)
        if bar is not None:
            bar.update(1)
    return checksums
