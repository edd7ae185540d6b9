"""Colour jitter and greyscale of a crop as a single affine map of RGB.

Brightness, contrast, saturation, hue and greyscale are each affine in a pixel's RGB once the mean of the crop is known, and
so is their composition. Pixels differ from torchvision's for two reasons: values are not clamped between the operations, and
hue is a rotation in YIQ instead of HSV. A crop of mocov2 differs by 4 grey levels in the mean over its pixels, one in ten by 10
or more, and the worst by 40 (docs/data.md). Teacher and student see the same pixels. Without clamping, the four operations
commute, so a record's `order` changes only the rounding. Records keep it for an implementation that clamps.
"""

import math
from functools import cache
from itertools import permutations
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from fkd_ssl.arrays import BoolArray, Float32Array, UInt8Array
from fkd_ssl.errors import RequestError

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
OPERATION_ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
ORDERS = len(OPERATION_ORDERS)
_POSITIONS = np.array(OPERATION_ORDERS)  # [ORDERS, 4]

LUMA = (0.299, 0.587, 0.114)
# d(RGB)/d(angle) of a rotation in the IQ plane, as literals so that all machines use the same numbers
_ROTATION = (
    (-0.16773971, -0.32930952, 0.49704923),
    (0.32811313, -0.03546699, -0.29264614),
    (-1.2495459, 1.0463392, 0.2032067),
)
JITTER, GREY = 2, 4
_MAX_COEFFICIENT = 32.0

Rgb = tuple[float, float, float]
Column = tuple[Any, Any, Any]  # contribution of one input to the outputs R, G and B: floats, or arrays with one value per crop


def apply(view: UInt8Array, flags: int, order: int, brightness: float, contrast: float, saturation: float, hue: float) -> None:
    """Applies colour jitter and greyscale to a crop uint8 [P, P, 3] in place."""
    mean = cv2.mean(view)
    transform = matrix(flags, order, brightness, contrast, saturation, hue, mean=(mean[0], mean[1], mean[2]))
    cv2.transform(view, transform, dst=view)


def matrix(
    flags: int, order: int, brightness: float, contrast: float, saturation: float, hue: float, *, mean: Rgb
) -> Float32Array:
    """Returns the colour matrix float32 [3, 4] of a crop: output = matrix @ (R, G, B, 1), before rounding and clamping.

    It is computed with scalars, so that the result depends only on this record, and not on the rounding of a vector unit.

    Args:
        flags: Flags of the crop's record.
        order: Index in `OPERATION_ORDERS`.
        brightness: Factor.
        contrast: Factor.
        saturation: Factor.
        hue: Shift in full circles.
        mean: Mean R, G and B of the resized crop. Its grey is the pivot of contrast, as in torchvision's `adjust_contrast`.
    """
    columns: list[Column] = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)]
    if flags & JITTER:
        for operation in OPERATION_ORDERS[order]:
            if operation == BRIGHTNESS:
                columns = [_scale(column, brightness) for column in columns]
            elif operation == CONTRAST:
                red, green, blue, one = (_luma(column) for column in columns)
                pivot = (1 - contrast) * (red * mean[0] + green * mean[1] + blue * mean[2] + one)
                columns = [_scale(column, contrast) for column in columns]
                r, g, b = columns[3]
                columns[3] = (r + pivot, g + pivot, b + pivot)
            elif operation == SATURATION:
                columns = [_saturate(column, saturation) for column in columns]
            else:
                cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
                columns = [_rotate(column, cos, sin) for column in columns]
    if flags & GREY:
        columns = [(_luma(column),) * 3 for column in columns]
    return np.array(columns, dtype=np.float32).T.copy()


