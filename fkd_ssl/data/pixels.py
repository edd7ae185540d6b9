"""What a batch holds of its crops' pixels: the crops themselves, or decoded images for a device to crop."""

from typing import Any

import numpy as np

from fkd_ssl.crops import Records, replay_into, unpack
from fkd_ssl.data import memory
from fkd_ssl.images import UInt8Array

Batch = dict[str, Any]
Sides = dict[str, int]  # of the crops, by what a batch calls them: images, and teacher_images of another size


class Replayed:
    """Crops made here: each side's is uint8 [B M, 3, P, P] in channels-last memory."""

    def __init__(self, count: int, crops_per_image: int, sides: Sides) -> None:
        self._m = crops_per_image
        self._views = {name: memory.new(count * crops_per_image, side, side, 3) for name, side in sides.items()}
        self._arrays: list[UInt8Array] = [views.numpy() for views in self._views.values()]

    def put(self, k: int, image: UInt8Array, records: Records) -> None:
        """The k-th image's crops; raises ImageError where a record is impossible."""
        for array in self._arrays:
            replay_into(array[self._of(k)], image, records)

    def repeat(self, k: int, other: int) -> None:
        """Another image's crops in the k-th one's place."""
        for array in self._arrays:
            array[self._of(k)] = array[self._of(other)]

    def tensors(self) -> Batch:
        """What the batch has of them."""
        return {name: views.permute(0, 3, 1, 2) for name, views in self._views.items()}

    def _of(self, k: int) -> slice:
        return slice(k * self._m, (k + 1) * self._m)


class Decoded:
    """Images for `replay_planned`: their pixels one after the other, and a plan of each side's crops."""

    def __init__(self, count: int, crops_per_image: int, sides: Sides) -> None:
        self._sides = sides
        self._images: list[UInt8Array | None] = [None] * count
        self._records: list[Records | None] = [None] * count

    def put(self, k: int, image: UInt8Array, records: Records) -> None:
        """The k-th image and its crops' records; raises ImageError where one is impossible."""
        unpack(records, *image.shape[:2])
        self._images[k], self._records[k] = image, records

    def repeat(self, k: int, other: int) -> None:
        """Another image and its crops in the k-th one's place."""
        self._images[k], self._records[k] = self._images[other], self._records[other]

    def tensors(self) -> Batch:
        """What the batch has of them."""
        from fkd_ssl.crops.device import plan

        images = [image for image in self._images if image is not None]
        records = [of_image for of_image in self._records if of_image is not None]
        sources = memory.new(sum(image.size for image in images))
        np.concatenate([image.reshape(-1) for image in images], out=sources.numpy())
        shapes = [(image.shape[0], image.shape[1]) for image in images]
        plans = {name: plan(shapes, records, side) for name, side in self._sides.items()}
        return {"sources": sources, "plans": plans, "sides": self._sides}


def made_here(batch: Batch) -> Batch:
    """A batch of `Decoded` as one of `Replayed`, its crops made on the device where it lies; any other one as it is."""
    if "sources" not in batch:
        return batch
    from fkd_ssl.crops.device import replay_planned

    left = {key: value for key, value in batch.items() if key not in ("sources", "plans", "sides")}
    for name, side in batch["sides"].items():
        left[name] = replay_planned(batch["sources"], batch["plans"][name], side)
    return left
