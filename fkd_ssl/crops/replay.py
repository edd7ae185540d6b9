"""Replay: a crop's pixels again, from the image and the crop's record. One code path for teacher and student."""

import math
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from fkd_ssl.crops import colour
from fkd_ssl.crops.records import BLUR, FLIP, GREY, JITTER, SOLARIZE, Fields, Records, unpack
from fkd_ssl.errors import ImageError
from fkd_ssl.images import UInt8Array

_avx2: Any = None
with suppress(ImportError):  # another processor, or no compiler when the package was built: OpenCV makes the same pixels
    _avx2 = import_module("fkd_ssl.crops._avx2")

# Images are the parallelism, in threads or worker processes. OpenCV's own pool would gain nothing on crops of this size,
# and a worker forked after the pool was started hangs in its first call that touches it: so it is never started.
cv2.setNumThreads(0)

SIGMA_PIXELS = 224  # a record's sigma is in pixels of an output of this size
_VECTOR = 16  # pixels; every vector of OpenCV's holds a part of so many bytes


def replay(image: UInt8Array, records: Records, pixels: int) -> UInt8Array:
    """The pixels of crops of one image.

    Each crop depends on the image and on its own record, never on the others that are read with it, and is bit-identical
    whenever it is made by the same versions on the same kind of machine.

    Geometry: the box is cut from the full image. If its long side is at most 1.2 times `pixels` it is resized linearly. A
    larger one is halved by exact 2 x 2 means (an odd last row or column is left out) while its short side is at least four
    times `pixels`, resized linearly to twice `pixels`, and halved once more: what lies between samples is in their means.

    Args:
        image: uint8 [H, W, 3], RGB.
        records: Crop records [M].
        pixels: Side P of the output.

    Returns:
        uint8 [M, 3, P, P], in channels-last memory.

    Raises:
        ImageError: The image is no uint8 [H, W, 3], or a box lies outside it.
    """
    views = np.empty((len(records), pixels, pixels, 3), dtype=np.uint8)
    replay_into(views, image, records)
    return views.transpose(0, 3, 1, 2)


def replay_into(views: UInt8Array, image: UInt8Array, records: Records) -> None:
    """`replay` into an existing C-contiguous array uint8 [M, P, P, 3]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(f"an image of {image.dtype} {list(image.shape)}: expected uint8 [H, W, 3]")
    image = np.ascontiguousarray(image)
    for view, record in zip(views, unpack(records, *image.shape[:2]), strict=True):
        try:
            _replay_one(view, image, record)
        except (IndexError, ValueError, OverflowError, cv2.error) as error:
            raise ImageError(f"an impossible crop record {record}: the file that it comes from is damaged") from error


def _replay_one(view: UInt8Array, image: UInt8Array, record: Fields) -> None:
    top, left, height, width, flags, *_, sigma = record
    pixels = view.shape[0]
    _resize(view, image[top : top + height, left : left + width])
    if flags & (JITTER | GREY):
        mean = cv2.mean(view)
        cv2.transform(view, colour.matrix(record, (mean[0], mean[1], mean[2])), dst=view)
    if flags & BLUR:
        kernel = blur_kernel(sigma * pixels / SIGMA_PIXELS)
        if len(kernel) > 1:
            _blur(view, kernel)
    if flags & SOLARIZE:
        np.subtract(255, view, out=view, where=view >= 128)
    if flags & FLIP:
        cv2.flip(view, 1, dst=view)


def resize_plan(height: int, width: int, pixels: int) -> tuple[int, bool]:
    """How often a box is halved before the linear resize, and whether that is to twice the size and halved after it."""
    if 5 * max(height, width) <= 6 * pixels:
        return 0, False
    return max(0, (min(height, width) // (2 * pixels)).bit_length() - 1), True


def _resize(view: UInt8Array, crop: UInt8Array) -> None:
    pixels = view.shape[0]
    halvings, doubled = resize_plan(crop.shape[0], crop.shape[1], pixels)
    for _ in range(halvings):
        crop = _half(crop)
    if _avx2 is not None and crop.shape[1] > 1:
        _avx2.resize(view, crop, 1 + doubled)
    elif doubled:
        fine: Any = cv2.resize(crop, (2 * pixels, 2 * pixels), interpolation=cv2.INTER_LINEAR)
        cv2.resize(fine, (pixels, pixels), dst=view, interpolation=cv2.INTER_AREA)
    else:
        cv2.resize(crop, (pixels, pixels), dst=view, interpolation=cv2.INTER_LINEAR)


def _half(crop: UInt8Array) -> UInt8Array:
    height, width = crop.shape[0] // 2, crop.shape[1] // 2
    if _avx2 is not None:
        made: UInt8Array = np.empty((height, width, 3), dtype=np.uint8)
        _avx2.halve(made, crop)
        return made
    half: Any = cv2.resize(crop[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(half, dtype=np.uint8)


def _blur(view: UInt8Array, kernel: npt.NDArray[np.float32]) -> None:
    """Sums that end in one half go to the even neighbour, as OpenCV's vector code rounds.

    The end of a row that fills no vector goes through code that rounds them up: so rows are filled up with their last pixel,
    which is what the border is made of, to 16 pixels, and no processor's width of vectors matters.
    """
    width = view.shape[1]
    missing = -width % _VECTOR
    if missing:
        wide = np.concatenate([view, np.repeat(view[:, -1:], missing, axis=1)], axis=1)
        cv2.sepFilter2D(wide, -1, kernel, kernel, dst=wide, borderType=cv2.BORDER_REPLICATE)
        view[:] = wide[:, :width]
    else:
        cv2.sepFilter2D(view, -1, kernel, kernel, dst=view, borderType=cv2.BORDER_REPLICATE)


@lru_cache(maxsize=1 << 14)  # sigma is a float16 in the record: all that a recipe can draw fit
def blur_kernel(sigma: float) -> npt.NDArray[np.float32]:
    """A Gaussian of three standard deviations to each side in 256ths that sum to 1: float32 [odd].

    Coefficients of 8 bits make OpenCV's separable filter work in exact integers: it gives the very pixels of
    `cv2.GaussianBlur`, which rounds its kernel the same way (each rounding error is carried to the next coefficient, the
    middle takes the rest), in about half the time.
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
