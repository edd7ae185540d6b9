"""The order of images: an endless row of permutations, cut into equal batches; a pure function of seed and step."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from fkd_ssl.arrays import Int64Array
from fkd_ssl.crops import image_key

Pairs = list[tuple[int, int]]


class PassSampler(Sampler[Pairs]):
    """Batches of (pass, image) for every step of a training.

    The passes' permutations are laid end to end and cut into global batches, of which the ranks take every `world`-th
    image: nothing is dropped or padded, and any step can be had without those before it.

    In the last `single` steps an image gives one crop in the place of M, so a batch has M times as many images. A pass then is
    one crop of each, and passes are counted on as if all before had been of one crop: pass p reads crop p from the start.

    Args:
        length: Images.
        batch_images: Images in a global batch.
        steps: Steps of the whole training.
        seed: Of the permutations.
        rank: Of this process.
        world: Processes; must divide `batch_images`.
        parts: Batches that a step's batch is given in, one after another.
        single: Last steps in which an image gives one crop.
        crops_per_image: M, where there are such steps.

    Attributes:
        start: Step that iteration starts from, for a training that is resumed.
    """

    def __init__(
        self,
        length: int,
        batch_images: int,
        steps: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        single: int = 0,
        crops_per_image: int = 1,
    ) -> None:
        self.length = length
        self.batch_images = batch_images
        self.steps = steps
        self.seed = seed
        self.parts = parts
        self.turn = steps - single
        self.crops_per_image = crops_per_image
        self.start = 0
        self.share(rank, world)

    def share(self, rank: int, world: int) -> None:
        """Takes the part of one process; raises ValueError where `world` processes of `parts` parts do not divide a batch."""
        if self.batch_images % (world * self.parts):
            each = "" if self.parts == 1 else f" of {self.parts} parts"
            raise ValueError(f"{world} processes{each} do not divide a batch of {self.batch_images} images")
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        """Batches of the whole training, also when it starts later: Lightning counts resumed steps itself."""
        return self.steps * self.parts

    def __iter__(self) -> Iterator[Pairs]:
        for step in range(self.start, self.steps):
            batch = self.batch(step)
            size = len(batch) // self.parts
            yield from (batch[first : first + size] for first in range(0, len(batch), size))

    def is_single(self, pass_: int) -> bool:
        """Whether a pass is one of those that read one crop of an image."""
        return self.turn < self.steps and pass_ >= self._first_single

    def batch(self, step: int) -> Pairs:
        """This rank's part of a step's batch."""
        size, first, before = self.batch_images, step * self.batch_images, 0
        if step >= self.turn:
            size *= self.crops_per_image
            first, before = (step - self.turn) * size, self._first_single
        split = (divmod(position, self.length) for position in range(first + self.rank, first + size, self.world))
        return [(before + p, int(permutation(self.seed, before + p, self.length)[k])) for p, k in split]

    @property
    def _first_single(self) -> int:
        """The first pass of one crop: behind all crops that were read before, also of a pass that was not finished."""
        return -(-self.turn * self.batch_images // self.length) * self.crops_per_image


@lru_cache(maxsize=4)
def permutation(seed: int, pass_: int, length: int) -> Int64Array:
    """The order of `length` images in a pass: int64 [length], by sorting Philox's raw words."""
    key = int.from_bytes(image_key(seed, f"pass {pass_}"), "little")
    words = np.random.Philox(key=key).random_raw(length)
    return np.argsort(words, kind="stable")
