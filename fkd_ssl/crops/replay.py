"""Replay: makes the pixels of a crop from the image and the crop's record. Teacher and student use the same code."""

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np

from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops.operations import OPERATIONS
from fkd_ssl.crops.records import CROP_DTYPE, Fields, Records, unpack
from fkd_ssl.errors import ImageError

_avx2: Any = None
with suppress(ImportError):  # without the C extension, OpenCV makes the same pixels
    _avx2 = import_module("fkd_ssl.crops._avx2")

# Threads and worker processes each handle whole images. OpenCV's own thread pool would gain nothing on crops of this size,
# and a worker that is forked after the pool has started hangs in its first call that uses it. So the pool is never started.
cv2.setNumThreads(0)


def _steps() -> list[tuple[int, Any, slice]]:
    """Returns the flags, the function and the slice of record fields of each operation."""
    steps, first = [], CROP_DTYPE.names.index("flags") + 1 if CROP_DTYPE.names else 0
    for operation in OPERATIONS:
        steps.append((operation.bits, operation.on_cpu, slice(first, first + len(operation.fields))))
        first += len(operation.fields)
    return steps


_STEPS = _steps()


def describe_implementation() -> str:
    """Describes whether the C extension or OpenCV makes the crops of this process."""
    if _avx2 is not None:
        return "crops in C (AVX2)"
    why = "this installation has no compiled part" if find_spec("fkd_ssl.crops._avx2") is None else "this processor has no AVX2"
    return f"crops by OpenCV (slower): {why}"


def replay(image: UInt8Array, records: Records, pixels: int) -> UInt8Array:
    """Makes the pixels of crops of one image.

    Each crop depends only on the image and on its own record, not on other records of the call. The same versions on the same
    type of machine always make the same bits.

    Geometry: the box is cropped from the full image. If its long side is at most 1.2 times `pixels`, it is resized linearly. A
    larger box is halved by exact 2 x 2 means (an odd last row or column is dropped) while its short side is at least four
    times `pixels`, resized linearly to twice `pixels`, and halved once more, so that no pixel is skipped.

    Args:
        image: uint8 [H, W, 3], RGB.
        records: Crop records [M].
        pixels: Side P of the output.

    Returns:
        uint8 [M, 3, P, P], in channels-last memory.

    Raises:
        ImageError: The image is not uint8 [H, W, 3], or a box is outside it.
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
            raise ImageError(f"invalid crop record {record}: its file is damaged") from error


def _replay_one(view: UInt8Array, image: UInt8Array, record: Fields) -> None:
    top, left, height, width, flags = record[:5]
    _resize(view, image[top : top + height, left : left + width])
    for bits, on_cpu, of_operation in _STEPS:
        if flags & bits:
            on_cpu(view, flags, *record[of_operation])


def resize_plan(height: int, width: int, pixels: int) -> tuple[int, bool]:
    """Returns how often a box is halved before the linear resize, and whether it is resized to twice the size and halved."""
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
