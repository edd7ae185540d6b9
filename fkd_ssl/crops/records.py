"""Crop records: one augmented view of one image as 20 bytes of parameters."""

import numpy as np
import numpy.typing as npt

from fkd_ssl.errors import ImageError

FLIP, JITTER, GREY, BLUR, SOLARIZE = 1, 2, 4, 8, 16
FLAGS = FLIP | JITTER | GREY | BLUR | SOLARIZE
ORDERS = 24  # permutations of the four jitter operations

CROP_DTYPE = np.dtype(
    [
        ("top", "<u2"),
        ("left", "<u2"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("flags", "u1"),
        ("order", "u1"),
        ("brightness", "<f2"),
        ("contrast", "<f2"),
        ("saturation", "<f2"),
        ("hue", "<f2"),
        ("sigma", "<f2"),
    ]
)

Records = npt.NDArray[np.void]  # structured arrays of CROP_DTYPE


def neutral(count: int) -> Records:
    """Records [count] that change no colour; their boxes are still to be set."""
    records = np.zeros(count, dtype=CROP_DTYPE)
    for factor in ("brightness", "contrast", "saturation"):
        records[factor] = 1.0
    return records


def box_record(top: int, left: int, height: int, width: int) -> Records:
    """One record [1] that cuts a box, in pixels of the stored image, and changes nothing else."""
    record = neutral(1)
    record["top"], record["left"], record["height"], record["width"] = top, left, height, width
    return record


def centre(height: int, width: int, pixels: int) -> Records:
    """The record [1] of the usual evaluation view: short side to round(8/7 `pixels`), then the central square.

    As one box in the pixels of an image of `height` x `width`, so that evaluation resizes as training does.
    """
    short = min(height, width)
    side = min(short, max(1, round(short * pixels / round(pixels * 8 / 7))))
    return box_record((height - side) // 2, (width - side) // 2, side, side)


Fields = tuple[int, int, int, int, int, int, float, float, float, float, float]  # one record in CROP_DTYPE's order


def unpack(records: Records, height: int, width: int) -> list[Fields]:
    """Records as plain numbers, since a field of a structured scalar costs as much as a small crop's flip.

    Raises:
        ImageError: A record is impossible for an image of `height` x `width` pixels.
    """
    unpacked: list[Fields] = records.tolist()
    for top, left, h, w, *_ in unpacked:
        if top + h > height or left + w > width or h == 0 or w == 0:
            raise ImageError(
                f"crop of {w} x {h} at ({left}, {top}) lies outside an image of {width} x {height} pixels: these crops "
                "were drawn for another image"
            )
    return unpacked


def well_formed(records: Records) -> bool:
    """Whether flags, order and factors are in the ranges that any recipe can draw."""
    factors = [records[name].astype(np.float32) for name in ("brightness", "contrast", "saturation")]
    return bool(
        (records["flags"] <= FLAGS).all()
        and (records["order"] < ORDERS).all()
        and all(((f >= 0) & (f <= 16)).all() for f in factors)
        and (np.abs(records["hue"].astype(np.float32)) <= 0.5).all()
        and ((records["sigma"] >= 0) & (records["sigma"] <= 64)).all()
    )
