"""The crops of a batch, as pixels or as plans from which a device makes them."""

from typing import Any, Protocol

from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops import Records, replay_into
from fkd_ssl.crops.device import CropPlan, PendingCrops, concatenate, plan_crops, replay_plan
from fkd_ssl.data import memory

Batch = dict[str, Any]
Sides = dict[str, int]  # side of the crops by their key in a batch: images, and teacher_images if their size differs


class Pixels(Protocol):
    """Container for the crops of a batch."""

    def put(self, k: int, image: UInt8Array, records: Records) -> None:
        """Adds the crops of the k-th image. Raises ImageError if a record does not fit it."""

    def repeat(self, k: int, other: int) -> None:
        """Replaces the crops of the k-th image by those of another one."""

    def tensors(self) -> Batch:
        """Returns the entries of the batch."""


class Replayed:
    """Crops made by this process, uint8 [B M, 3, P, P] in channels-last memory for each side."""

    def __init__(self, count: int, crops_per_image: int, sides: Sides) -> None:
        self._m = crops_per_image
        self._views = {name: memory.empty(count * crops_per_image, side, side, 3) for name, side in sides.items()}
        self._arrays: list[UInt8Array] = [views.numpy() for views in self._views.values()]

    def put(self, k: int, image: UInt8Array, records: Records) -> None:
        """Makes the crops of the k-th image. Raises ImageError if a record is invalid."""
        for array in self._arrays:
            replay_into(array[self._of(k)], image, records)

    def repeat(self, k: int, other: int) -> None:
        """Replaces the crops of the k-th image by those of another one."""
        for array in self._arrays:
            array[self._of(k)] = array[self._of(other)]

    def tensors(self) -> Batch:
        """Returns the crops, by their key in the batch."""
        return {name: views.permute(0, 3, 1, 2) for name, views in self._views.items()}

    def _of(self, k: int) -> slice:
        return slice(k * self._m, (k + 1) * self._m)


class Planned:
    """Decoded images and plans of their crops, which `replay_on_device` makes."""

    def __init__(self, count: int, crops_per_image: int, sides: Sides) -> None:
        self._sides = sides
        self._crops: list[PendingCrops | None] = [None] * count

    def put(self, k: int, image: UInt8Array, records: Records) -> None:
        """Adds the k-th image and the records of its crops. Raises ImageError if a box is not inside the image."""
        self._crops[k] = PendingCrops(image=image, records=records)

    def repeat(self, k: int, other: int) -> None:
        """Replaces the k-th image and its crops by another one."""
        self._crops[k] = self._crops[other]

    def tensors(self) -> Batch:
        """Returns a CropPlan for each key of the batch. The plans share the pixels of the images."""
        crops = [of_image for of_image in self._crops if of_image is not None]
        sources = concatenate(crops, memory.empty(sum(of_image.image.size for of_image in crops)))
        return {name: plan_crops(crops, side, sources) for name, side in self._sides.items()}


def replay_on_device(batch: Batch) -> Batch:
    """Returns the batch with crops in place of their plans; the crops are made on the device of the plans."""
    return {key: replay_plan(value) if isinstance(value, CropPlan) else value for key, value in batch.items()}
