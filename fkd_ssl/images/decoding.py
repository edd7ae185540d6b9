"""Reads the size and the pixels of encoded images. All images of this library are opened and decoded here."""

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
from fkd_ssl.errors import ImageAccessError, ImageError, RequestError
from fkd_ssl.text import first_line

MAX_SIDE = 65535  # boxes are uint16
MAX_PIXELS = 178_956_970  # Pillow suspects a decompression bomb in larger images
MAX_BYTES = 2**31 - 4096  # what Linux reads at once
_ORIENTATION = 0x0112
_GREY, _PALETTE = 0, 3  # colour types of a PNG
# the inverse of Pillow's transposition for each EXIF orientation
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
    """Opens an image file. Links are followed.

    Raises:
        ImageAccessError: The file cannot be opened, or is a pipe, a device or a folder.
    """
    try:  # without O_NONBLOCK, opening a named pipe waits for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return open(descriptor, "rb", buffering=buffering)  # noqa: PTH123  (a descriptor)
        os.close(descriptor)
    except ValueError as error:
        raise ImageAccessError(f"{path!r}: cannot be opened: {error}") from error
    except OSError as error:
        raise inaccessible(path, error) from error
    raise ImageAccessError(f"{path}: not a regular file; remove it from the folder of images")


def read_bytes(path: str | Path) -> bytes:
    """Returns the bytes of an image file.

    Raises:
        ImageAccessError: The file cannot be read.
        ImageError: The file is too large for an image.
    """
    try:
        with open_file(path, buffering=0) as file:
            check_bytes(os.fstat(file.fileno()).st_size, path)
            return file.read()
    except OSError as error:
        raise inaccessible(path, error) from error


def read_size(path: str | Path) -> tuple[int, int]:
    """Reads width and height of an image file in pixels, from the header only, without applying EXIF orientation.

    Raises:
        ImageAccessError: The file cannot be read.
        ImageError: The file is not an image, or the image is too large.
    """
    with open_file(path) as file:
        return header_size(file, path)


def header_size(file: BinaryIO, name: str | Path) -> tuple[int, int]:
    """Reads width and height of an encoded image from its header, without EXIF orientation. Raises as `read_size` does."""
    try:
        with Image.open(file) as header:
            width, height = _stored_size(header)
    except _INVALID as error:
        raise _unreadable(error, name) from error
    _check_size(height, width, name)
    return width, height


def decode(data: bytes, name: str | Path) -> UInt8Array:
    """Decodes an image to RGB pixels uint8 [H, W, 3].

    simplejpeg (libjpeg-turbo) decodes JPEGs, and Pillow decodes everything else, including JPEGs that simplejpeg rejects. Both
    give the same pixels (up to one level for CMYK). Pillow decodes some corrupt data, but rejects truncated files. Animations
    give their first frame. Greyscale, palette and CMYK images are converted to RGB, alpha is dropped, and EXIF orientation is
    not applied.

    Greyscale images of more than 8 bits are converted to 8 bits by their range. 16-bit values lose the low byte. Files do not
    state the range of 32-bit integers: images with values up to 255 are kept, and images with values up to 65535 lose the low
    byte. Floats in 0 to 1 are multiplied by 255, and floats in 0 to 255 are rounded. Other values raise an error.

    Raises:
        ImageError: The bytes are truncated, are not an image, or have values of an unknown range. Messages start with `name`.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            with suppress(ValueError):  # not a valid JPEG: try Pillow
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


def decode_mask(data: bytes, name: str | Path) -> UInt8Array:
    """Decodes a PNG with one byte per pixel, greyscale or palette, to its values uint8 [H, W]: grey levels or palette indices.

    Raises:
        RequestError: The file is another kind of image.
        ImageError: The data is damaged.
    """
    depth, colours = data[24:26] if len(data) > 25 and data.startswith(b"\x89PNG\r\n\x1a\n") else (0, 0)
    if colours != _PALETTE and (colours, depth) != (_GREY, 8):  # Pillow would stretch the values of fewer bits
        raise RequestError(f"{name}: expected a mask: a PNG with one byte per pixel (greyscale of 8 bits, or a palette)")
    try:
        with Image.open(io.BytesIO(data)) as encoded:
            _check_size(encoded.height, encoded.width, name)
            return np.array(encoded)
    except _INVALID as error:
        raise _unreadable(error, name) from error


def read_image(path: str | Path) -> UInt8Array:
    """Decodes an image file to RGB pixels uint8 [H, W, 3]. Raises as `read_bytes` and `decode` do."""
    return decode(read_bytes(path), path)


def _stored_size(picture: Image.Image) -> tuple[int, int]:
    """Returns width and height as stored. Some versions of Pillow apply the orientation of a TIFF to its size."""
    if picture.format == "TIFF":
        tags = picture.tag_v2  # type: ignore[attr-defined]
        return int(tags[256]), int(tags[257])
    return picture.size


def _as_stored(picture: Image.Image) -> Image.Image:
    """Undoes the orientation. Pillow applies it for TIFF only, when it loads the pixels."""
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
    """Converts greyscale of more than 8 bits to uint8 by the range of its values. Raises ValueError if that is unknown."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # also for NaN
            raise ValueError(f"float values from {low:g} to {high:g}; expected 0 to 1 or 0 to 255")
        scaled: UInt8Array = np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
        return scaled
    if low < 0 or high > 65535:
        raise ValueError(f"integers from {low} to {high}; expected 0 to 255 or 0 to 65535")
    sixteen = values.dtype.itemsize == 2 or format_ in ("PNG", "PPM")  # Pillow may load their 16 bits as 32
    shifted: UInt8Array = (values >> 8 if sixteen or high > 255 else values).astype(np.uint8)
    return shifted


def _check_size(height: int, width: int, name: str | Path) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(f"{name}: {width} x {height} pixels; the maximum is {MAX_SIDE} per side, {MAX_PIXELS} in all")


def check_bytes(size: int, name: str | Path) -> None:
    """Raises ImageError if an encoded image has too many bytes, before they are read into memory."""
    if size > MAX_BYTES:
        raise ImageError(f"{name}: {size:,} bytes; an image may have {MAX_BYTES:,} at most")


def inaccessible(name: str | Path, error: OSError) -> ImageAccessError:
    """Returns the error for an image that cannot be opened or read."""
    return ImageAccessError(f"{name}: cannot be read: {error.strerror}; restore the file, its permissions or its disk")


def _unreadable(error: BaseException, name: str | Path) -> ImageError | ImageAccessError:
    """Returns our error for an error of Pillow. An errno means that the system failed, not that the data is damaged."""
    if isinstance(error, OSError) and error.errno is not None:
        return inaccessible(name, error)
    reason = "unknown image format" if isinstance(error, UnidentifiedImageError) else first_line(error)
    return ImageError(f"{name}: not a readable image: {reason}")
