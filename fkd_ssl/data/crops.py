"""Data sets of crops. Each image is read and decoded once for all its crops."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from fkd_ssl.arrays import Int64Array
from fkd_ssl.crops import Records
from fkd_ssl.data.contents import Contents
from fkd_ssl.data.passes import PassCounter
from fkd_ssl.data.pixels import Batch, Pixels, Planned, Replayed, Sides
from fkd_ssl.data.samples import Samples
from fkd_ssl.errors import ImageError, RequestError
from fkd_ssl.images import ImageSource, decode

Key = int | tuple[int, int]  # an image, for its next pass, or a pass and an image


class Crops(Dataset[Batch]):
    """Base class of data sets of crops: M crops per image, which is decoded once for all of them.

    Each pass reads different crops of an image. `data[i]` reads the next pass of image `i`, and `data[p, i]` reads pass `p`,
    which always gives the same crops. A `DataLoader(data, shuffle=True)` reads pass 0 in its first epoch, pass 1 in its second,
    and so on; its workers share the count. Distributed training also needs `set_epoch`. A loader returns crops [B, M, ...];
    with `collate_fn=whole_batch` it returns [B M, ...] without another copy.

    Args:
        images: The image set.
        positions: Index in the image set of each of the N images of the data set.
        crops_per_image: Number of crops per image M.
        pixels: P, the side of the crops.
        teacher_pixels: Side of a second set of the same crops, for a teacher. Default: no second set.
        skip_unreadable: Replace a damaged image with another one of its batch instead of raising an error.
        decode_only: Return decoded images and plans of the crops, from which `replay_on_device` makes them.
        contents: The expected contents of the images. Default: not checked.
    """

    def __init__(
        self,
        images: ImageSource,
        positions: Sequence[int] | Int64Array,
        *,
        crops_per_image: int,
        pixels: int,
        teacher_pixels: int | None = None,
        skip_unreadable: bool = False,
        decode_only: bool = False,
        contents: Contents | None = None,
    ) -> None:
        if crops_per_image < 1 or pixels < 1:
            raise RequestError(f"crops_per_image {crops_per_image} and pixels {pixels} must be at least 1")
        self.images = images
        self.crops_per_image = crops_per_image
        self.pixels = pixels
        self.teacher_pixels = None if teacher_pixels == pixels else teacher_pixels
        self.skip_unreadable = skip_unreadable
        self.decode_only = decode_only
        self._positions = positions
        self._contents = contents
        self._passes = PassCounter(len(positions))

    @property
    def sides(self) -> Sides:
        """Side of the crops, by their key in a batch."""
        return {"images": self.pixels} | ({"teacher_images": self.teacher_pixels} if self.teacher_pixels else {})

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def groups(self) -> Int64Array:
        """The group of each image [N], see `ImageSource.group`."""
        return self.images.groups(np.asarray(self._positions, dtype=np.int64))

    @property
    def mix_groups(self) -> int:
        """Number of groups that a training mixes by default; 0 mixes all images."""
        return self.images.mix_groups

    def expect(self, indices: Iterable[int]) -> None:
        """Announces the images that are read next, in order, so that their data can be fetched ahead."""
        positions = np.array([int(self._positions[i]) for i in indices], dtype=np.int64)
        self.images.expect(dict.fromkeys(self.images.groups(positions).tolist()))

    def set_epoch(self, epoch: int) -> None:
        """Makes pass `epoch` the next pass of all images, in this process and in the workers of its loaders.

        Call it at the start of each epoch in distributed training, where each process counts only its own reads, and to resume
        a training. Otherwise it is not needed.

        Raises:
            RequestError: `epoch` is negative.
        """
        if epoch < 0:
            raise RequestError(f"epoch {epoch}: must not be negative")
        self._passes.set(epoch)

    def __getitem__(self, key: Key) -> Batch:
        """Returns the crops of one image: of its next pass for a key `i`, of pass `p` for a key `(p, i)`.

        Returns:
            A dict of `images` uint8 [M, 3, P, P]; `targets` float32 [M, D] if they are stored, a dict by name for several
            teachers; `label` and `path`.

        Raises:
            IndexError: There is no such image.
            RequestError: A key `i` needs `set_epoch`, which was not called.
            ImageAccessError, ImageError: As in `__getitems__`.
        """
        i = key[1] if isinstance(key, tuple) else key
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> Samples:
        """Returns the crops of B images. A DataLoader calls it with the keys of a batch.

        Returns:
            A list of the items `data[key]`. Its attribute `batch` is a dict of all of them: `images` uint8 [B M, 3, P, P] in
            channels-last memory, with the crops of an image in sequence; `teacher_images`, if the teacher's size differs;
            `targets` float32 [B M, D] if they are stored, a dict by name for several teachers; `labels` int64 [B]; `paths`;
            and `unreadable`, an error message for each skipped image. With `decode_only`, each tensor of crops is replaced by
            a CropPlan, from which `replay_on_device` makes it.

        Raises:
            ImageAccessError: An image cannot be opened; the message names it.
            ImageError: An image is damaged or changed and `skip_unreadable` is False, or no image of the batch can be read;
                the message names it.
            RequestError: A key `i` needs `set_epoch`, which was not called.
        """
        pairs = [key if isinstance(key, tuple) else (self._passes.next(key), key) for key in keys]
        pixels = self._new_pixels(len(pairs))
        failed: dict[int, ImageError] = {}
        for k, (pass_, i) in enumerate(pairs):
            try:
                self._put(pixels, k, pass_, i)
            except ImageError as error:
                if not self.skip_unreadable:
                    raise
                failed[k] = error
        if failed:
            _replace(failed, pairs, pixels)
        batch: Batch = {
            **pixels.tensors(),
            "labels": torch.tensor([int(self.images.labels[self._positions[i]]) for _, i in pairs]),
            "paths": [self.name(i) for _, i in pairs],
            "unreadable": [str(error) for error in failed.values()],
        }
        return Samples({**batch, **self._targets(pairs)}, self.crops_per_image)

    def name(self, i: int) -> str:
        """Returns the name of image `i` in its image set."""
        return self.images.names[int(self._positions[i])]

    def where(self, i: int) -> str:
        """Returns the location of image `i`, for messages."""
        return self.images.where(int(self._positions[i]))

    def read(self, i: int) -> bytes:
        """Returns the encoded image `i`.

        Raises:
            ImageAccessError: The image cannot be opened.
            ImageError: The image has changed.
        """
        data = self.images.read(int(self._positions[i]))
        if self._contents is not None:
            self._contents.check(i, data, self.where(i))
        return data

    def _new_pixels(self, count: int) -> Pixels:
        """Returns an empty container for the crops of `count` images."""
        return (Planned if self.decode_only else Replayed)(count, self.crops_per_image, self.sides)

    def _put(self, pixels: Pixels, k: int, pass_: int, i: int) -> None:
        """Puts the crops of image `i` at index `k` of a batch."""
        where = self.where(i)
        image = decode(self.read(i), where)
        try:
            pixels.put(k, image, self._records(pass_, i, image.shape[0], image.shape[1]))
        except ImageError as error:
            raise ImageError(f"{where}: {error}") from error

    @abstractmethod
    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        """Returns the records [M] of image `i` in a pass."""

    def _targets(self, pairs: list[tuple[int, int]]) -> Batch:
        """Returns further entries of the batch: `targets`, if they are stored."""
        return {}


def _replace(failed: dict[int, ImageError], pairs: list[tuple[int, int]], pixels: Pixels) -> None:
    """Replaces the unreadable images of a batch with the readable ones, in turn."""
    good = [k for k in range(len(pairs)) if k not in failed]
    if not good:
        first = next(iter(failed.values()))
        raise ImageError(f"{first}; none of the {len(pairs)} images of this batch can be read")
    for turn, k in enumerate(failed):
        other = good[turn % len(good)]
        pairs[k] = pairs[other]
        pixels.repeat(k, other)
