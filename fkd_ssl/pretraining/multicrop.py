"""SwAV's multi-crop (arXiv 2006.09882, section 3.2): two large crops of an image and several small ones, one decode for all."""

import hashlib

import numpy as np

from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops import RECIPES, Recipe, Records, draw, image_key
from fkd_ssl.data import Batch, FreshCrops
from fkd_ssl.data.pixels import Pixels, Replayed
from fkd_ssl.images import ImageSource

LARGE = RECIPES["swav"]
SMALL = Recipe(**{**LARGE.__dict__, "name": "swav_small", "scale": (0.05, LARGE.scale[0])})
"""The recipe of SwAV's small crops: they cover 5 to 14 % of the image, the large ones 14 to 100 %.

Their blur scales with the crop, as all blur does here; SwAV's code takes the same 0.1 to 2 pixels for both sizes.
"""


def small_side(pixels: int) -> int:
    """The side of the small crops, SwAV's 96 for 224."""
    return max(1, round(pixels * 96 / 224))


class MultiCrops(FreshCrops):
    """Large and small crops of each image, drawn anew in every pass and replayed as everywhere in this library.

    A batch has `images` uint8 [2 B, 3, P, P] and `small_images` uint8 [S B, 3, p, p], the crops of an image side by side, in
    channels-last memory.

    Args:
        images: The image set.
        pixels: Side P of the large crops.
        small_crops: S, small crops of each image.
        seed: Of the draw.
        skip_unreadable: As in StoredCrops.
    """

    def __init__(
        self, images: ImageSource, *, pixels: int, small_crops: int, seed: int = 0, skip_unreadable: bool = False
    ) -> None:
        super().__init__(images, LARGE, crops_per_image=2, pixels=pixels, seed=seed, skip_unreadable=skip_unreadable)
        self.kinds = ((LARGE, 2), (SMALL, small_crops))
        self.seed = seed

    def _new_pixels(self, count: int) -> Pixels:
        (_, large), (_, small) = self.kinds
        return _LargeAndSmall(
            Replayed(count, large, {"images": self.pixels}),
            Replayed(count, small, {"small_images": small_side(self.pixels)}),
            large,
        )

    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        drawn = []
        for recipe, count in self.kinds:
            seed = hashlib.blake2b(f"{recipe.name} {self.seed}".encode(), digest_size=8).digest()
            key = image_key(int.from_bytes(seed, "little"), self.name(i))
            drawn.append(draw(recipe, key, height, width, pass_ * count, count))
        return np.concatenate(drawn)


class _LargeAndSmall:
    """Takes the first records of an image as large crops, `count` of them, and the others as small ones."""

    def __init__(self, large: Replayed, small: Replayed, count: int) -> None:
        self._large, self._small, self._count = large, small, count

    def put(self, k: int, image: UInt8Array, records: Records) -> None:
        self._large.put(k, image, records[: self._count])
        self._small.put(k, image, records[self._count :])

    def repeat(self, k: int, other: int) -> None:
        self._large.repeat(k, other)
        self._small.repeat(k, other)

    def tensors(self) -> Batch:
        return {**self._large.tensors(), **self._small.tensors()}
