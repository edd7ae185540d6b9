"""Colour jitter and greyscale of one crop as a single affine map of RGB.

Brightness, contrast, saturation, hue and greyscale are each affine in a pixel's RGB once the crop's mean is known, and
so is their composition. It departs from torchvision's ColorJitter in two ways, 3 to 4 grey levels in the median:
nothing is clamped between the operations, and hue turns in YIQ instead of HSV. Teacher and student see the same pixels.
Without clamping the four operations commute, so a record's `order` changes nothing beyond rounding; it is kept in the
record for a path that clamps.
"""

import math
from itertools import permutations

import numpy as np
import numpy.typing as npt

from fkd_ssl.crops.records import GREY, JITTER, ORDERS, Fields

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
OPERATION_ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))
assert len(OPERATION_ORDERS) == ORDERS

LUMA = (0.299, 0.587, 0.114)
# d(RGB)/d(angle) of a turn in the IQ plane, as literals so that every machine has the same
_TURN = (
    (-0.16773971, -0.32930952, 0.49704923),
    (0.32811313, -0.03546699, -0.29264614),
    (-1.2495459, 1.0463392, 0.2032067),
)

Rgb = tuple[float, float, float]
Column = Rgb  # what one of R, G, B and 1 gives to the three output channels


def matrix(record: Fields, mean: Rgb) -> npt.NDArray[np.float32]:
    """The colour matrix float32 [3, 4] of a record: output = matrix @ (R, G, B, 1), before rounding and clamping.

    Args:
        record: One crop record, as plain numbers.
        mean: Mean R, G, B of the resized crop; contrast turns about its grey, as in torchvision's adjust_contrast.

    Scalars only, so that the result depends on this record alone and on no vector unit's rounding.
    """
    return np.array(_columns(record, [mean]), dtype=np.float32).T.copy()


def linear_and_offset(record: Fields) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """`matrix` for a mean that is not known yet.

    Returns:
        Its columns of R, G and B, float32 [3, 3], and the map from the mean to its last column, float64 [3, 3].
    """
    columns = _columns(record, [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
    return np.array(columns[:3], dtype=np.float32).T, np.array(columns[3:], dtype=np.float64).T


def _columns(record: Fields, means: list[Rgb]) -> list[Column]:
    """What R, G and B give to the output, and what 1 gives for each of the means."""
    _, _, _, _, flags, order, brightness, contrast, saturation, hue, _ = record
    columns: list[Column] = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), *((0.0, 0.0, 0.0) for _ in means)]
    if flags & JITTER:
        for operation in OPERATION_ORDERS[order]:
            if operation == BRIGHTNESS:
                columns = [(brightness * r, brightness * g, brightness * b) for r, g, b in columns]
            elif operation == CONTRAST:
                red, green, blue, *ones = (_luma(column) for column in columns)
                columns = [(contrast * r, contrast * g, contrast * b) for r, g, b in columns]
                for k, (mean, one) in enumerate(zip(means, ones, strict=True), 3):
                    pivot = (1 - contrast) * (red * mean[0] + green * mean[1] + blue * mean[2] + one)
                    r, g, b = columns[k]
                    columns[k] = (r + pivot, g + pivot, b + pivot)
            elif operation == SATURATION:
                columns = [_saturate(column, saturation) for column in columns]
            else:
                cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
                columns = [_turn(column, cos, sin) for column in columns]
    if flags & GREY:
        columns = [(_luma(column),) * 3 for column in columns]
    return columns


def _luma(column: Column) -> float:
    r, g, b = column
    return LUMA[0] * r + LUMA[1] * g + LUMA[2] * b


def _saturate(column: Column, f: float) -> Column:
    r, g, b = column
    grey = (1 - f) * _luma(column)
    return (f * r + grey, f * g + grey, f * b + grey)


def _turn(column: Column, cos: float, sin: float) -> Column:
    """Hue turned: grey + cos (x - grey) + sin d(x)/d(angle)."""
    r, g, b = column
    grey = (1 - cos) * _luma(column)
    (rr, rg, rb), (gr, gg, gb), (br, bg, bb) = _TURN
    return (
        cos * r + grey + sin * (rr * r + rg * g + rb * b),
        cos * g + grey + sin * (gr * r + gg * g + gb * b),
        cos * b + grey + sin * (br * r + bg * g + bb * b),
    )
