"""One pass over rows for one or more teachers. Each image is read and decoded once, and replayed once per size."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from fkd_ssl.arrays import Float32Array
from fkd_ssl.store.write.rows import Row, RowReader, Teacher, Views, embed, join, read_ahead


class TeacherStream:
    """The crops that one teacher has not seen yet, divided into chunks of a fixed size.

    Args:
        teacher: The frozen network.
        pixels: Side of its crops.
        chunk_size: Number of crops per forward pass.
        first: Position of the first row with crops that the teacher has not seen.
        skip: Number of crops of that row that the teacher has seen.
        on_row: Called with each row from `first` on; returns whether the teacher should see its crops.
        on_targets: Called with the targets float32 [n, D] of each chunk.
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
        self._chunk_size = chunk_size
        self._device = device
        self._parts: list[Views] = []
        self._held = 0

    def crops_seen(self, position: int) -> int:
        """Returns the number of crops that the teacher has seen of the row at `position`, which is at least `first`."""
        return self.skip if position == self.first else 0

    def push(self, position: int, row: Row, count: int) -> None:
        """Adds the crops of a row that the teacher has not seen. `row` may contain more of its `count` crops."""
        if position < self.first or not self.on_row(row):
            return
        of_row = row.views[self.pixels]
        views = of_row[len(of_row) - (count - self.crops_seen(position)) :]
        while len(views):
            part = views[: self._chunk_size - self._held]
            self._parts.append(part)
            self._held += len(part)
            views = views[len(part) :]
            if self._held == self._chunk_size:
                self.flush()

    def flush(self) -> None:
        """Runs the teacher on the crops added so far: a full chunk, or the last one."""
        if self._held:
            chunk = join(self._parts, self.pixels, self._device)
            self._parts, self._held = [], 0
            self.on_targets(embed(self._teacher, chunk, self._chunk_size))


def feed(
    reader: RowReader,
    rows: Sequence[int],
    count: int,
    streams: Sequence[TeacherStream],
    pool: ThreadPoolExecutor,
    checksums: Sequence[str] | None = None,
) -> None:
    """Runs every teacher on the crops that it has not seen, in order.

    Args:
        reader: Reads a row.
        rows: Rows of the store. The positions in `streams` are indices into this list.
        count: Number of crops per row.
        streams: One stream per teacher.
        pool: Threads that read ahead.
        checksums: sha256 of each row's image, empty for a skipped image; None if they are unknown.
    """
    begin = min((stream.first for stream in streams), default=len(rows))

    def calls() -> Iterator[Callable[[], Row]]:
        for k in range(begin, len(rows)):
            seen: dict[int, int] = {}  # number of crops that all teachers have seen, by size
            for stream in streams:
                if k >= stream.first:
                    seen[stream.pixels] = min(stream.crops_seen(k), seen.get(stream.pixels, count))
            yield functools.partial(reader, rows[k], count, seen, checksums[k] if checksums else None)

    for k, row in enumerate(read_ahead(pool, calls(), reader.ahead), begin):
        for stream in streams:
            stream.push(k, row, count)
    for stream in streams:
        stream.flush()
