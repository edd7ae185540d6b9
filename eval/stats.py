"""The uncertainty of an accuracy and of the difference between two arms, from their test images and seeds.

Legend: `S` seeds of an arm, `n` images.
"""

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from fkd_ssl.errors import RequestError

MARGIN = 1.5
"""Two arms are called equal within this many percentage points."""


def wilson(correct: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of an accuracy, low and high in percent.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927. Unlike the normal
    approximation it holds near 0 and 100 percent.

    Args:
        correct: Number of hits.
        n: Number of images.
        z: Standard normal quantile; 1.96 is 95 percent.

    Raises:
        RequestError: No images, hits outside 0 to `n`, or a negative `z`.

    >>> [round(limit, 1) for limit in wilson(8, 10)]
    [49.0, 94.3]
    """
    if n < 1 or not 0 <= correct <= n:
        raise RequestError(f"expected 0 to n hits of n >= 1 images, got {correct} of {n}")
    if not (math.isfinite(z) and z >= 0):
        raise RequestError(f"z must not be negative, got {z}")
    share = correct / n
    spread = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / spread
    half = z / spread * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, level: float = 0.90, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Accuracy of `a` minus that of `b` in percentage points, with the percentile interval of a paired bootstrap.

    Each draw takes S seeds and n images with replacement, the same for both arms: the arms share their images, and a seed gives
    both the same initial weights and order. With few seeds, the interval misses much of the variance between seeds; with one
    seed, it misses all of it. The true interval is then wider.

    Args:
        a: Whether each image was classified correctly, bool [S, n], or [n] for one seed.
        b: The same for the other arm, with the same order of seeds and images.
        level: Share of the draws inside the interval.
        draws: Number of bootstrap draws.
        seed: Seed of the draws.

    Returns:
        Difference, low, high.

    Raises:
        RequestError: The arms are not booleans of one shape, or `level` or `draws` is invalid.
    """
    if draws < 1:
        raise RequestError(f"draws must be at least 1, got {draws}")
    gain = _gain(a, b, level)
    seeds, images = gain.shape
    generator = np.random.default_rng(seed)
    sums = np.empty(draws, dtype=np.int64)
    for i in range(draws):
        per_image = gain[generator.integers(0, seeds, size=seeds)].sum(axis=0)
        sums[i] = per_image[generator.integers(0, images, size=images)].sum()
    low, high = np.quantile(sums, [(1 - level) / 2, (1 + level) / 2])
    unit = 100 / (seeds * images)
    return unit * int(gain.sum()), unit * float(low), unit * float(high)


def more_seeds(a: npt.ArrayLike, b: npt.ArrayLike, level: float = 0.90, margin: float = MARGIN) -> int | None:
    """Returns about how many more seeds the interval of `paired_bootstrap` needs to be conclusive, if the difference d stays.

    With S seeds the variance of d is A / S + B. A is the variance of d over seeds, and B = (V - R / S) / n is what the n test
    images contribute, where V is the variance over images of their mean over seeds, and R that of the residuals of a two-way
    analysis of variance without replication. The half-width of the interval, z sqrt(A / S + B), must be less than
    h = max(abs(d), margin - abs(d)): the interval then excludes 0 or is within the margin. So S = A / ((h / z)^2 - B), rounded
    up.

    Args:
        a: As in `paired_bootstrap`.
        b: As in `paired_bootstrap`.
        level: As in `paired_bootstrap`.
        margin: Difference up to which two arms are equal, in percentage points.

    Returns:
        At least 1. With one seed A is unknown, and the result is 2. None if B is too large: more images are needed.

    Raises:
        RequestError: The arms are not booleans of one shape, or `level` is invalid.
    """
    gain = 100.0 * _gain(a, b, level)
    seeds, images = gain.shape
    if seeds == 1:
        return 2
    per_seed, per_image, d = gain.mean(axis=1), gain.mean(axis=0), gain.mean()
    residual = ((gain - per_seed[:, None] - per_image + d) ** 2).sum() / ((seeds - 1) * max(1, images - 1))
    between_images = max(0.0, (per_image - d) @ (per_image - d) / max(1, images - 1) - residual / seeds) / images
    half = max(abs(d), margin - abs(d)) / NormalDist().inv_cdf((1 + level) / 2)
    room = half**2 - between_images
    return max(1, math.ceil(per_seed.var(ddof=1) / room) - seeds) if room > 0 else None


def equal(low: float, high: float, margin: float = MARGIN) -> bool:
    """Whether the interval of a difference is within `margin` on both sides of 0.

    >>> equal(-1.2, 0.4), equal(-1.6, 0.4)
    (True, False)
    """
    if not low <= high:
        raise RequestError(f"expected low <= high, got {low} and {high}")
    return -margin <= low and high <= margin


def _gain(a: npt.ArrayLike, b: npt.ArrayLike, level: float) -> npt.NDArray[np.int64]:
    """Returns `a` minus `b`, int64 [S, n]: integers, so that equal arms give exactly 0."""
    first, second = _arm(a, "a"), _arm(b, "b")
    if first.shape != second.shape:
        raise RequestError(f"expected two arms of one shape [seeds, images], got {list(first.shape)} and {list(second.shape)}")
    if not 0 < level < 1:
        raise RequestError(f"level must be between 0 and 1, got {level}")
    return first.astype(np.int64) - second.astype(np.int64)


def _arm(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    arm = np.asarray(values)
    if arm.dtype != np.bool_:
        raise RequestError(f"{name}: expected one boolean for each image, got {arm.dtype}")
    if arm.ndim == 1:
        arm = arm[None]
    if arm.ndim != 2 or arm.size == 0:
        raise RequestError(f"{name}: expected a non-empty array [seeds, images], got {list(arm.shape)}")
    return arm
