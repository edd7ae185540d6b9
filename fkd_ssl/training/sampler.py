"""The order of images: an endless row of permutations, cut into equal batches; a pure function of seed and step."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from fkd_ssl.crops import image_key


class PassSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (pass, image) for every step of a training.

    The passes' permutations are laid end to end and cut into global batches, of which the ranks take every `world`-th
    image: nothing is dropped or padded, and any step can be had without those before it.

    Args:
        length: Images.
        batch_images: Images in a global batch.
        steps: Steps of the whole training.
        seed: Of the permutations.
        rank: Of this process.
        world: Processes; must divide `batch_images`.

    Attributes:
        start: Step that iteration starts from, for a training that is resumed.
    """

    def __init__(self, length: int, batch_images: int, steps: int, *, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch_images % world:
            raise ValueError(f"{world} processes do not divide a batch of {batch_images} images")
        self.length = length
        self.batch_images = batch_images
        self.steps = steps
        self.seed = seed
        self.rank = rank
        self.world = world
        self.start = 0

    def __len__(self) -> int:
        """Steps of the whole training, also when it starts later: Lightning counts resumed steps itself."""
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.batch(step) for step in range(self.start, self.steps))

    def batch(self, step: int) -> list[tuple[int, int]]:
        """This rank's part of a step's batch."""
        first = step * self.batch_images
        positions = range(first + self.rank, first + self.batch_images, self.world)
        split = (divmod(position, self.length) for position in positions)
        return [(p, int(permutation(self.seed, p, self.length)[k])) for p, k in split]


@lru_cache(maxsize=4)
def permutation(seed: int, pass_: int, length: int) -> npt.NDArray[np.int64]:
    """The order of `length` images in a pass: int64 [length], by sorting Philox's raw words."""
    key = int.from_bytes(image_key(seed, f"pass {pass_}"), "little")
    words = np.random.Philox(key=key).random_raw(length)
    return np.argsort(words, kind="stable")
