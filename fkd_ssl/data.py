"""Data sets of crops: stored ones with their targets, or fresh ones; both read an image once for all its crops."""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from fkd_ssl.crops import Recipe, Records, draw, image_key, replay_into
from fkd_ssl.errors import ImageError, RequestError, StoreError
from fkd_ssl.images import ImageSet, UInt8Array, decode, read_bytes, scan
from fkd_ssl.store import Store

Batch = dict[str, Any]
Index = int | tuple[int, int]  # an image, or a pass and an image
Targets = Tensor | dict[str, Tensor]  # of one teacher, or of several by name


class Crops(Dataset[Batch]):
    """M crops of each image, one decode for all of them.

    `data[i]` reads image `i` in pass 0, `data[p, i]` in pass `p`. A DataLoader reads a list of such indices at once; with
    `collate_fn=whole_batch` it gives crops [B M, ...] without another copy, otherwise the usual [B, M, ...].
    """

    def __init__(
        self,
        length: int,
        crops_per_image: int,
        pixels: int,
        teacher_pixels: int | None = None,
        *,
        skip_unreadable: bool = False,
    ) -> None:
        if crops_per_image < 1 or pixels < 1:
            raise RequestError(f"crops_per_image {crops_per_image} and pixels {pixels} must be at least 1")
        self._length = length
        self.crops_per_image = crops_per_image
        self.pixels = pixels
        self.teacher_pixels = None if teacher_pixels == pixels else teacher_pixels
        self.skip_unreadable = skip_unreadable

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Index) -> Batch:
        """One image.

        `images` uint8 [M, 3, P, P], `targets` float32 [M, D] if stored (of several teachers a dict of such, by name), `label`
        and `path`.
        """
        pass_, i = index if isinstance(index, tuple) else (0, index)
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self.__getitems__([(pass_, i)])[0]

    def __getitems__(self, indices: list[Index]) -> "Samples":
        """B images, as a list of what `data[i]` gives; its attribute `batch` holds them as one.

        Returns:
            Its `batch` has `images` uint8 [B M, 3, P, P] in channels-last memory, the crops of an image side by side;
            `targets` float32 [B M, D] if stored, or a dict of such by teacher; `teacher_images` if the teacher's size is
            another; `labels` int64 [B]; `paths`; `unreadable`, what was skipped and why.

        Raises:
            ImageError: An image is missing, unreadable or changed, and they are not skipped, or no image of the batch
                could be read; the message names it.
        """
        pairs = [index if isinstance(index, tuple) else (0, index) for index in indices]
        m = self.crops_per_image
        views = _new_views(len(pairs) * m, self.pixels)
        large = None if self.teacher_pixels is None else _new_views(len(pairs) * m, self.teacher_pixels)
        arrays = [tensor.numpy() for tensor in (views, large) if tensor is not None]
        failed: dict[int, ImageError] = {}
        for k, (pass_, i) in enumerate(pairs):
            try:
                self._replay(pass_, i, [array[k * m : (k + 1) * m] for array in arrays])
            except ImageError as error:
                if not self.skip_unreadable:
                    raise
                failed[k] = error
        if failed:
            self._fill(pairs, arrays, failed)
        batch: Batch = {
            "images": views.permute(0, 3, 1, 2),
            "labels": torch.tensor([self._label(i) for _, i in pairs]),
            "paths": [self._path(i) for _, i in pairs],
            "unreadable": [str(error) for error in failed.values()],
        }
        if large is not None:
            batch["teacher_images"] = large.permute(0, 3, 1, 2)
        targets = self._targets(pairs)
        if targets is not None:
            batch["targets"] = targets
        return Samples(batch, m)

    def _replay(self, pass_: int, i: int, arrays: list[UInt8Array]) -> None:
        """One image's crops, at one or two sizes."""
        path = self._file(i)
        image = self._read(i, path)
        try:
            records = self._records(pass_, i, image.shape[0], image.shape[1])
            for array in arrays:
                replay_into(array, image, records)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error

    def _fill(self, pairs: list[tuple[int, int]], arrays: list[UInt8Array], failed: dict[int, ImageError]) -> None:
        """The readable images of a batch once more, in turn, in the places of those that could not be read."""
        good = [k for k in range(len(pairs)) if k not in failed]
        if not good:
            first = next(iter(failed.values()))
            raise ImageError(f"{first}; none of the {len(pairs)} images of this batch can be read, so none is skipped")
        m = self.crops_per_image
        for turn, k in enumerate(failed):
            other = good[turn % len(good)]
            pairs[k] = pairs[other]
            for array in arrays:
                array[k * m : (k + 1) * m] = array[other * m : (other + 1) * m]

    def _read(self, i: int, path: str) -> UInt8Array:
        return decode(read_bytes(path), path)

    def _targets(self, pairs: list[tuple[int, int]]) -> Targets | None:
        return None

    @abstractmethod
    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        """Records [M] of an image in a pass."""

    @abstractmethod
    def _file(self, i: int) -> str: ...

    @abstractmethod
    def _path(self, i: int) -> str: ...

    @abstractmethod
    def _label(self, i: int) -> int: ...


