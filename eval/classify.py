"""Accuracy of a classifier's own classes: top-1 and top-5."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from fkd_ssl.errors import RequestError
from fkd_ssl.eval.features import extract
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
    """Accuracy of a classifier on labelled images, whose class folders in sorted order are its classes, as ImageNet's are.

    Args:
        model: uint8 [B, 3, P, P] to logits or probabilities [B, K].
        images: Labelled.
        pixels: P, the side of the centre crop.
        classes: K.
        workers: Processes that decode; 0 decodes in this one.
        progress: Show a bar on standard error.

    Returns:
        `top1` and `top5` in percent; `correct` bool [n], whether the most probable class is right.

    Raises:
        RequestError: As check_classes.
        ImageError: An image cannot be read.
    """
    check_classes(images, classes)
    scores, labels = extract(model, images, pixels=pixels, workers=workers, progress=progress, desc="classify")
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    # classes before the right one: of equal scores the first counts; to sort them all would take gigabytes
    before = (scores > own).sum(axis=1) + ((scores == own) & (np.arange(classes) < labels[:, None])).sum(axis=1)
    return {"top1": 100 * float((before < 1).mean()), "top5": 100 * float((before < 5).mean()), "correct": before < 1}


def check_classes(images: ImageSource, classes: int) -> None:
    """Raises RequestError where there are images without a class, or another number of class folders than `classes`."""
    if (images.labels < 0).any():
        raise RequestError(f"{images.spec}: images lie outside any class folder")
    if len(images.classes) != classes:
        raise RequestError(
            f"{images.spec}: {len(images.classes)} class folders, and the classifier has {classes} classes: which is which "
            "cannot be told"
        )
