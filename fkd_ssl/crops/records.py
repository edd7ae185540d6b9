"""Crop records: one augmented view of one image, as 20 bytes of parameters."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fkd_ssl.arrays import Int64Array
from fkd_ssl.crops.operations import FLAGS, OPERATIONS
from fkd_ssl.errors import ImageError

FIELDS = {name: field for operation in OPERATIONS for name, field in operation.fields.items()}
BOX = ("top", "left", "height", "width")
CROP_DTYPE = np.dtype(
    [*((name, "<u2") for name in BOX), ("flags", "u1"), *((name, field.dtype) for name, field in FIELDS.items())]
)

Records = npt.NDArray[np.void]  # structured arrays of CROP_DTYPE
Fields = tuple[Any, ...]  # one record as plain numbers, in the order of CROP_DTYPE


def neutral(count: int) -> Records:
    """Returns records [count] that change no colour. Their boxes are zero; the caller must set them."""
    records = np.zeros(count, dtype=CROP_DTYPE)
    for name, field in FIELDS.items():
        if field.default:
            records[name] = field.default
    return records


def box_record(top: int, left: int, height: int, width: int) -> Records:
    """Returns a record [1] that crops a box, in pixels of the stored image, and changes nothing else."""
    record = neutral(1)
    record["top"], record["left"], record["height"], record["width"] = top, left, height, width
    return record


def centre(height: int, width: int, pixels: int) -> Records:
    """Returns the record [1] of the standard evaluation view: short side to round(8/7 `pixels`), then the central square.

    The view is a single box in an image of `height` x `width`, so that evaluation resizes in the same way as training. It has
    whole pixels of the image, where torchvision's Resize and CenterCrop round sides and offset to pixels of the view: for
    images of 200 to 800 px, the edges differ by at most 1.8 pixels of a view of 224 px.
    """
    short = min(height, width)
    side = min(short, max(1, round(short * pixels / round(pixels * 8 / 7))))
    return box_record((height - side) // 2, (width - side) // 2, side, side)


def unpack(records: Records, height: int, width: int) -> list[Fields]:
    """Converts records to tuples of numbers, since reading the fields of a NumPy record takes about as long as flipping a crop.

    Raises:
        ImageError: A box is empty or not inside an image of `height` x `width` pixels.
    """
    unpacked: list[Fields] = records.tolist()
    for top, left, h, w, *_ in unpacked:
        if top + h > height or left + w > width or h == 0 or w == 0:
            raise _outside((top, left, h, w), height, width)
    return unpacked


def boxes(records: Records, height: int, width: int) -> Int64Array:
    """Returns top, left, height and width of records [M], with the checks of `unpack`: int64 [M, 4]."""
    numbers = np.frombuffer(records.tobytes(), dtype="<u2").reshape(-1, CROP_DTYPE.itemsize // 2)  # much faster than by field
    found = numbers[:, :4].astype(np.int64)
    bad = (found[:, :2] + found[:, 2:] > (height, width)) | (found[:, 2:] == 0)
    if bad.any():
        raise _outside(found[bad.any(axis=1)][0].tolist(), height, width)
    return found


def _outside(box: Sequence[int], height: int, width: int) -> ImageError:
    top, left, h, w = box
    return ImageError(
        f"crop of {w} x {h} at ({left}, {top}) is outside an image of {width} x {height} pixels: these crops were drawn for "
        "another image"
    )


def well_formed(records: Records) -> bool:
    """Whether the flags and all fields have values that a recipe can draw."""
    return not (records["flags"] & ~np.uint8(FLAGS)).any() and all(
        bool(((values >= field.low) & (values <= field.high)).all())
        for name, field in FIELDS.items()
        for values in [records[name].astype(np.float32)]
    )
