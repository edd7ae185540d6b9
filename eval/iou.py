"""Intersection over union of segmentations, and bootstrap intervals over images.

The counts of an image are its pixels per class: of the intersection of prediction and mask, of the prediction, and of the
mask, without ignored pixels. A class's IoU is computed from their sums over all images. The mean IoU is over the classes that
occur in a mask or a prediction, as in torchmetrics and mmsegmentation.

Legend: `n` images, `C` classes, `S` seeds of an arm.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fkd_ssl.arrays import Int64Array
from fkd_ssl.errors import RequestError
from fkd_ssl.eval.masks import IGNORED

Float64Array = npt.NDArray[np.float64]


def count(predicted: Tensor, labels: Tensor, classes: int) -> Int64Array:
    """The counts int64 [3, C] of an image's predicted classes and labels, both [H, W] on one device."""
    confusion = multiclass_confusion_matrix(
        predicted.flatten().long(), labels.flatten().long(), classes, ignore_index=IGNORED, validate_args=False
    )
    counts: Int64Array = torch.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)]).cpu().numpy()
    return counts


def per_class(counts: npt.NDArray[Any]) -> Float64Array:
    """IoU in percent [..., C] of counts [..., 3, C]; NaN for a class without pixels."""
    hit, predicted, true = np.moveaxis(np.asarray(counts, dtype=np.float64), -2, 0)
    union = predicted + true - hit
    found: Float64Array = np.where(union > 0, 100 * hit / np.maximum(union, 1), np.nan)
    return found


def mean(counts: npt.NDArray[Any]) -> Float64Array:
    """Mean IoU in percent [...] of counts [..., 3, C]."""
    return np.asarray(np.nanmean(per_class(counts), axis=-1))


def pixel_accuracy(counts: Int64Array) -> float:
    """Share of correct pixels in percent, of counts [3, C]."""
    return 100 * float(counts[0].sum() / counts[2].sum())


def interval(counts: Int64Array, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean IoU by a bootstrap over images, low and high in percent.

    Args:
        counts: int64 [n, 3, C].
        level: Share of the draws inside the interval.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.
    """
    generator = np.random.default_rng(seed)
    means = [float(mean(_drawn(counts[None], generator)[0])) for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    a: Int64Array, b: Int64Array, level: float = 0.90, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean IoU of `a` minus that of `b` in points, and its interval, as `stats.paired_bootstrap` for accuracies.

    Args:
        a: Counts int64 [S, n, 3, C] of an arm.
        b: The same for the other arm, with the same order of seeds and images.
        level: Share of the draws inside the interval.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.

    Returns:
        Difference of the means over seeds, low, high.

    Raises:
        RequestError: The arms differ in their shape.
    """
    if a.shape != b.shape:
        raise RequestError(f"expected arms of one shape [seeds, images, 3, classes], got {list(a.shape)} and {list(b.shape)}")
    generator = np.random.default_rng(seed)
    both = np.stack([a, b])
    gains = []
    for _ in range(draws):
        seeds = generator.integers(0, a.shape[0], size=a.shape[0])
        sums = _drawn(both[:, seeds].reshape(-1, *a.shape[1:]), generator)
        first, second = mean(sums).reshape(2, -1).mean(axis=1)
        gains.append(first - second)
    first, second = mean(both.sum(axis=2)).mean(axis=1)
    low, high = np.quantile(gains, [(1 - level) / 2, (1 + level) / 2])
    return float(first - second), float(low), float(high)


def _drawn(counts: Int64Array, generator: np.random.Generator) -> Int64Array:
    """Sums [arms, 3, C] of counts [arms, n, 3, C] over n images drawn with replacement, the same for all arms."""
    images = counts.shape[1]
    times = np.bincount(generator.integers(0, images, size=images), minlength=images)
    sums: Int64Array = np.einsum("n,anrc->arc", times, counts)
    return sums
