"""The order of images: an endless sequence of permutations, cut into equal batches; it depends only on seed and step."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from fkd_ssl.arrays import Int64Array
from fkd_ssl.crops import image_key

Pairs = list[tuple[int, int]]
_ORDERS = 4  # orders of passes that are kept
_AHEAD = 100  # steps between the call of `expect` and the reading


class PassSampler(Sampler[Pairs]):
    """Batches of (pass, image) for every step of a training; the `batch_sampler` of a DataLoader over `Crops`.

    The permutations of all passes are concatenated and cut into global batches; each rank takes every `world`-th image of a
    batch. Nothing is dropped or padded, and the batch of any step can be computed without the batches before it.

    With `groups`, the groups come in a random order, and the images of `mix` groups at a time are mixed. A pass then reads, or
    fetches, each file that holds many images about once.

    In the last `single` steps, a batch has one crop per image instead of M, and M times as many images. Such a pass reads one
    crop of each image. It is counted as if each earlier pass were M passes of one crop, so that pass p reads crop p.

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
        groups: Group of each image [N], see `ImageSource.group`. Default: all images are mixed.
        mix: Number of groups that are mixed; used only with `groups`.
        expect: Called with the images that are read soon, see `Crops.expect`.

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
        groups: Int64Array | None = None,
        mix: int = 1,
        expect: Callable[[Iterable[int]], None] | None = None,
    ) -> None:
        self.length = length
        self.batch_images = batch_images
        self.steps = steps
        self.seed = seed
        self.parts = parts
        self.first_single_step = steps - single
        self.crops_per_image = crops_per_image
        self.groups = groups
        self.mix = mix
        self.expect = expect
        self._dense = None if groups is None else np.unique(groups, return_inverse=True)[1]
        self._orders: OrderedDict[int, Int64Array] = OrderedDict()
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
            if self.expect is not None:
                for near in range(step if step == self.start else step + _AHEAD, min(step + _AHEAD + 1, self.steps)):
                    self.expect(i for _, i in self.batch(near))
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
        return [(before + p, int(self._order(before + p)[k])) for p, k in split]

    def _order(self, pass_: int) -> Int64Array:
        """The order of the images in a pass: int64 [N]."""
        if self._dense is None:
            return permutation(self.seed, pass_, self.length)
        if pass_ not in self._orders:
            self._orders[pass_] = mixed(permutation(self.seed, pass_, self.length), self._dense, self.mix)
            while len(self._orders) > _ORDERS:
                self._orders.popitem(last=False)
        return self._orders[pass_]

    @property
    def _first_single(self) -> int:
        """The first single-crop pass: after all crops that were read before, including those of an unfinished pass."""
        return -(-self.first_single_step * self.batch_images // self.length) * self.crops_per_image


def mixed(order: Int64Array, groups: Int64Array, mix: int) -> Int64Array:
    """Rearranges a random order of images so that `mix` groups at a time come together, in random order: int64 [N].

    Groups come in the order of their first images. If `mix` is at least the number of groups, the order does not change.

    Args:
        order: The order [N].
        groups: Group of each image [N], numbered from 0.
        mix: Number of groups that are mixed.
    """
    in_order = groups[order]
    first = np.full(int(groups.max()) + 1, len(order))  # groups without images come last
    first[in_order[::-1]] = np.arange(len(order))[::-1]  # the last assignment stays
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    block = rank // mix
    if block.max() < 2**16:
        block = block.astype(np.uint16)  # sorts much faster
    return order[np.argsort(block[in_order], kind="stable")]


@lru_cache(maxsize=_ORDERS)
def permutation(seed: int, pass_: int, length: int) -> Int64Array:
    """The order of `length` images in a pass: int64 [length], which sorts random numbers of Philox."""
    key = int.from_bytes(image_key(seed, f"pass {pass_}"), "little")
    words = np.random.Philox(key=key).random_raw(length)
    return np.argsort(words, kind="stable")
