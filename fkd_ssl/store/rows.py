"""Rows for a teacher: images read, decoded and replayed beside it, their crops cut into chunks of a fixed size."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fkd_ssl import files
from fkd_ssl.crops import Records, draw, image_key, replay_into
from fkd_ssl.crops.records import neutral
from fkd_ssl.errors import FkdError, ImageError
from fkd_ssl.images import ImageSet, decode, read_bytes
from fkd_ssl.store.codecs import Float32Array
from fkd_ssl.store.reader import Store


class Teacher(Protocol):
    """What precompute asks of a teacher; fkd_ssl.teachers.Teacher is one."""

    name: str
    kind: str
    dim: int
    network: str
    licence: str
    source: str | None
    checkpoint_sha256: str | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    arrays: dict[str, npt.NDArray[np.float32]]

    @property
    def precision(self) -> str:
        """Arithmetic of its forward: fp32, bf16 or fp16."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Targets float32 [B, D] of crops uint8 [B, 3, H, W]."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image, read and replayed."""

    views: npt.NDArray[np.uint8]
    checksum: str  # of the file's bytes; empty where the image was skipped


class RowReader:
    """Reads, decodes and replays all crops of a row; safe to call from several threads."""

    def __init__(self, store: Store, images: ImageSet, pixels: int, skip_unreadable: bool, *, ahead: int) -> None:
        self.store = store
        self.images = images
        self.pixels = pixels
        self.skip_unreadable = skip_unreadable
        self.ahead = ahead  # images held in memory before the teacher has seen them

    def records(self, row: int, count: int) -> Records:
        """The first crops of a row, drawn anew; neutral empty ones where even the image's header was unreadable."""
        m, size = self.store.manifest, self.store.sizes[row]
        if not size["width"]:
            return neutral(count)
        key = image_key(m.seed, self.store.paths[row])
        return draw(m.recipe, key, int(size["height"]), int(size["width"]), 0, count)

    def __call__(self, row: int, count: int, expected: str | None = None) -> Row:
        """The first `count` crops of a row; `expected` is the sha256 its file must have, empty for a skipped one."""
        path = self.images.file(row)
        blank = Row(views=np.zeros((count, self.pixels, self.pixels, 3), dtype=np.uint8), checksum="")
        if expected == "":  # skipped when the crops were made: skipped for every teacher
            return blank
        if expected is None and self.skip_unreadable and not self.store.sizes[row]["width"]:  # its header was unreadable
            return blank
        try:
            data = read_bytes(path)
            checksum = files.sha256(data)
            if expected is not None and checksum != expected:
                raise FkdError(f"{path}: changed since the store's crops were made; restore it or make another store")
            pixels = decode(data, path)
        except ImageError as error:
            if self.skip_unreadable and expected is None:
                return blank
            if expected is not None:
                advice = "; another teacher has seen it: restore it"
            else:
                advice = "" if self.skip_unreadable else "; remove it or pass --on_unreadable skip"
            raise ImageError(f"{error}{advice}") from error
        size = self.store.sizes[row]
        if pixels.shape[:2] != (size["height"], size["width"]) or len(data) != size["bytes"]:
            raise ImageError(f"{path}: changed since the store was made ({size['width']} x {size['height']} pixels then)")
        views = blank.views
        replay_into(views, pixels, self.records(row, count))
        return Row(views=views, checksum=checksum)


def in_order(pool: ThreadPoolExecutor, calls: Iterator[Callable[[], Row]], ahead: int) -> Iterator[Row]:
    """Results in the calls' order, at most `ahead` of them in memory."""
    waiting: deque[Future[Row]] = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def embed(teacher: Teacher, chunk: npt.NDArray[np.uint8], chunk_size: int) -> Float32Array:
    """Targets of at most `chunk_size` crops uint8 [n, P, P, 3]; always run on `chunk_size`, the rest zeros."""
    padded = chunk
    if len(chunk) < chunk_size:
        padded = np.zeros((chunk_size, *chunk.shape[1:]), dtype=np.uint8)
        padded[: len(chunk)] = chunk
    targets = teacher.embed(torch.from_numpy(padded).permute(0, 3, 1, 2))
    result: Float32Array = targets[: len(chunk)].float().cpu().numpy()
    if result.shape != (len(chunk), teacher.dim) or not np.isfinite(result).all():
        raise FkdError(
            f"teacher {teacher.name}: gave targets {list(result.shape)}, expected finite [{len(chunk)}, {teacher.dim}]"
        )
    return result


def chunks(rows: Iterator[Row], chunk_size: int, skip: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The rows' crops as one sequence, without its first `skip`, cut into chunks; the last one may be shorter."""
    parts: list[npt.NDArray[np.uint8]] = []
    held = 0
    for row in rows:
        views = row.views[skip:]
        skip = max(0, skip - len(row.views))
        while len(views):
            take = views[: chunk_size - held]
            parts.append(take)
            held += len(take)
            views = views[len(take) :]
            if held == chunk_size:
                yield np.concatenate(parts) if len(parts) > 1 else parts[0]
                parts, held = [], 0
    if held:
        yield np.concatenate(parts)
