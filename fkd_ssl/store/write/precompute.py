"""Precompute: runs teachers once on every stored crop of every image, and writes their targets into columns of a store.

A shard is a pure function of images, recipe, seed, teacher and codec. Its crops are divided, in order, into chunks of a fixed
size. A teacher runs on one chunk at a time, and a killed run resumes at a chunk.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from fkd_ssl import files
from fkd_ssl.crops import Recipe
from fkd_ssl.errors import RequestError
from fkd_ssl.images import ImageSource
from fkd_ssl.progress import bar_disabled
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write import work
from fkd_ssl.store.write.columns import Request, open_or_train
from fkd_ssl.store.write.pipeline import Pipeline
from fkd_ssl.store.write.prepare import begin, count_rows, in_range, make_requests
from fkd_ssl.store.write.recording import require_not_recording
from fkd_ssl.store.write.rows import RowReader, Teacher
from fkd_ssl.store.write.shards import ShardWriter, finished
from fkd_ssl.targets.precision import uses_tf32
from fkd_ssl.text import format_bytes


@dataclass(frozen=True, kw_only=True)
class Share:
    """A process's share of the shards: every `of`-th shard, starting at `index`."""

    index: int
    of: int
    steal: bool = False
    """Whether to continue, after its own shards, with shards of other processes that they have not begun."""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise RequestError(f"--shards {self.index}/{self.of}: expected i/n with i from 0 to n - 1, for instance 0/4")


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
    teacher_busy: float
    """Share of the time in which a teacher ran."""
    stages: dict[str, float]
    """Seconds that each stage took; see `Stages`. Stages overlap."""
    tf32: bool
    """Whether a teacher in fp32 used TF32 for its convolutions; see `uses_tf32`."""
    queue_bytes: int
    """Maximum memory of the images, crops and chunks that wait for the next stage."""


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
    column: str | Sequence[str] | None = None,
    skip_unreadable: bool = False,
    threads: int = 2,
    device: str | None = None,
    share: Share | None = None,
    extend: bool = False,
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
        codec: Codec of each column: a faiss factory string for embeddings, a label codec for class probabilities. Default:
            SQ8 for embeddings, marginal_smoothing_k5 for class probabilities (full for up to 10 classes).
        pixels: Side of the crops that the teachers see: one for all, or one per teacher.
        seed: Seed of the crops.
        limit: Use only this many images, the first in hash order.
        chunk_size: Number of crops per forward pass of a teacher.
        column: Name of each teacher's column. Default: the teacher's name.
        skip_unreadable: Skip images that cannot be decoded, and record this in the store, instead of stopping.
        threads: Number of threads that read, decode and replay while the teacher runs.
        device: torch device that makes the crops. Default: the threads make them. The pixels are the same.
        share: The shards that this process writes. Default: all.
        extend: Add rows for images that an existing store lacks. Its files do not change.
        progress: Whether to show a progress bar.
        log: Called with each line for the user.

    Raises:
        RequestError: The store or the column was created with other arguments.
        ImageError: An image cannot be read, or has changed since the store's crops were drawn.
        FkdError: There is not enough disk space for the store.
    """
    in_range("threads", threads, 2**16)
    started = time.perf_counter()
    requests = make_requests(teacher, codec, pixels, chunk_size, column, device)
    names = [request.name for request in requests]
    images = layout.limit_images(images, limit)
    store, images = begin(
        images,
        Path(folder),
        requests,
        crops=crops,
        recipe=recipe,
        seed=seed,
        skip_unreadable=skip_unreadable,
        progress=progress,
        log=log,
        extend=extend,
    )
    reader = RowReader(store, images, skip_unreadable, device=device)
    with Pipeline(threads, [request.teacher for request in requests]) as pipeline:
        queues = _queue_bytes(pipeline, store, requests)
        columns = open_or_train(store, requests, reader, pipeline, log)
        for each in columns:
            require_not_recording(each)
        missing = [shard for shard in range(store.manifest.shards) if any(shard in c.missing_shards for c in columns)]
        mine = missing if share is None else [shard for shard in missing if shard % share.of == share.index]
        others = [shard for shard in missing if shard not in mine]
        bar = tqdm(
            total=store.manifest.count * crops * len(columns),
            initial=sum(store.manifest.count - count_rows(store, c.missing_shards) for c in columns) * crops,
            unit="crop",
            desc=f"precompute {', '.join(names)}",
            smoothing=0.05,
            disable=bar_disabled(show=progress),
        )
        with bar:
            writer = ShardWriter(store, requests, columns, reader, pipeline, bar)
            busy = writer.write(mine + others if share is None or share.steal else mine)
            busy = writer.write(busy)  # the processes that wrote them may have been killed
    for each in columns:  # work files that killed processes did not remove
        for path in each.folder.glob(".work-codes-*[0-9]"):
            if (each.folder / f"{path.name.removeprefix('.work-')}.json").exists():
                work.clear(path)
    seconds = time.perf_counter() - started
    if writer.seen:
        log(f"{pipeline.stages.describe(seconds)}; at most {format_bytes(queues)} of memory for images and crops that wait")
    return Summary(
        shards=store.manifest.shards,
        busy=busy,
        left=[] if share is None or share.steal else [s for s in others if not finished(store, columns, s)],
        crops=writer.seen,
        seconds=seconds,
        store_bytes=files.total_bytes(store.folder),
        teacher_busy=pipeline.stages.forward / seconds,
        stages=asdict(pipeline.stages),
        tf32=any(uses_tf32(request.teacher.info.precision) for request in requests),
        queue_bytes=queues,
    )


def _queue_bytes(pipeline: Pipeline, store: Store, requests: Sequence[Request]) -> int:
    """Returns the maximum memory of what waits for the next stage of the pipeline."""
    if requests[0].device is None:
        image = store.crops_per_image * sum({3 * request.pixels**2 for request in requests})
    else:
        image = 3 * int((store.sizes["width"].astype(np.int64) * store.sizes["height"]).max())
    return pipeline.queue_bytes(image, max(3 * request.chunk_size * request.pixels**2 for request in requests))
