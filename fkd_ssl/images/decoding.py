"""Encoded images: their size from the header, and their pixels. All images of this library are opened and decoded here."""

import io
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fkd_ssl.arrays import UInt8Array
from fkd_ssl.errors import ImageAccessError, ImageError

MAX_SIDE = 65535  # boxes are uint16
MAX_PIXELS = 178_956_970  # where Pillow suspects a decompression bomb
_ORIENTATION = 0x0112
# what undoes Pillow's transposition for each EXIF orientation
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_INVALID = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for damaged data


def open_file(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Opens the file of an image; links are followed.

    Raises:
        ImageAccessError: The file cannot be opened, or is a pipe, a device or a folder.
    """
    try:  # without O_NONBLOCK, opening a named pipe waits for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return open(descriptor, "rb", buffering=buffering)  # noqa: PTH123  (a descriptor)
        os.close(descriptor)
    except OSError as error:
        raise inaccessible(path, error) from error
    raise ImageAccessError(f"{path}: not a regular file; remove it from the folder of images")


def read_bytes(path: str | Path) -> bytes:
    """The bytes of an image's file; raises ImageAccessError, with its name, if it cannot be read."""
    try:
        with open_file(path, buffering=0) as file:
            return file.read()
    except OSError as error:
        raise inaccessible(path, error) from error


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels of an image's file, from the header alone, without EXIF orientation.

    Raises:
        ImageAccessError: The file cannot be read.
        ImageError: It is not an image, or is too large.
    """
    with open_file(path) as file:
        return header_size(file, path)


def header_size(file: BinaryIO, name: str | Path) -> tuple[int, int]:
    """Width and height of an encoded image, from the header alone, without EXIF orientation; raises as `read_size`."""
    try:
        with Image.open(file) as header:
            width, height = _stored_size(header)
    except _INVALID as error:
        raise _unreadable(error, name) from error
    _check_size(height, width, name)
    return width, height


def decode(data: bytes, name: str | Path) -> UInt8Array:
    """Pixels uint8 [H, W, 3] RGB of an encoded image.

    simplejpeg (libjpeg-turbo) decodes JPEGs, and Pillow everything else. Pillow also decides about a JPEG that simplejpeg
    refuses: both give the same pixels (of CMYK, up to a level), and Pillow accepts corrupt data but no truncated file. Of an
    animation the first frame is taken. Greyscale, palette and CMYK images become RGB, alpha is dropped, and EXIF orientation
    is never applied.

    Greyscale of more than 8 bits becomes 8 bits by its range. 16 bits lose the low byte. 32-bit integers, whose range a file
    does not say, keep values up to 255, and lose the low byte of values up to 65535. Floats in 0 to 1 are multiplied by
    255, and floats in 0 to 255 are rounded. Other values are refused.

    Raises:
        ImageError: The bytes are truncated, are not an image, or have values of no known range; the message starts with `name`.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            with suppress(ValueError):  # not quite a JPEG: Pillow decides
                height, width, *_ = simplejpeg.decode_jpeg_header(data)
                _check_size(height, width, name)
                pixels: UInt8Array = simplejpeg.decode_jpeg(data, "RGB")
                return pixels
        with Image.open(io.BytesIO(data)) as encoded:
            width, height = _stored_size(encoded)
            _check_size(height, width, name)
            picture = _as_stored(encoded)
            if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
                grey = _eight_bits(np.asarray(picture), picture.format)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(picture.convert("RGB"))
    except _INVALID as error:
        raise _unreadable(error, name) from error


def read_image(path: str | Path) -> UInt8Array:
    """Pixels uint8 [H, W, 3] RGB of an image's file; raises as `read_bytes` and `decode`."""
    return decode(read_bytes(path), path)


def _stored_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height as stored: those that Pillow gives of a TIFF have its orientation applied, in some versions."""
    if picture.format == "TIFF":
        tags = picture.tag_v2  # type: ignore[attr-defined]
        return int(tags[256]), int(tags[257])
    return picture.size


def _as_stored(picture: Image.Image) -> Image.Image:
    """The image without its orientation: Pillow applies that of TIFF when it loads the pixels, and of no other format."""
    if picture.format != "TIFF":
        return picture
    orientation = picture.getexif().get(_ORIENTATION, 1)
    picture.load()
    if orientation not in _UNDO or picture.getexif().get(_ORIENTATION, 1) == orientation:
        return picture
    stored = picture.transpose(_UNDO[orientation])
    stored.format = picture.format
    return stored


def _eight_bits(values: npt.NDArray[Any], format_: str | None) -> UInt8Array:
    """Greyscale of more than 8 bits as uint8, by the range of its values; raises ValueError if that is not known."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # also for NaN
            raise ValueError(f"float values from {low:g} to {high:g}; expected 0 to 1 or 0 to 255")
        scaled: UInt8Array = np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
        return scaled
    if low < 0 or high > 65535:
        raise ValueError(f"integers from {low} to {high}; expected 0 to 255 or 0 to 65535")
    sixteen = values.dtype.itemsize == 2 or format_ in ("PNG", "PPM")  # whose 16 bits Pillow may give as 32
    shifted: UInt8Array = (values >> 8 if sixteen or high > 255 else values).astype(np.uint8)
    return shifted


def _check_size(height: int, width: int, name: str | Path) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} x {height} pixels; a side may have {MAX_SIDE} at most, all {MAX_PIXELS}")


def inaccessible(name: str | Path, error: OSError) -> ImageAccessError:
    """The error for an image that the system does not let us read."""
    return ImageAccessError(f"{name}: cannot be read: {error.strerror}; restore the file, its permissions or its disk")


def _unreadable(error: BaseException, name: str | Path) -> ImageError | ImageAccessError:
    """What to raise instead of an error of Pillow; one with an errno came from the system and says nothing of the data."""
    if isinstance(error, OSError) and error.errno is not None:
        return inaccessible(name, error)
    if isinstance(error, UnidentifiedImageError):
        reason = "unknown image format"
    else:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ImageError(f"{name}: not a readable image: {reason}")
