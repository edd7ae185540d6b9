"""The order of images: an endless sequence of permutations, cut into equal batches; a pure function of seed and step."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from fkd_ssl.arrays import Int64Array
from fkd_ssl.crops import image_key

Pairs = list[tuple[int, int]]


class PassSampler(Sampler[Pairs]):
    """Batches of (pass, image) for every step of a training.

    The permutations of all passes are joined and cut into global batches, of which each rank takes every `world`-th image:
    nothing is dropped or padded, and the batch of any step is computed without those before it.

    In the last `single` steps an image gives one crop instead of M, so a batch has M times as many images. A pass is then one
    crop of each image, and passes are numbered as if all earlier ones had had one crop too: pass p reads crop p.

    Args:
        length: Number of images.
        batch_images: Images in a global batch.
        steps: Steps of the whole training.
        seed: Seed of the permutations.
        rank: Rank of this process.
        world: Number of processes; it must divide `batch_images`.
        parts: Number of batches in which a step's batch is given.
        single: Number of last steps in which an image gives one crop.
        crops_per_image: M; used if there are such steps.

    Attributes:
        start: The step that iteration starts from, for a training that is resumed.
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
        """Sets the rank; raises ValueError if `world` processes of `parts` parts do not divide a batch."""
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
        """Whether a pass reads one crop of an image."""
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
        """The first pass of one crop: after all crops that were read before, also in a pass that was not finished."""
        return -(-self.turn * self.batch_images // self.length) * self.crops_per_image


@lru_cache(maxsize=4)
def permutation(seed: int, pass_: int, length: int) -> Int64Array:
    """The order of `length` images in a pass: int64 [length], by sorting Philox's raw words."""
    key = int.from_bytes(image_key(seed, f"pass {pass_}"), "little")
    words = np.random.Philox(key=key).random_raw(length)
    return np.argsort(words, kind="stable")
