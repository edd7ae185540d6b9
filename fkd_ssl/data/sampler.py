"""The order of images: an endless sequence of permutations, cut into equal batches; it depends only on seed and step."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from fkd_ssl.arrays import Int64Array
from fkd_ssl.crops import image_key

Pairs = list[tuple[int, int]]


class PassSampler(Sampler[Pairs]):
    """Batches of (pass, image) for every step of a training; the `batch_sampler` of a DataLoader over `Crops`.

    The permutations of all passes are concatenated and cut into global batches; each rank takes every `world`-th image of a
    batch. Nothing is dropped or padded, and the batch of any step can be computed without the batches before it.

    In the last `single` steps a batch has one crop per image instead of M, and so M times as many images. A pass is then one
    crop of each image, and passes are numbered as if all earlier passes had one crop too, so that pass p reads crop p.

    Args:
        length: Number of images.
        batch_images: Images in a global batch.
        steps: Number of steps of the training.
        seed: Seed of the permutations.
        rank: Rank of this process.
        world: Number of processes; it must divide `batch_images`.
        parts: Number of parts that a step's batch is split into.
        single: Number of steps at the end with one crop per image, for a data set that reads such passes (`fkd-ssl train`).
        crops_per_image: M; used only if `single` is positive.

    Attributes:
        start: The step that iteration starts from, for a resumed training.
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
        self.first_single_step = steps - single
        self.crops_per_image = crops_per_image
        self.start = 0
        self.set_rank(rank, world)

    def set_rank(self, rank: int, world: int) -> None:
        """Sets the rank and the number of processes; raises ValueError if `world` x `parts` does not divide a batch."""
        if self.batch_images % (world * self.parts):
            each = "" if self.parts == 1 else f" of {self.parts} parts"
            raise ValueError(f"{world} processes{each} do not divide a batch of {self.batch_images} images")
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        """Number of batches of the whole training, even if it is resumed, since Lightning counts earlier steps itself."""
        return self.steps * self.parts

    def __iter__(self) -> Iterator[Pairs]:
        for step in range(self.start, self.steps):
            batch = self.batch(step)
            size = len(batch) // self.parts
            yield from (batch[first : first + size] for first in range(0, len(batch), size))

    def is_single(self, pass_: int) -> bool:
        """Whether a pass reads one crop per image."""
        return self.first_single_step < self.steps and pass_ >= self._first_single

    def batch(self, step: int) -> Pairs:
        """This rank's part of a step's batch."""
        size, first, before = self.batch_images, step * self.batch_images, 0
        if step >= self.first_single_step:
            size *= self.crops_per_image
            first, before = (step - self.first_single_step) * size, self._first_single
        split = (divmod(position, self.length) for position in range(first + self.rank, first + size, self.world))
        return [(before + p, int(permutation(self.seed, before + p, self.length)[k])) for p, k in split]

    @property
    def _first_single(self) -> int:
        """The first single-crop pass: after all crops that were read before, including those of an unfinished pass."""
        return -(-self.first_single_step * self.batch_images // self.length) * self.crops_per_image


@lru_cache(maxsize=4)
def permutation(seed: int, pass_: int, length: int) -> Int64Array:
    """The order of `length` images in a pass: int64 [length], from sorting raw output of Philox."""
    key = int.from_bytes(image_key(seed, f"pass {pass_}"), "little")
    words = np.random.Philox(key=key).random_raw(length)
    return np.argsort(words, kind="stable")