class StoredCrops(Crops):
    """The crops of a store, with the targets of one teacher or of several.

    Pass p reads crops (start + p M + 0..M-1) mod C of an image, start a hash of the seed and the image: every crop is
    used before any is used twice.

    Args:
        store: An opened store.
        images: The folder of images, or a scanned set; it may hold more than the store.
        crops_per_image: M.
        pixels: P, the side of the crops; it need not be what the teacher saw.
        teacher: Name of the column; not needed where there is only one. A list of names gives `targets` as a dict of float32
            [M, D] by name, in the list's order.
        seed: Of the starts.
        with_targets: False gives the crops alone, for a teacher that runs online on them.
        teacher_pixels: Side at which the crops are made once more, for a teacher that runs online.
        partial: Take the images whose shards are done from a store that is still being written, as it stands when it is
            first looked at; open the store again to see more.
        scale_boxes: The folder holds smaller copies of the store's images (fkd-ssl cache makes them): boxes are scaled to
            a copy's size. Crops are then near what the teacher saw, and not the same bits.
        skip_unreadable: An image that cannot be read is replaced by another one of its batch, and counted.

    Raises:
        StoreError: A column is unknown or not finished, or an image of the store is missing from the folder.
        RequestError: A column is named twice, or crops_per_image is more than the store holds.
    """

    def __init__(
        self,
        store: Store,
        images: str | Path | ImageSet,
        *,
        crops_per_image: int = 4,
        pixels: int = 224,
        teacher: str | Sequence[str] | None = None,
        seed: int = 0,
        with_targets: bool = True,
        teacher_pixels: int | None = None,
        partial: bool = False,
        scale_boxes: bool = False,
        skip_unreadable: bool = False,
    ) -> None:
        found = images if isinstance(images, ImageSet) else scan(images)
        self.store = store
        names = [teacher] if teacher is None or isinstance(teacher, str) else list(teacher)
        if len(set(names)) != len(names):
            raise RequestError(f"teacher {', '.join(map(str, names))}: a column is named twice")
        self.columns = [store.column(name) for name in names] if with_targets else []
        self.by_name = teacher is not None and not isinstance(teacher, str)
        rows = store.rows
        for column in self.columns:
            if not partial:
                column.require_complete()
            rows = np.intersect1d(rows, column.rows, assume_unique=True)
        if crops_per_image > store.crops_per_image:
            raise RequestError(
                f"crops_per_image {crops_per_image}: {store.folder} holds {store.crops_per_image} crops of each image"
            )
        if not len(rows):
            raise StoreError(
                f"{store.folder}: holds no finished {'targets' if self.columns else 'crops'}; run fkd-ssl precompute"
            )
        self.root: Path = found.root
        self.classes = found.classes
        positions = _positions(store, rows, found)
        self.labels = found.labels[positions]
        self._spelled: dict[int, str] = {
            k: found.on_disk[p] for k, p in enumerate(positions.tolist()) if found.on_disk[p] != found.paths[p]
        }
        self._rows = rows
        self.seed = seed
        self.scale_boxes = scale_boxes
        super().__init__(len(rows), crops_per_image, pixels, teacher_pixels, skip_unreadable=skip_unreadable)

    def _index(self, pass_: int, i: int) -> slice | npt.NDArray[np.int64]:
        """Which crops a pass reads of an image; a slice, which is read without a copy, unless they wrap around."""
        c, m = self.store.crops_per_image, self.crops_per_image
        digest = hashlib.blake2b(f"{self.seed}\n{self._path(i)}".encode(), digest_size=8, person=b"start").digest()
        first = (int.from_bytes(digest, "little") + pass_ * m) % c
        return slice(first, first + m) if first + m <= c else np.arange(first, first + m) % c

    def _read(self, i: int, path: str) -> UInt8Array:
        data = read_bytes(path)
        expected = self.store.sizes["bytes"][self._rows[i]]
        if len(data) != expected and not self.scale_boxes:
            raise ImageError(
                f"{path}: changed since the store was made: {len(data)} bytes now, {expected} then; restore it, or "
                "if these are smaller copies of the store's images, ask for --scale_boxes"
            )
        return decode(data, path)

    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        row = int(self._rows[i])
        records = self.store.crops(row, self._index(pass_, i))
        if self.scale_boxes:
            size = self.store.sizes[row]
            return scaled(records, (int(size["height"]), int(size["width"])), (height, width))
        return records

    def _targets(self, pairs: list[tuple[int, int]]) -> Targets | None:
        if not self.columns:
            return None
        where = [(int(self._rows[i]), self._index(pass_, i)) for pass_, i in pairs]
        targets = {
            column.name: torch.from_numpy(column.codec.decode(np.concatenate([column.codes(*place) for place in where])))
            for column in self.columns
        }
        return targets if self.by_name else targets[self.columns[0].name]

    def _file(self, i: int) -> str:
        return f"{self.root}/{self._spelled.get(i) or self._path(i)}"

    def _path(self, i: int) -> str:
        return self.store.paths[int(self._rows[i])]

    def _label(self, i: int) -> int:
        return int(self.labels[i])


