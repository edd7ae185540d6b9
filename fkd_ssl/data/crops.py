"""Data sets of crops: an image is read and decoded once for all its crops."""

from abc import abstractmethod

import torch
from torch.utils.data import Dataset

from fkd_ssl.crops import Records
from fkd_ssl.data.pixels import Batch, Pixels, Planned, Replayed, Sides
from fkd_ssl.data.samples import Samples
from fkd_ssl.errors import ImageError, RequestError
from fkd_ssl.images import decode

Index = int | tuple[int, int]  # an image, or a pass and an image


class Crops(Dataset[Batch]):
    """M crops of each image, one decode for all of them.

    `data[i]` reads image `i` in pass 0, `data[p, i]` in pass `p`. A DataLoader reads a list of such indices at once; with
    `collate_fn=whole_batch` it gives crops [B M, ...] without another copy, otherwise stacked [B, M, ...].
    """

    def __init__(
        self,
        length: int,
        crops_per_image: int,
        pixels: int,
        teacher_pixels: int | None = None,
        *,
        skip_unreadable: bool = False,
        decode_only: bool = False,
    ) -> None:
        if crops_per_image < 1 or pixels < 1:
            raise RequestError(f"crops_per_image {crops_per_image} and pixels {pixels} must be at least 1")
        self._length = length
        self.crops_per_image = crops_per_image
        self.pixels = pixels
        self.teacher_pixels = None if teacher_pixels == pixels else teacher_pixels
        self.skip_unreadable = skip_unreadable
        self.decode_only = decode_only

    @property
    def sides(self) -> Sides:
        """Sides of the crops by what a batch calls them."""
        return {"images": self.pixels} | ({"teacher_images": self.teacher_pixels} if self.teacher_pixels else {})

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Index) -> Batch:
        """One image.

        `images` uint8 [M, 3, P, P], `targets` float32 [M, D] if stored (of several teachers a dict of such, by name), `label`
        and `path`.
        """
        pass_, i = index if isinstance(index, tuple) else (0, index)
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self.__getitems__([(pass_, i)])[0]

    def __getitems__(self, indices: list[Index]) -> Samples:
        """B images, as a list of what `data[i]` gives; its attribute `batch` holds them as one.

        Returns:
            Its `batch` has `images` uint8 [B M, 3, P, P] in channels-last memory, the crops of an image side by side;
            `targets` float32 [B M, D] if stored, or a dict of such by teacher; `teacher_images` if the teacher's size is
            another; `labels` int64 [B]; `paths`; `unreadable`, what was skipped and why. With `decode_only` it has
            a CropPlan in the place of each tensor of crops, which `replay_on_device` turns into them.

        Raises:
            ImageAccessError: An image cannot be opened; the message names it.
            ImageError: An image is damaged or changed, and such images are not skipped, or no image of the batch could be
                read; the message names it.
        """
        pairs = [index if isinstance(index, tuple) else (0, index) for index in indices]
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
            _fill(pairs, pixels, failed)
        batch: Batch = {
            **pixels.tensors(),
            "labels": torch.tensor([self._label(i) for _, i in pairs]),
            "paths": [self._path(i) for _, i in pairs],
            "unreadable": [str(error) for error in failed.values()],
        }
        return Samples({**batch, **self._more(pairs)}, self.crops_per_image)

    def _new_pixels(self, count: int) -> Pixels:
        """Takes the crops of so many images."""
        return (Planned if self.decode_only else Replayed)(count, self.crops_per_image, self.sides)

    def _put(self, pixels: Pixels, k: int, pass_: int, i: int) -> None:
        """An image and its crops as the k-th of a batch."""
        path = self._where(i)
        image = decode(self._read(i), path)
        try:
            pixels.put(k, image, self._records(pass_, i, image.shape[0], image.shape[1]))
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error

    def _more(self, pairs: list[tuple[int, int]]) -> Batch:
        """What else a batch has of these passes and images."""
        return {}

    @abstractmethod
    def _records(self, pass_: int, i: int, height: int, width: int) -> Records:
        """Records [M] of an image in a pass."""

    @abstractmethod
    def _read(self, i: int) -> bytes:
        """The encoded image."""

    @abstractmethod
    def _where(self, i: int) -> str:
        """The place of an image, for messages."""

    @abstractmethod
    def _path(self, i: int) -> str: ...

    @abstractmethod
    def _label(self, i: int) -> int: ...


def _fill(pairs: list[tuple[int, int]], pixels: Pixels, failed: dict[int, ImageError]) -> None:
    """The readable images of a batch once more, in turn, in the places of those that could not be read."""
    good = [k for k in range(len(pairs)) if k not in failed]
    if not good:
        first = next(iter(failed.values()))
        raise ImageError(f"{first}; none of the {len(pairs)} images of this batch can be read, so none is skipped")
    for turn, k in enumerate(failed):
        other = good[turn % len(good)]
        pairs[k] = pairs[other]
        pixels.repeat(k, other)
