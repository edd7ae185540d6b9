"""Fresh crops with targets from ReLabel's label maps."""

import numpy as np
import torch
from torch import Tensor

from fkd_ssl.crops import Recipe
from fkd_ssl.data.contents import Contents
from fkd_ssl.data.fresh import FreshCrops
from fkd_ssl.data.pixels import Batch
from fkd_ssl.errors import ImageError
from fkd_ssl.images import ImageSource
from fkd_ssl.relabel.maps import LabelMaps


class RelabelledCrops(FreshCrops):
    """Crops that are drawn in every pass, with `targets` float32 [B M, K] pooled from the images' label maps at the boxes.

    Yun et al., "Re-labeling ImageNet", CVPR 2021 (arXiv 2101.05022).

    Args:
        images: The image set. The label maps may have more images.
        maps: The label maps.
        recipe: The recipe that crops are drawn from.
        crops_per_image: Number of crops per image M.
        pixels: P, the side of the crops.
        seed: Seed of the crops, which are the same as those of FreshCrops.
        teacher_pixels: Side of a second set of the same crops.
        skip_unreadable: As in StoredCrops.
        decode_only: As in StoredCrops.

    Raises:
        StoreError: An image has no label map; the message names the first.
    """

    def __init__(
        self,
        images: ImageSource,
        maps: LabelMaps,
        recipe: Recipe,
        *,
        crops_per_image: int = 4,
        pixels: int = 224,
        seed: int = 0,
        teacher_pixels: int | None = None,
        skip_unreadable: bool = False,
        decode_only: bool = False,
    ) -> None:
        self.maps = maps
        self._rows = maps.rows(images)
        super().__init__(
            images,
            recipe,
            crops_per_image=crops_per_image,
            pixels=pixels,
            seed=seed,
            teacher_pixels=teacher_pixels,
            skip_unreadable=skip_unreadable,
            decode_only=decode_only,
            contents=Contents(
                maps.image_checksums()[self._rows],
                maps.sizes["bytes"][self._rows].astype(np.int64),
                since="its label map was made",
                advice="restore it, or make label maps of these images",
            ),
        )

    def read(self, i: int) -> bytes:
        """Returns the encoded image `i`. Raises as `Crops.read` does, and ImageError if it has no label map."""
        if not self.maps.sizes["width"][self._rows[i]]:
            raise ImageError(
                f"{self.where(i)}: could not be read when the label maps were made; make label maps of these images"
            )
        return super().read(i)

    def _targets(self, pairs: list[tuple[int, int]]) -> Batch:
        return {"targets": torch.cat([self._pooled(pass_, i) for pass_, i in pairs])}

    def _pooled(self, pass_: int, i: int) -> Tensor:
        row = int(self._rows[i])
        size = self.maps.sizes[row]
        return self.maps.targets(row, self._records(pass_, i, int(size["height"]), int(size["width"])))
