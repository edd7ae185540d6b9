"""A sweep over rows for one or several teachers: every image is read and decoded once, and replayed once for each size."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from fkd_ssl.arrays import Float32Array
from fkd_ssl.store.write.rows import Row, RowReader, Teacher, Views, embed, in_order, join


class Seen(Protocol):
    """What a lane tells of a row before the teacher sees its crops."""

    def __call__(self, row: Row) -> bool:
        """Whether the teacher is to see them."""


class Lane:
    """One teacher's part in a sweep: the crops that it has not seen yet, cut into chunks of its own fixed size.

    Args:
        teacher: The frozen network.
        pixels: Side of its crops.
        chunk_size: Crops in one forward.
        first: Position of the first row that it needs.
        skip: Crops of that row that it has seen.
        seen: Takes each row from `first` on.
        device: Where crops that are yet to be made are made.
        take: Takes the targets float32 [n, D] of each chunk.
    """

    def __init__(
        self, teacher: Teacher, *, pixels: int, chunk_size: int, first: int, skip: int, seen: Seen,
        take: Callable[[Float32Array], None], device: str | None = None,
    ) -> None:  # fmt: skip
        self.pixels = pixels
        self.first = first
        self._skip = skip
        self._teacher = teacher
        self._chunk_size = chunk_size
        self._seen = seen
        self._take = take
        self._device = device
        self._parts: list[Views] = []
        self._held = 0

    def left_out(self, position: int) -> int:
        """First crops of the row at a position, from `first` on, that the teacher does not see."""
        return self._skip if position == self.first else 0

    def push(self, position: int, row: Row, count: int) -> None:
        """Takes a row of `count` crops, of which those that another lane is behind with are left out."""
        if position < self.first or not self._seen(row):
            return
        of_row = row.views[self.pixels]
        views = of_row[len(of_row) - (count - self.left_out(position)) :]
        while len(views):
            part = views[: self._chunk_size - self._held]
            self._parts.append(part)
            self._held += len(part)
            views = views[len(part) :]
            if self._held == self._chunk_size:
                self.flush()

    def flush(self) -> None:
        """The teacher sees what is held, a whole chunk or the last one."""
        if self._held:
            chunk = join(self._parts, self.pixels, self._device)
            self._parts, self._held = [], 0
            self._take(embed(self._teacher, chunk, self._chunk_size))


def sweep(
    reader: RowReader, rows: Sequence[int], count: int, lanes: Sequence[Lane], pool: ThreadPoolExecutor,
    known: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Shows every lane the crops that it lacks, in order.

    Args:
        reader: Reads a row.
        rows: Rows of the store; a lane's `first` counts in them.
        count: Crops of each row.
        lanes: Whose crops.
        pool: Threads that read ahead.
        known: sha256 of each row's image, empty for a skipped one, where they are known.
    """
    begin = min((lane.first for lane in lanes), default=len(rows))

    def calls() -> Iterator[Callable[[], Row]]:
        for k in range(begin, len(rows)):
            wanted: dict[int, int] = {}
            for lane in lanes:
                if k >= lane.first:
                    left_out = lane.left_out(k)
                    wanted[lane.pixels] = min(left_out, wanted.get(lane.pixels, left_out))
            yield functools.partial(reader, rows[k], count, wanted, known[k] if known else None)

    for k, row in enumerate(in_order(pool, calls(), reader.ahead), begin):
        for lane in lanes:
            lane.push(k, row, count)
    for lane in lanes:
        lane.flush()
