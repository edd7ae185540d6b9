"""Accuracy of a classifier on its own classes: top-1 and top-5."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fkd_ssl.errors import RequestError
from fkd_ssl.eval.features import extract
from fkd_ssl.eval.scores import accuracy, ranks
from fkd_ssl.images import ImageSource


def evaluate(
    model: Callable[[Tensor], Tensor],
    images: ImageSource,
    *,
    pixels: int,
    classes: int,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy of a classifier on labelled images. Its classes are the class folders in sorted order, as in ImageNet.

    Args:
        model: uint8 [B, 3, P, P] to logits or probabilities [B, K].
        images: Labelled images.
        pixels: P, the side of the centre crop.
        classes: K.
        workers: Processes that read images; 0 reads in this one.
        progress: Show a progress bar on standard error.

    Returns:
        `top1` and `top5` in percent; `correct` bool [n], whether the most probable class is right.

    Raises:
        RequestError: As check_classes.
        ImageError: An image cannot be read.
    """
    check_classes(images, classes)
    scores, labels = extract(model, images, pixels=pixels, workers=workers, progress=progress, desc="classify")
    return accuracy(ranks(scores, labels))


def check_classes(images: ImageSource, classes: int) -> None:
    """Raises RequestError if an image has no class, or the number of class folders is not `classes`."""
    if (images.labels < 0).any():
        raise RequestError(f"{images.spec}: some images are outside any class folder")
    if len(images.classes) != classes:
        raise RequestError(
            f"{images.spec}: has {len(images.classes)} class folders, but the classifier has {classes} classes; expected one "
            "folder for each class"
        )