def parameters(
    pixels: int, applied: BoolArray, flags: UInt8Array, *factors: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Returns the parameters of n crops for a device: `matrices`, with columns of R, G and B rounded to 1024ths as in OpenCV.

    Raises:
        RequestError: A coefficient is 32 or more, for which OpenCV does not use integers. No recipe reaches this.
    """
    linear, offsets = matrices(flags, *factors)
    largest = np.maximum(np.abs(linear).max(axis=(1, 2)), np.abs(offsets).sum(axis=2).max(axis=1))
    if (applied & (largest >= _MAX_COEFFICIENT)).any():
        raise RequestError("a crop record's colour factors are too large for --device_crops: run without it")
    return np.rint(linear * np.float32(1024)).astype(np.int32), offsets


def matrices(
    flags: npt.NDArray[Any],
    order: npt.NDArray[Any],
    brightness: npt.NDArray[Any],
    contrast: npt.NDArray[Any],
    saturation: npt.NDArray[Any],
    hue: npt.NDArray[Any],
) -> tuple[Float32Array, npt.NDArray[np.float64]]:
    """Computes the matrices of n well-formed records before the means of their crops are known, with the bits of `matrix`.

    Every operation is applied at each of the four positions. Where the record's order has another operation, its factor is one
    that changes no bit.

    Returns:
        The columns of R, G and B, float32 [n, 3, 3], and the map from a crop's mean to its last column, float64 [n, 3, 3].
    """
    jitter, (cos, sin) = (flags & JITTER) > 0, _cos_sin(hue)
    columns = np.zeros((3, 6, len(flags)))  # contributions of R, G, B, and of 1 for a mean of (1, 0, 0), (0, 1, 0), (0, 0, 1)
    columns[np.arange(3), np.arange(3)] = 1.0
    r, g, b = columns
    for position in range(4):
        operation = np.where(jitter, _POSITIONS[order, position], -1)
        r, g, b = _scale((r, g, b), np.where(operation == BRIGHTNESS, brightness, 1.0))
        factor = np.where(operation == CONTRAST, contrast, 1.0)
        luma = _luma((r, g, b))
        pivot = (1 - factor) * (luma[:3] + luma[3:])
        r, g, b = _scale((r, g, b), factor)
        for channel in (r, g, b):
            channel[3:] += pivot
        r, g, b = _saturate((r, g, b), np.where(operation == SATURATION, saturation, 1.0))
        r, g, b = _rotate((r, g, b), np.where(operation == HUE, cos, 1.0), np.where(operation == HUE, sin, 0.0))
    grey = (flags & GREY) > 0
    luma = _luma((r, g, b))
    rows = np.stack([np.where(grey, luma, channel) for channel in (r, g, b)])  # [3 outputs, 6, n]
    return rows[:, :3].transpose(2, 0, 1).astype(np.float32), np.ascontiguousarray(rows[:, 3:].transpose(2, 0, 1))


@cache
def _circle() -> npt.NDArray[np.float64]:
    """Returns cosine and sine of each float16 hue in 0 to 0.5, indexed by its bits. NumPy's last bit may differ from math's."""
    hues = np.arange(int(np.float16(0.5).view(np.uint16)) + 1, dtype=np.uint16).view(np.float16).astype(float).tolist()
    return np.array([(math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)) for hue in hues])


def _cos_sin(hue: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    bits = hue.astype(np.float16).view(np.uint16) & 0x7FFF
    cos, sin = _circle()[bits].T
    return cos, np.copysign(sin, hue)


def _luma(column: Column) -> Any:
    r, g, b = column
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


def _scale(column: Column, factor: Any) -> Column:
    r, g, b = column
    return (factor * r, factor * g, factor * b)


def _saturate(column: Column, factor: Any) -> Column:
    r, g, b = column
    grey = (1 - factor) * _luma(column)
    return (factor * r + grey, factor * g + grey, factor * b + grey)


def _rotate(column: Column, cos: Any, sin: Any) -> Column:
    """Shifts the hue: grey + cos (x - grey) + sin d(x)/d(angle)."""
    r, g, b = column
    grey = (1 - cos) * _luma(column)
    (rr, rg, rb), (gr, gg, gb), (br, bg, bb) = _ROTATION
    return (
        cos * r + grey + sin * (rr * r + rg * g + rb * b),
        cos * g + grey + sin * (gr * r + gg * g + gb * b),
        cos * b + grey + sin * (br * r + bg * g + bb * b),
    )
