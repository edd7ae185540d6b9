"""Gaussian blur of a crop."""

import math
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

from fkd_ssl.arrays import BoolArray, Float32Array, UInt8Array

SIGMA_PIXELS = 224  # a record's sigma is in pixels of a crop of this size
_VECTOR = 16  # pixels; a multiple of the length of all of OpenCV's vectors


def apply(view: UInt8Array, flags: int, sigma: float) -> None:
    """Blurs a crop uint8 [P, P, 3] in place. The border is replicated.

    Sums that end in exactly one half are rounded to the nearest even value, as in OpenCV's vector code. If the end of a row
    does not fill a vector, OpenCV uses scalar code, which rounds such sums up. So rows are padded to a multiple of 16 pixels by
    repeating their last pixel, which makes the result independent of the processor's vector width.
    """
    kernel = blur_kernel(sigma * view.shape[0] / SIGMA_PIXELS)
    if len(kernel) == 1:
        return
    width = view.shape[1]
    missing = -width % _VECTOR
    if missing:
        wide = np.concatenate([view, np.repeat(view[:, -1:], missing, axis=1)], axis=1)
        cv2.sepFilter2D(wide, -1, kernel, kernel, dst=wide, borderType=cv2.BORDER_REPLICATE)
        view[:] = wide[:, :width]
    else:
        cv2.sepFilter2D(view, -1, kernel, kernel, dst=view, borderType=cv2.BORDER_REPLICATE)


@lru_cache(maxsize=1 << 14)  # large enough for every value that a recipe can draw, since sigma is float16
def blur_kernel(sigma: float) -> Float32Array:
    """Returns a Gaussian of three standard deviations to each side, in 256ths that sum to 1: float32 [odd].

    With 8-bit coefficients, OpenCV's separable filter is exact integer arithmetic. It gives the pixels of
    `cv2.GaussianBlur`, which rounds its kernel in the same way (each rounding error is carried over to the next
    coefficient, and the middle takes the rest), in about half the time.
    """
    radius = (math.floor(6 * sigma + 1.5) | 1) // 2
    if not radius:
        return np.ones(1, dtype=np.float32)
    weights = [math.exp(-((k - radius) ** 2) / (2 * sigma * sigma)) for k in range(radius + 1)]
    total = 2 * math.fsum(weights[:-1]) + 1
    side: list[int] = []
    error = 0.0
    for weight in weights[:-1]:
        exact = 256 * weight / total + error
        side.append(round(exact))
        error = exact - side[-1]
    while side and not side[0]:
        del side[0]
    return np.array([*side, 256 - 2 * sum(side), *side[::-1]], dtype=np.float32) / np.float32(256)


def parameters(
    pixels: int, applied: BoolArray, flags: UInt8Array, sigma: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int32]]:
    """Returns the parameters of n crops for a device: `kernels`."""
    return (kernels(np.where(applied, sigma, 0.0), pixels),)


def kernels(sigma: npt.NDArray[np.float64], pixels: int) -> npt.NDArray[np.int32]:
    """Returns the kernels of n crops of P = `pixels`, in 256ths, padded with zeros to the longest: int32 [n, K], K odd."""
    values, which = np.unique(sigma, return_inverse=True)
    found = [blur_kernel(value * pixels / SIGMA_PIXELS) for value in values.tolist()]
    sizes = np.array([len(kernel) for kernel in found], dtype=np.int64)
    longest = int(sizes.max(initial=1))
    starts = (longest - sizes) // 2 - (np.cumsum(sizes) - sizes)  # start of each kernel in its row, minus its start in `found`
    padded = np.zeros((len(values), longest), dtype=np.int32)
    padded[np.repeat(np.arange(len(values)), sizes), np.arange(sizes.sum()) + np.repeat(starts, sizes)] = (
        np.concatenate([*found, np.zeros(0, dtype=np.float32)]) * 256
    )
    return padded[which]
