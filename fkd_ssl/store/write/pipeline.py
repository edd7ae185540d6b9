"""The threads of precompute: some read images and make crops, one encodes and writes, and the main thread runs the teacher.

Threads suffice, since decoding, hashing, resizing and the teacher's operations release the GIL.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from fkd_ssl.arrays import Float32Array
from fkd_ssl.store.write import chunks
from fkd_ssl.store.write.rows import Teacher, Views

IN_FLIGHT = {"cuda": 3}
"""Maximum number of chunks that were given to a teacher, but whose targets are not written yet, by the teacher's device; 0 on
others."""


@dataclass
class Stages:
    """Seconds that each stage took. Stages overlap."""

    crops: float = 0.0
    """Waiting until images were read and replayed."""
    join: float = 0.0
    """Joining crops to chunks."""
    transfer: float = 0.0
    """Copying chunks to the GPU."""
    forward: float = 0.0
    """Running the teacher, and making the crops if the GPU makes them."""
    write: float = 0.0
    """Encoding and writing targets."""

    def describe(self, seconds: float) -> str:
        """Describes the share of each stage in a run of some seconds, and the stage that bounds the run."""
        words = {
            "forward": "teacher",
            "crops": "waiting for crops",
            "join": "joining chunks",
            "transfer": "transfer to the GPU",
            "write": "encoding and writing",
        }
        shares = ", ".join(f"{word} {100 * getattr(self, name) / seconds:.0f} %" for name, word in words.items())
        return f"time: {shares}; bound by: {words[max(words, key=lambda name: float(getattr(self, name)))]}"


class Pipeline:
    """Runs teachers on chunks and writes their targets in order. As a context manager, it ends its threads.

    Args:
        threads: Number of threads that read images and make crops.
        teachers: The teachers.

    Attributes:
        pool: The threads that read images.
        ahead: Maximum number of images that were read but not given to a teacher yet.
        in_flight: Maximum number of chunks that were given to a teacher, but whose targets are not written yet.
        stages: Seconds of each stage.
    """

    def __init__(self, threads: int, teachers: Sequence[Teacher] = ()) -> None:
        self.pool = ThreadPoolExecutor(threads)
        self.ahead = threads + 1
        self.in_flight = max((IN_FLIGHT.get(chunks.device_of(teacher).type, 0) for teacher in teachers), default=0)
        self.stages = Stages()
        self._writer = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self.pool, self._writer):
            pool.shutdown()

    def queue_bytes(self, image: int, chunk: int) -> int:
        """Returns the maximum size of all queues, given that of the crops of an image and of a chunk."""
        return (self.ahead + 1) * image + (self.in_flight + 1) * chunk

    @contextmanager
    def draining(self) -> Iterator[None]:
        """Waits at the end of the block until everything passed to `later` is done, also after an error."""
        self._failed = False
        try:
            yield
            self._keep(0)
        finally:
            wait(self._waiting)
            self._waiting.clear()

    def later(self, work: Callable[[], None], ready: Callable[[], None] = lambda: None) -> None:
        """Calls `ready`, which may wait for a GPU, and `work` in the thread that writes, after all earlier work.

        Returns when at most `in_flight` are not done. If work fails, no later work is done, and this call or a later one raises
        the error.
        """

        def call() -> None:
            if self._failed:
                return
            try:
                ready()
                started = time.perf_counter()
                work()
                self.stages.write += time.perf_counter() - started
            except BaseException:
                self._failed = True
                raise

        self._waiting.append(self._writer.submit(call))
        self._keep(self.in_flight)

    def _keep(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def embed(
        self,
        teachers: Sequence[Teacher],
        parts: Sequence[Views],
        done: Callable[[list[Float32Array]], None],
        *,
        pixels: int,
        chunk_size: int,
        device: str | None = None,
    ) -> None:
        """Runs teachers on a chunk, and passes their targets float32 [n, *shape] to `done` in the thread that writes.

        Args:
            teachers: Teachers on one device.
            parts: The n crops of the chunk, at most `chunk_size`.
            done: Called with the targets of each teacher.
            pixels: Side of the crops.
            chunk_size: Number of crops per forward pass. A smaller chunk is padded with zeros.
            device: Device that makes crops that are not made yet.
        """
        started = time.perf_counter()
        on_gpu = chunks.device_of(teachers[0]).type == "cuda"
        chunk = chunks.join(parts, pixels, pinned=on_gpu)
        joined = time.perf_counter()
        self.stages.join += joined - started

        def finish(found: list[Tensor]) -> None:
            done([chunks.checked(one, targets, len(chunk)) for one, targets in zip(teachers, found, strict=True)])

        if on_gpu:
            launched = chunks.Launched(teachers, chunk, chunk_size)
            self.later(lambda: finish(launched.targets), lambda: launched.wait(self.stages))
            return
        found = [targets.cpu() for targets in chunks.forward(teachers, chunk.to(device or "cpu"), chunk_size)]
        self.stages.forward += time.perf_counter() - joined
        self.later(lambda: finish(found))
