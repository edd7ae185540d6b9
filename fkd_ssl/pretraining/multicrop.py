"""SwAV's multi-crop (arXiv 2006.09882, section 3.2): two large and several small crops per image, decoded once."""

import hashlib

import numpy as np

from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops import RECIPES, Recipe, Records, draw, image_key
from fkd_ssl.data import Batch, FreshCrops
from fkd_ssl.data.pixels import Pixels, Replayed
from fkd_ssl.images import ImageSource

LARGE = RECIPES["swav"]
SMALL = Recipe(**{**LARGE.__dict__, "name": "swav_small", "scale": (0.05, LARGE.scale[0])})
"""The recipe of SwAV's small crops, which cover 5 to 14 % of the image; large crops cover 14 to 100 %.

The blur scales with the crop, as in all recipes here; SwAV's code uses 0.1 to 2 pixels for both sizes.
"""


def small_side(pixels: int) -> int:
    """The side of the small crops: 96 for 224, as in SwAV."""
    return max(1, round(pixels * 96 / 224))


class MultiCrops(FreshCrops):
    """Large and small crops of each image, which are drawn in every pass.

    A batch has `images` uint8 [2 B, 3, P, P] and `small_images` uint8 [S B, 3, p, p] in channels-last memory format; crops of
    the same image are adjacent.

    Args:
        images: The image set.
        pixels: Side P of the large crops.
        small_crops: S, number of small crops per image.
        seed: Seed of the crops.
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
    """Makes large crops from the first `count` records of an image and small crops from the others."""

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
