"""Stored crops with their targets."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fkd_ssl.arrays import Int64Array
from fkd_ssl.crops import Records
from fkd_ssl.data.contents import Contents
from fkd_ssl.data.crops import Crops
from fkd_ssl.data.pixels import Batch
from fkd_ssl.errors import ImageError, RequestError, StoreError
from fkd_ssl.images import ImageSource, open_images
from fkd_ssl.store import Store, open_store
from fkd_ssl.text import plural


class StoredCrops(Crops):
    """The crops of a store, with the targets of one or more teachers.

    Pass p reads crops (start + p M + 0..M-1) mod C of an image, where start is a hash of the seed and the image. Every crop is
    used once before any is used twice.

    Args:
        store: An opened store, or its folder.
        images: The image set, or an argument of `open_images`. It may have more images than the store.
        crops_per_image: Number of crops per image M.
        pixels: P, the side of the crops. It may differ from the side that the teacher saw.
        column: Name of the column. Default: the only column. A list of names gives `targets` as a dict of float32 [M, D] by
            name, in the order of the list.
        seed: Seed of the starts.
        with_targets: False returns the crops only, for a teacher that runs online.
        teacher_pixels: Side of a second set of the same crops, for a teacher that runs online.
        partial: Allow a store that is still being written, and use the images of its finished shards. They are listed once;
            open the store again to use more.
        scale_boxes: The images are smaller copies of the store's images (made by fkd-ssl cache). Boxes are scaled to the size
            of a copy. The crops are then close to those that the teacher saw, but not identical.
        skip_unreadable: Replace a damaged or changed image with another one of its batch, and count it. An image that cannot
            be opened still raises an error, since it may be intact.
        decode_only: Return decoded images and plans of the crops, from which a device makes them.

    Raises:
        StoreError: A column is unknown or incomplete, a sidecar of crops is damaged, or an image of the store is missing from
            the image set.
        RequestError: A column is named twice, or `crops_per_image` is larger than the store's.
    """

    _every_pass = False  # whether to check the sha256 of images in every pass

    def __init__(
        self,
        store: str | os.PathLike[str] | Store,
        images: str | Path | ImageSource,
        *,
        crops_per_image: int = 4,
        pixels: int = 224,
        column: str | Sequence[str] | None = None,
        seed: int = 0,
        with_targets: bool = True,
        teacher_pixels: int | None = None,
        partial: bool = False,
        scale_boxes: bool = False,
        skip_unreadable: bool = False,
        decode_only: bool = False,
    ) -> None:
        opened = open_images(images)
        self.store = store = store if isinstance(store, Store) else open_store(store)
        names = [column] if column is None or isinstance(column, str) else list(column)
        if len(set(names)) != len(names):
            raise RequestError(f"column {','.join(map(str, names))}: a column is named twice")
        self.columns = [store.column(name) for name in names] if with_targets else []
        self.by_name = column is not None and not isinstance(column, str)
        rows = store.rows
        missing = store.manifest.shards - len(store.shards_with_crops())
        if missing and not partial:
            raise StoreError(
                f"{store.folder}: {missing} of {plural(store.manifest.shards, 'shard')} missing: run the "
                "same fkd-ssl precompute again to finish them"
            )
        for each in self.columns:
            if not partial:
                each.require_complete()
            rows = np.intersect1d(rows, each.rows, assume_unique=True)
        if crops_per_image > store.crops_per_image:
            raise RequestError(
                f"crops_per_image {crops_per_image}: {store.folder} holds {store.crops_per_image} crops of each image"
            )
        if not len(rows):
            raise StoreError(
                f"{store.folder}: holds no finished {'targets' if self.columns else 'crops'}; run fkd-ssl precompute"
            )
        self._rows = rows
        self._prefetcher = store.prefetcher(self.columns)
        self.seed = seed
        self.scale_boxes = scale_boxes
        super().__init__(
            opened,
            store.find_images(opened, rows),
            crops_per_image=crops_per_image,
            pixels=pixels,
            teacher_pixels=teacher_pixels,
            skip_unreadable=skip_unreadable,
            decode_only=decode_only,
            contents=None if scale_boxes else _contents(store, rows, every_pass=self._every_pass),
        )

    @property
    def groups(self) -> Int64Array:
        """The group of each image [N]: see `ImageSource.group`, or the shard if only the store is at a URL."""
        by_shard = self.store.remote is not None and not self.images.mix_groups
        return self.store.manifest.shards_of(self._rows) if by_shard else super().groups

    @property
    def mix_groups(self) -> int:
        """Number of groups that a training mixes by default; 0 mixes all images."""
        return self.images.mix_groups or self.store.mix_groups

    def expect(self, indices: Iterable[int]) -> None:
        """Fetches ahead what these images need, in order."""
        indices = list(indices)
        super().expect(indices)
        if self.store.remote is not None:
            self._prefetcher.expect(self.store.manifest.shards_of(self._rows[indices]).tolist())

    def _index(self, pass_: int, i: int) -> slice | Int64Array:
        """Returns the crops of an image that a pass reads: a slice, which needs no copy, unless they wrap around."""
        c, m, first = self.store.crops_per_image, self.crops_per_image, self._first(pass_, i)
        return slice(first, first + m) if first + m <= c else np.arange(first, first + m) % c

    def _first(self, pass_: int, i: int) -> int:
        """Returns the first crop of an image that a pass reads."""
        digest = hashlib.blake2b(f"{self.seed}\n{self.name(i)}".encode(), digest_size=8, person=b"start").digest()
        return (int.from_bytes(digest, "little") + pass_ * self.crops_per_image) % self.store.crops_per_image

    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        row = int(self._rows[i])
        records = self.store.crops(row, self._index(pass_, i))
        if self.scale_boxes:
            size = self.store.sizes[row]
            return scaled(records, (int(size["height"]), int(size["width"])), (height, width))
        return records

    def _targets(self, pairs: list[tuple[int, int]]) -> Batch:
        if not self.columns:
            return {}
        where = [(int(self._rows[i]), self._index(pass_, i)) for pass_, i in pairs]
        targets: dict[str, Tensor] = {
            column.name: torch.from_numpy(column.codec.decode(np.concatenate([column.codes(*place) for place in where])))
            for column in self.columns
        }
        return {"targets": targets if self.by_name else targets[self.columns[0].name]}


def _contents(store: Store, rows: Int64Array, *, every_pass: bool) -> Contents:
    """Returns the contents of the images of these rows when the store was made."""
    checksums = np.empty((len(rows), 32), dtype=np.uint8)
    for shard, here, within in store.by_shard(rows):
        checksums[here] = store.image_checksums(shard)[within]
    return Contents(
        checksums,
        store.sizes["bytes"][rows].astype(np.int64),
        since="the store was made",
        advice="restore it, or if these are smaller copies of the store's images, pass --scale_boxes",
        every_pass=every_pass,
    )


def scaled(records: Records, stored: tuple[int, int], found: tuple[int, int]) -> Records:
    """Scales the boxes of records to a smaller copy of their image.

    Args:
        records: Crop records [M].
        stored: Height and width of the image that they were drawn for.
        found: Height and width of the copy.

    Raises:
        ImageError: The copy has another aspect ratio, so it is cropped or belongs to another image.
    """
    if found == stored:
        return records
    (height, width), (h, w) = stored, found
    if abs(h * width - w * height) > max(height, width):  # allows for rounding by one pixel
        raise ImageError(f"{w} x {h} pixels: not a scaled copy of the store's image, which has {width} x {height}")
    copies = records.copy()
    for first, length, before, now in (("top", "height", height, h), ("left", "width", width, w)):
        start = records[first].astype(np.int64)
        end = start + records[length]
        copies[first] = start = np.rint(start * (now / before)).astype(np.int64).clip(0, now - 1)
        copies[length] = np.rint(end * (now / before)).astype(np.int64).clip(start + 1, now) - start
    return copies
