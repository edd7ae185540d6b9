"""Data sets of crops: stored ones with their targets, or fresh ones; both read an image once for all its crops."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

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

    def __init__(self, length: int, crops_per_image: int, pixels: int, teacher_pixels: int | None = None) -> None:
        if crops_per_image < 1 or pixels < 1:
            raise RequestError(f"crops_per_image {crops_per_image} and pixels {pixels} must be at least 1")
        self._length = length
        self.crops_per_image = crops_per_image
        self.pixels = pixels
        self.teacher_pixels = None if teacher_pixels == pixels else teacher_pixels

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
            another; `labels` int64 [B]; `paths`.

        Raises:
            ImageError: An image is missing, unreadable or changed; the message names it.
        """
        pairs = [index if isinstance(index, tuple) else (0, index) for index in indices]
        m = self.crops_per_image
        views = np.empty((len(pairs) * m, self.pixels, self.pixels, 3), dtype=np.uint8)
        large = self.teacher_pixels
        teacher_views = None if large is None else np.empty((len(pairs) * m, large, large, 3), dtype=np.uint8)
        for k, (pass_, i) in enumerate(pairs):
            image = self._read(i)
            records = self._records(pass_, i, image.shape[0], image.shape[1])
            try:
                replay_into(views[k * m : (k + 1) * m], image, records)
                if teacher_views is not None:
                    replay_into(teacher_views[k * m : (k + 1) * m], image, records)
            except ImageError as error:
                raise ImageError(f"{self._file(i)}: {error}") from error
        batch: Batch = {
            "images": torch.from_numpy(views).permute(0, 3, 1, 2),
            "labels": torch.tensor([self._label(i) for _, i in pairs]),
            "paths": [self._path(i) for _, i in pairs],
        }
        if teacher_views is not None:
            batch["teacher_images"] = torch.from_numpy(teacher_views).permute(0, 3, 1, 2)
        targets = self._targets(pairs)
        if targets is not None:
            batch["targets"] = targets
        return Samples(batch, m)

    def _read(self, i: int) -> UInt8Array:
        return decode(read_bytes(self._file(i)), self._file(i))

    def _targets(self, pairs: list[tuple[int, int]]) -> Targets | None:
        return None

    @abstractmethod
    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        """Records [M] of an image in a pass."""

    @abstractmethod
    def _file(self, i: int) -> Path: ...

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
    ) -> None:
        found = images if isinstance(images, ImageSet) else scan(images)
        self.store = store
        names = [teacher] if teacher is None or isinstance(teacher, str) else list(teacher)
        if len(set(names)) != len(names):
            raise RequestError(f"teacher {', '.join(map(str, names))}: a column is named twice")
        self.columns = [store.column(name) for name in names] if with_targets else []
        self.by_name = teacher is not None and not isinstance(teacher, str)
        for column in self.columns:
            column.require_complete()
        if crops_per_image > store.crops_per_image:
            raise RequestError(
                f"crops_per_image {crops_per_image}: {store.folder} holds {store.crops_per_image} crops of each image"
            )
        where = {path: k for k, path in enumerate(found.paths)}
        absent = [path for path in (store.paths[row] for row in store.rows) if path not in where]
        if absent:
            raise StoreError(
                f"{found.root}: lacks {len(absent)} of the {len(store)} images of {store.folder}, for instance "
                f"{absent[0]!r}: give the folder that the store was made from"
            )
        if not len(store):
            raise StoreError(f"{store.folder}: holds no finished crops; run fkd-ssl precompute")
        self.root: Path = found.root
        self.classes = found.classes
        positions = np.array([where[store.paths[row]] for row in store.rows])
        self.labels = found.labels[positions]
        self._spelled: dict[int, str] = {
            int(k): found.on_disk[p] for k, p in enumerate(positions) if found.on_disk[p] != found.paths[p]
        }
        self._rows = store.rows
        self.seed = seed
        super().__init__(len(store), crops_per_image, pixels, teacher_pixels)

    def _index(self, pass_: int, i: int) -> npt.NDArray[np.int64]:
        c, m = self.store.crops_per_image, self.crops_per_image
        digest = hashlib.blake2b(f"{self.seed}\n{self._path(i)}".encode(), digest_size=8, person=b"start").digest()
        return (int.from_bytes(digest, "little") % c + pass_ * m + np.arange(m)) % c

    def _read(self, i: int) -> UInt8Array:
        data = read_bytes(self._file(i))
        if len(data) != self.store.sizes[self._rows[i]]["bytes"]:
            raise ImageError(f"{self._file(i)}: changed since the store was made: {len(data)} bytes now")
        return decode(data, self._file(i))

    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        return self.store.crops(int(self._rows[i]), self._index(pass_, i))

    def _targets(self, pairs: list[tuple[int, int]]) -> Targets | None:
        if not self.columns:
            return None
        where = [(int(self._rows[i]), self._index(pass_, i)) for pass_, i in pairs]
        targets = {
            column.name: torch.from_numpy(column.codec.decode(np.concatenate([column.codes(*place) for place in where])))
            for column in self.columns
        }
        return targets if self.by_name else targets[self.columns[0].name]

    def _file(self, i: int) -> Path:
        return self.root / self._spelled.get(i, self._path(i))

    def _path(self, i: int) -> str:
        return self.store.paths[int(self._rows[i])]

    def _label(self, i: int) -> int:
        return int(self.labels[i])


class FreshCrops(Crops):
    """Crops drawn anew in every pass, from a recipe: what online distillation reads. They go through the same record.

    Args:
        images: The image set.
        recipe: What crops are drawn from.
        crops_per_image: M.
        pixels: P, the side of the crops.
        seed: Of the draw; no store draws the same crops.
        teacher_pixels: Side at which the crops are made once more, for the teacher.
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
    ) -> None:
        self.images = images
        self.recipe = recipe
        self._draw_seed = int.from_bytes(hashlib.blake2b(f"fresh {seed}".encode(), digest_size=8).digest(), "little")
        super().__init__(len(images), crops_per_image, pixels, teacher_pixels)

    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        key = image_key(self._draw_seed, self._path(i))
        return draw(self.recipe, key, height, width, pass_ * self.crops_per_image, self.crops_per_image)

    def _file(self, i: int) -> Path:
        return self.images.file(i)

    def _path(self, i: int) -> str:
        return self.images.paths[i]

    def _label(self, i: int) -> int:
        return int(self.images.labels[i])


class Samples(list[Batch]):
    """What was read at once: a list of images, each a view into `batch`."""

    def __init__(self, batch: Batch, crops_per_image: int) -> None:
        self.batch = batch
        m = crops_per_image
        stacked = [key for key in ("images", "teacher_images", "targets") if key in batch]
        super().__init__(
            {
                **{key: _rows_of(batch[key], slice(k * m, (k + 1) * m)) for key in stacked},
                "label": int(batch["labels"][k]),
                "path": path,
            }
            for k, path in enumerate(batch["paths"])
        )


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
