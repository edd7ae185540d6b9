"""Rows for a teacher: threads read, decode and replay images, once per size, while the teacher runs."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from fkd_ssl import files
from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops import IMPORTED, Records, draw, image_key, replay_into
from fkd_ssl.crops.device import PendingCrops
from fkd_ssl.crops.records import neutral
from fkd_ssl.errors import FkdError, ImageError, StoreError
from fkd_ssl.images import ImageSource, decode
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write import creation
from fkd_ssl.targets import TeacherInfo

T = TypeVar("T")


class Teacher(Protocol):
    """Interface of a teacher for precompute; fkd_ssl.teachers.Teacher implements it.

    A teacher on a GPU also has the attribute `device`, and does not wait for the GPU.
    """

    info: TeacherInfo

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the targets float32 [B, *shape] of crops uint8 [B, 3, H, W]."""


Views = UInt8Array | PendingCrops


@dataclass(frozen=True, kw_only=True)
class Row:
    """The crops of one image at each size."""

    views: dict[int, Views]  # by their side P: [m, P, P, 3], the last m of the row's crops
    checksum: str  # sha256 of the file; empty if the image was skipped


class RowReader:
    """Reads, decodes and replays the crops of a row. It is thread-safe.

    With `device`, the rows have `PendingCrops`, and the crops are made on that device later.
    """

    def __init__(self, store: Store, images: ImageSource, skip_unreadable: bool, *, device: str | None = None) -> None:
        self.store = store
        self.images = images
        self.skip_unreadable = skip_unreadable
        self.device = device

    def __call__(self, row: int, count: int, wanted: Mapping[int, int], expected: str | None = None) -> Row:
        """Returns the crops of a row.

        Args:
            row: The row.
            count: Number of crops, from the first one.
            wanted: The sides of the crops, each with the number of first crops to omit.
            expected: sha256 that the image file must have, empty for a skipped image; None if it is unknown.
        """
        views: dict[int, Views] = {side: self._blank(count - first, side) for side, first in wanted.items()}
        size = self.store.sizes[row]
        if expected == "":  # skipped when the crops were drawn, and so for every teacher
            return Row(views=views, checksum="")
        if expected is None and self.skip_unreadable and not size["width"]:  # its header was unreadable
            return Row(views=views, checksum="")
        path = self.images.where(row)
        data = self.images.read(row)
        checksum = files.sha256(data)
        if expected is not None and checksum != expected:
            raise FkdError(f"{path}: changed since the store's crops were made; restore it or make another store")
        if not size["width"]:
            raise ImageError(f"{path}: could not be read when the store was made; pass --on_unreadable skip, as before")
        changed = f"{path}: changed since the store was made ({size['width']} x {size['height']} pixels then)"
        if len(data) != size["bytes"]:
            raise ImageError(changed)
        try:
            pixels = decode(data, path)
        except ImageError as error:
            if self.skip_unreadable and expected is None:
                return Row(views=views, checksum="")
            if expected is not None:
                advice = "; another teacher has seen it: restore it"
            else:
                advice = "" if self.skip_unreadable else "; remove it or pass --on_unreadable skip"
            raise ImageError(f"{error}{advice}") from error
        if pixels.shape[:2] != (size["height"], size["width"]):
            raise ImageError(changed)
        records = records_of(self.store, row, count)
        for side, first in wanted.items():
            view = views[side]
            if isinstance(view, PendingCrops):
                views[side] = PendingCrops(image=pixels, records=records[first:])
            else:
                replay_into(view, pixels, records[first:])
        return Row(views=views, checksum=checksum)

    def _blank(self, count: int, side: int) -> Views:
        """Returns the crops of a skipped image."""
        if self.device is None:
            return np.zeros((count, side, side, 3), dtype=np.uint8)
        records = neutral(count)
        records["height"] = records["width"] = 1
        return PendingCrops(image=np.zeros((1, 1, 3), dtype=np.uint8), records=records)


def records_of(store: Store, row: int, count: int) -> Records:
    """Returns the first records of a row, drawn again unless they were imported; neutral if the image header is damaged."""
    m, size = store.manifest, store.sizes[row]
    if not size["width"]:
        return neutral(count)
    if m.recipe == IMPORTED:
        return np.asarray(store.crops(row, slice(0, count)))
    key = image_key(m.seed, store.paths[row])
    return draw(m.recipe, key, int(size["height"]), int(size["width"]), 0, count)


def read_ahead(pool: ThreadPoolExecutor, calls: Iterable[Callable[[], T]], ahead: int) -> Generator[T]:
    """Yields the results in the order of the calls, with at most `ahead` of them in memory."""
    waiting: deque[Future[T]] = deque()
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


def write_crops(reader: RowReader, shard: int, checksums: Sequence[str]) -> None:
    """Writes a shard's crop records, with the `checksums` of its images. Raises StoreError if they exist and differ."""
    store = reader.store
    records = np.stack([records_of(store, row, store.crops_per_image) for row in store.manifest.shard_rows(shard)])
    try:
        creation.write_crops(store.folder, store.manifest, shard, records, checksums)
    except StoreError as error:
        raise StoreError(f"{error}; another process read other image files: check that all see the same images") from error
