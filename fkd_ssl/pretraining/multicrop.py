"""SwAV's multi-crop (arXiv 2006.09882, section 3.2): two large crops of an image and several small ones, one decode for all."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fkd_ssl.crops import RECIPES, Recipe, draw, image_key, replay_into
from fkd_ssl.data import Batch
from fkd_ssl.errors import ImageError
from fkd_ssl.images import ImageSource

LARGE = RECIPES["swav"]
SMALL = Recipe(**{**LARGE.__dict__, "name": "swav_small", "scale": (0.05, LARGE.scale[0])})
"""The recipe of SwAV's small crops: they cover 5 to 14 % of the image, the large ones 14 to 100 %.

Their blur scales with the crop, as all blur does here; SwAV's code takes the same 0.1 to 2 pixels for both sizes.
"""


def small_side(pixels: int) -> int:
    """The side of the small crops, SwAV's 96 for 224."""
    return max(1, round(pixels * 96 / 224))


class MultiCrops(Dataset[Batch]):
    """Large and small crops of each image, drawn anew in every pass and replayed as everywhere in this library.

    Args:
        images: The image set.
        pixels: Side P of the large crops.
        small_crops: S, small crops of each image.
        seed: Of the draw.
    """

    def __init__(self, images: ImageSource, *, pixels: int, small_crops: int, seed: int = 0) -> None:
        self.images = images
        self.kinds = ((LARGE, 2, pixels), (SMALL, small_crops, small_side(pixels)))
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch:
        """The crops of B images, by (pass, image).

        Returns:
            `images` uint8 [2 B, 3, P, P] and `small_images` uint8 [S B, 3, p, p], the crops of an image side by side, in
            channels-last memory.

        Raises:
            ImageError: An image is missing or unreadable; the message names it.
        """
        views = [np.empty((len(indices) * count, side, side, 3), dtype=np.uint8) for _, count, side in self.kinds]
        for k, (pass_, i) in enumerate(indices):
            image = self.images.pixels(i)
            for (recipe, count, _), array in zip(self.kinds, views, strict=True):
                seed = hashlib.blake2b(f"{recipe.name} {self.seed}".encode(), digest_size=8).digest()
                key = image_key(int.from_bytes(seed, "little"), self.images.names[i])
                records = draw(recipe, key, image.shape[0], image.shape[1], pass_ * count, count)
                try:
                    replay_into(array[k * count : (k + 1) * count], image, records)
                except ImageError as error:
                    raise ImageError(f"{self.images.where(i)}: {error}") from error
        large, small = (torch.from_numpy(array).permute(0, 3, 1, 2) for array in views)
        return {"images": large, "small_images": small}


def as_read(batch: Any) -> Batch:
    """The collate function that keeps the batch as it was read."""
    read: Batch = batch
    return read
