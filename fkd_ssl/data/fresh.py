"""Fresh crops: drawn again in every pass."""

import hashlib

from fkd_ssl.crops import Recipe, Records, draw, image_key
from fkd_ssl.data.contents import Contents
from fkd_ssl.data.crops import Crops
from fkd_ssl.images import ImageSource


class FreshCrops(Crops):
    """Crops that are drawn from a recipe in every pass, for online distillation. Their records have the form of stored ones.

    Args:
        images: The image set.
        recipe: The recipe that crops are drawn from.
        crops_per_image: Number of crops per image M.
        pixels: P, the side of the crops.
        seed: Seed of the crops. They differ from the crops of a store with the same seed.
        teacher_pixels: Side of a second set of the same crops, for the teacher.
        skip_unreadable: As in StoredCrops.
        decode_only: As in StoredCrops.
        contents: As in Crops.
    """

    def __init__(
        self,
        images: ImageSource,
        recipe: Recipe,
        *,
        crops_per_image: int = 4,
        pixels: int = 224,
        seed: int = 0,
        teacher_pixels: int | None = None,
        skip_unreadable: bool = False,
        decode_only: bool = False,
        contents: Contents | None = None,
    ) -> None:
        self.recipe = recipe
        self._draw_seed = int.from_bytes(hashlib.blake2b(f"fresh {seed}".encode(), digest_size=8).digest(), "little")
        super().__init__(
            images,
            range(len(images)),
            crops_per_image=crops_per_image,
            pixels=pixels,
            teacher_pixels=teacher_pixels,
            skip_unreadable=skip_unreadable,
            decode_only=decode_only,
            contents=contents,
        )

    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        key = image_key(self._draw_seed, self.name(i))
        return draw(self.recipe, key, height, width, pass_ * self.crops_per_image, self.crops_per_image)
