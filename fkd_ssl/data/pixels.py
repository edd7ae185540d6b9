"""What a batch holds of its crops' pixels: the crops themselves, or decoded images for a device to crop."""

from typing import Any

from fkd_ssl.crops import Records, replay_into
from fkd_ssl.crops.device import CropPlan, PendingCrops, concatenate, plan_crops, replay_plan
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


class Planned:
    """Decoded images and plans of their crops, which `replay_on_device` makes."""

    def __init__(self, count: int, crops_per_image: int, sides: Sides) -> None:
        self._sides = sides
        self._crops: list[PendingCrops | None] = [None] * count

    def put(self, k: int, image: UInt8Array, records: Records) -> None:
        """The k-th image and its crops' records; raises ImageError where one is impossible."""
        self._crops[k] = PendingCrops(image=image, records=records)

    def repeat(self, k: int, other: int) -> None:
        """Another image and its crops in the k-th one's place."""
        self._crops[k] = self._crops[other]

    def tensors(self) -> Batch:
        """A plan for each side, in the place of its crops."""
        crops = [of_image for of_image in self._crops if of_image is not None]
        sources = concatenate(crops, memory.new(sum(of_image.image.size for of_image in crops)))
        return {name: plan_crops(crops, side, sources) for name, side in self._sides.items()}


def replay_on_device(batch: Batch) -> Batch:
    """The batch with its planned crops made, on the device where the plans are."""
    return {key: replay_plan(value) if isinstance(value, CropPlan) else value for key, value in batch.items()}
