"""Views of images, read by processes: the centre crop of an evaluation, or crops of a random recipe.

Legend: `B` images in a batch, `P` pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from fkd_ssl.crops import Records, centre, replay
from fkd_ssl.data import Loader
from fkd_ssl.errors import ImageError
from fkd_ssl.images import ImageSource

View = tuple[torch.Tensor, int] | ImageError
"""A view uint8 [3, P, P] and the index of its image, or the error of a damaged image."""


def load(
    dataset: "Dataset[View]", batches: Iterable[Sequence[Any]], *, workers: int, skipped: set[str] | None, bar: "tqdm[Any]"
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of views uint8 [B, 3, P, P] with the indices of their images, int64 [B].

    Args:
        dataset: Data set of views.
        batches: Keys of the data set.
        workers: Processes that decode; 0 decodes in this one.
        skipped: Collects the error message of each damaged image, which is left out; if it is None, the first error is raised.
        bar: Advanced by the damaged images; the caller advances it by the others.

    Raises:
        ImageAccessError: An image cannot be opened.
        ImageError: An image is damaged and `skipped` is None.
    """
    if isinstance(batches, list):
        workers = min(workers, len(batches))
    loader = Loader(
        dataset,
        batches,
        workers=workers,
        collate=partial(_collate, skip_unreadable=skipped is not None),
        generator=torch.Generator(),  # not the global one, which a training may be using
    )
    for views, indices, messages in loader:
        if skipped is not None:
            skipped.update(messages)
            bar.update(len(messages))
        yield views, indices


def view(images: ImageSource, index: int, pixels: int, cut: Callable[[int, int], Records]) -> View:
    """The view of an image; `cut` returns its record [1] for the image's height and width."""
    try:
        image = images.pixels(index)
        return torch.from_numpy(replay(image, cut(*image.shape[:2]), pixels)[0]), index
    except ImageError as error:
        return error


class Centred(Dataset[View]):
    """The centre crop of each image."""

    def __init__(self, images: ImageSource, pixels: int) -> None:
        self.images, self.pixels = images, pixels

    def __getitem__(self, index: int) -> View:
        """The view of image `index`."""
        return view(self.images, index, self.pixels, lambda height, width: centre(height, width, self.pixels))


def _collate(views: list[View], *, skip_unreadable: bool) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    pixels, indices, messages = [], [], []
    for item in views:
        if isinstance(item, tuple):
            pixels.append(item[0])
            indices.append(item[1])
        elif skip_unreadable:
            messages.append(str(item))
        else:
            raise item
    return torch.stack(pixels) if pixels else torch.empty(0), torch.tensor(indices, dtype=torch.int64), messages
