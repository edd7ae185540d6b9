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

from fkd_ssl.crops.records import GREY, JITTER, ORDERS

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

Row = tuple[float, float, float, float]  # what an output channel takes of R, G, B and 1


def matrix(record: np.void, mean: tuple[float, float, float]) -> npt.NDArray[np.float32]:
    """The colour matrix float32 [3, 4] of a record: output = matrix @ (R, G, B, 1), before rounding and clamping.

    Args:
        record: One crop record.
        mean: Mean R, G, B of the resized crop; contrast turns about its grey, as in torchvision's adjust_contrast.

    Scalars only, so that the result depends on this record alone and on no vector unit's rounding.
    """
    rows: list[Row] = [(1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)]
    if record["flags"] & JITTER:
        for operation in OPERATION_ORDERS[record["order"]]:
            if operation == BRIGHTNESS:
                f = float(record["brightness"])
                rows = [(f * r, f * g, f * b, f * one) for r, g, b, one in rows]
            elif operation == CONTRAST:
                f = float(record["contrast"])
                luma = _luma(rows)
                pivot = (1 - f) * (luma[0] * mean[0] + luma[1] * mean[1] + luma[2] * mean[2] + luma[3])
                rows = [(f * r, f * g, f * b, f * one + pivot) for r, g, b, one in rows]
            elif operation == SATURATION:
                f = float(record["saturation"])
                grey = _luma(rows)
                rows = [_blend(row, f, grey, 1 - f) for row in rows]
            else:
                rows = _turn(rows, float(record["hue"]))
    if record["flags"] & GREY:
        rows = [_luma(rows)] * 3
    return np.array(rows, dtype=np.float32)


def _blend(a: Row, fa: float, b: Row, fb: float) -> Row:
    return (fa * a[0] + fb * b[0], fa * a[1] + fb * b[1], fa * a[2] + fb * b[2], fa * a[3] + fb * b[3])


def _mix(weights: tuple[float, float, float], rows: list[Row]) -> Row:
    (wr, wg, wb), (r, g, b) = weights, rows
    return (
        wr * r[0] + wg * g[0] + wb * b[0],
        wr * r[1] + wg * g[1] + wb * b[1],
        wr * r[2] + wg * g[2] + wb * b[2],
        wr * r[3] + wg * g[3] + wb * b[3],
    )


def _luma(rows: list[Row]) -> Row:
    return _mix(LUMA, rows)


def _turn(rows: list[Row], hue: float) -> list[Row]:
    """Hue turned by `hue` full circles: grey + cos (x - grey) + sin d(x)/d(angle)."""
    cos, sin = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    grey = _luma(rows)
    return [_blend(_blend(row, cos, grey, 1 - cos), 1.0, _mix(_TURN[k], rows), sin) for k, row in enumerate(rows)]
