"""Images with masks for semantic segmentation: pairs by name, checks, and labels as class indices.

A mask is a PNG with one byte per pixel, the label of that pixel, and has the size of its image. Masks are never resized.

Legend: `N` images, `H` x `W` pixels, `C` classes.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from fkd_ssl.arrays import Int64Array, UInt8Array
from fkd_ssl.errors import ImageError, RequestError
from fkd_ssl.images import ImageSource
from fkd_ssl.images.decoding import decode_mask

IGNORED = 255
"""Label and class index of a pixel that is not scored."""
_READERS = 8


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Images and their masks, read and checked once."""

    images: ImageSource
    masks: ImageSource
    """In the order of the images."""
    sizes: list[tuple[int, int]]
    """Height and width of each image."""
    pixels: Int64Array
    """Pixels of each label in each mask [N, 256]."""

    def __len__(self) -> int:
        return len(self.images)

    def labels(self, index: int, lookup: UInt8Array) -> UInt8Array:
        """The class index of each pixel of image `index`: uint8 [H, W], by the table of `lookup_of`."""
        found: UInt8Array = lookup[decode_mask(self.masks.read(index), self.masks.where(index))]
        return found


def open_masked(images: ImageSource, masks: ImageSource, *, skipped: set[str] | None = None) -> Masked:
    """Pairs images and masks by their names without extensions, and reads all masks.

    Args:
        images: The images.
        masks: Their masks.
        skipped: Collects the error message of each damaged image or mask, which is left out. By default the first error is
            raised.

    Raises:
        RequestError: An image has no mask, a mask has no image, two images or masks have one name, a mask is not a PNG with one
            byte per pixel, or it has another size than its image.
        ImageError: An image or a mask is damaged and `skipped` is None, or all are damaged.
        ImageAccessError: An image or a mask cannot be opened.
    """
    rows, of_mask = _by_stem(images), _by_stem(masks)
    for here, there, what, other in ((rows, of_mask, images, masks), (of_mask, rows, masks, images)):
        if alone := [what.names[row] for stem, row in here.items() if stem not in there]:
            lacking = "images have no mask" if what is images else "masks have no image"
            raise RequestError(
                f"{what.spec}: {len(alone)} of {len(what)} {lacking} "
                f"in {other.spec}, first {alone[0]!r}; an image and its mask have the same name, apart from the extension"
            )
    if not rows:
        raise RequestError(f"{images.spec}: no images to evaluate")
    masks = masks.subset([of_mask[stem] for stem in rows])

    def read(index: int) -> tuple[tuple[int, int], Int64Array] | None:
        try:
            _, width, height = images.size(index)
            labels = decode_mask(masks.read(index), masks.where(index))
        except ImageError as error:
            if skipped is None:
                raise
            skipped.add(str(error))
            return None
        if labels.shape != (height, width):
            raise RequestError(
                f"{masks.where(index)}: a mask of {labels.shape[1]} x {labels.shape[0]} px for an image of {width} x {height} "
                "px; masks are not resized, so give masks of the size of the images"
            )
        return (height, width), np.bincount(labels.ravel(), minlength=256)

    with ThreadPoolExecutor(_READERS) as pool:
        found = {row: one for row, one in enumerate(pool.map(read, range(len(images)))) if one is not None}
    if not found:
        raise ImageError(f"{images.spec}: none of its {len(images)} images and masks can be read")
    if len(found) < len(images):
        images, masks = images.subset([*found]), masks.subset([*found])
    sizes, counts = zip(*found.values(), strict=True)
    return Masked(images=images, masks=masks, sizes=list(sizes), pixels=np.stack(counts))


def classes_of(train: Masked, val: Masked, asked: int | Sequence[str] | None, ignore: int) -> list[tuple[int, str]]:
    """The labels that are scored, ascending, and their names.

    Args:
        train: Training images.
        val: Images to score.
        asked: Number of labels, or their names from label 0 on; by default as many as the training masks have.
        ignore: Label of pixels that are not scored, besides 255; also left out of the classes.

    Raises:
        RequestError: A mask has a label beyond the number of classes, fewer than two classes have pixels in `train`, or a name
            is empty or repeated.
    """
    if asked is not None and not isinstance(asked, int):
        if not 2 <= len(asked) <= IGNORED:
            raise RequestError(f"classes: {len(asked)} names; expected between 2 and {IGNORED}")
        if wrong := [name for name in asked if not name or asked.count(name) > 1]:
            raise RequestError(f"classes: {wrong[0]!r} is empty or given twice; expected a different name for each label")
    scored = np.array([label not in (ignore, IGNORED) for label in range(256)])
    used = np.flatnonzero(train.pixels.any(axis=0) & scored)
    if len(used) < 2:
        raise RequestError(
            f"{train.masks.spec}: its masks have {len(used)} labels apart from ignored ones; expected two or more"
        )
    if isinstance(asked, int):
        names = [str(label) for label in range(asked)]
    else:
        names = [str(label) for label in range(int(used[-1]) + 1)] if asked is None else list(asked)
    for part in (train, val):
        beyond = part.pixels[:, len(names) :] * scored[len(names) :]
        if beyond.any():
            row = int(beyond.any(axis=1).argmax())
            label = len(names) + int((beyond[row] > 0).argmax())
            more = "name them all" if isinstance(asked, Sequence) else "give the number"
            raise RequestError(
                f"{part.masks.where(row)}: has label {label}, but there are {len(names)} classes, 0 to {len(names) - 1}"
                f"{' (as in the training masks)' if asked is None else ''}; {more} with --classes, or --ignore {label}"
            )
    return [(label, name) for label, name in enumerate(names) if label != ignore]


def lookup_of(classes: Sequence[tuple[int, str]]) -> UInt8Array:
    """A table [256] from labels to indices of `classes`; IGNORED for other labels."""
    table = np.full(256, IGNORED, dtype=np.uint8)
    table[[label for label, _ in classes]] = np.arange(len(classes))
    return table


def _by_stem(images: ImageSource) -> dict[str, int]:
    """The row of each name without its extension."""
    rows: dict[str, int] = {}
    for row, name in enumerate(images.names):
        stem = str(PurePosixPath(name).with_suffix(""))
        if stem in rows:
            raise RequestError(
                f"{images.spec}: {images.names[rows[stem]]!r} and {name!r} differ only in the extension; remove one"
            )
        rows[stem] = row
    return rows