def _positions(store: Store, rows: npt.NDArray[np.int64], images: ImageSet) -> npt.NDArray[np.int64]:
    """Where each of these rows' images is in an image set: int64 [len(rows)]; StoreError where one is missing."""
    if store.paths.same_as(images.paths):  # the usual case: a million names need not be told apart
        return rows
    where = {path: k for k, path in enumerate(images.paths)}
    names = [store.paths[row] for row in rows.tolist()]
    absent = [path for path in names if path not in where]
    if absent:
        raise StoreError(
            f"{images.root}: lacks {len(absent)} of the {len(rows)} images of {store.folder}, for instance "
            f"{absent[0]!r}: give the folder that the store was made from"
        )
    return np.array([where[path] for path in names], dtype=np.int64)


class FreshCrops(Crops):
    """Crops drawn anew in every pass, from a recipe: what online distillation reads. They go through the same record.

    Args:
        images: The image set.
        recipe: What crops are drawn from.
        crops_per_image: M.
        pixels: P, the side of the crops.
        seed: Of the draw; no store draws the same crops.
        teacher_pixels: Side at which the crops are made once more, for the teacher.
        skip_unreadable: As in StoredCrops.
    """

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        *,
        crops_per_image: int = 4,
        pixels: int = 224,
        seed: int = 0,
        teacher_pixels: int | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        self.images = images
        self.recipe = recipe
        self._draw_seed = int.from_bytes(hashlib.blake2b(f"fresh {seed}".encode(), digest_size=8).digest(), "little")
        super().__init__(len(images), crops_per_image, pixels, teacher_pixels, skip_unreadable=skip_unreadable)

    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        key = image_key(self._draw_seed, self._path(i))
        return draw(self.recipe, key, height, width, pass_ * self.crops_per_image, self.crops_per_image)

    def _file(self, i: int) -> str:
        return f"{self.images.root}/{self.images.on_disk[i]}"

    def _path(self, i: int) -> str:
        return self.images.paths[i]

    def _label(self, i: int) -> int:
        return int(self.images.labels[i])


class Samples(Sequence[Batch]):
    """What was read at once: a list of images, each a view into `batch`, made when it is asked for."""

    def __init__(self, batch: Batch, crops_per_image: int) -> None:
        self.batch = batch
        self._m = crops_per_image

    def __len__(self) -> int:
        return len(self.batch["paths"])

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        k, m = range(len(self))[index], self._m
        stacked = [key for key in ("images", "teacher_images", "targets") if key in self.batch]
        crops: Batch = {key: _rows_of(self.batch[key], slice(k * m, (k + 1) * m)) for key in stacked}
        return {**crops, "label": int(self.batch["labels"][k]), "path": self.batch["paths"][k]}


def scaled(records: Records, stored: tuple[int, int], found: tuple[int, int]) -> Records:
    """Records whose boxes fit a smaller copy of their image.

    Args:
        records: Crop records [M].
        stored: Height and width of the image that they were drawn for.
        found: Height and width of the copy.

    Raises:
        ImageError: The copy has another shape, so that it is a copy of something else, or was cut.
    """
    if found == stored:
        return records
    (height, width), (h, w) = stored, found
    if abs(h * width - w * height) > max(height, width):  # one side is at most one pixel off the other's scale
        raise ImageError(f"{w} x {h} pixels, and the store's image has {width} x {height}: no scaled copy of it")
    copies = records.copy()
    for first, length, before, now in (("top", "height", height, h), ("left", "width", width, w)):
        start = records[first].astype(np.int64)
        end = start + records[length]
        copies[first] = start = np.rint(start * (now / before)).astype(np.int64).clip(0, now - 1)
        copies[length] = np.rint(end * (now / before)).astype(np.int64).clip(start + 1, now) - start
    return copies


def _new_views(count: int, pixels: int) -> torch.Tensor:
    """An empty uint8 [count, P, P, 3]; in a worker in shared memory, where its parent reads it without a copy."""
    shape = (count, pixels, pixels, 3)
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))  # NumPy asks for huge pages, which torch does not
    # what torch's own default_collate does in a worker; there is no public name for it
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _rows_of(stacked: Targets, rows: slice) -> Targets:
    return {name: part[rows] for name, part in stacked.items()} if isinstance(stacked, dict) else stacked[rows]


def whole_batch(samples: Any) -> Batch:
    """The collate function that keeps the batch as it was read: `images` [B M, 3, P, P], `targets` [B M, D]."""
    batch: Batch = samples.batch
    return batch


def start_worker(worker: int) -> None:
    """Start-up of a DataLoader's worker process: one thread for faiss."""
    import faiss

    faiss.omp_set_num_threads(1)
