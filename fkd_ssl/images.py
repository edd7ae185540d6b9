"""Image sets: a folder of pictures as a sorted list of relative paths, and the one way to read a picture's pixels."""

import hashlib
import io
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fkd_ssl.errors import ImageError, RequestError
from fkd_ssl.progress import hidden

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
MAX_SIDE = 65535  # boxes are uint16
MAX_PIXELS = 178_956_970  # where Pillow suspects a decompression bomb

_READERS, _PIECE = 16, 4096  # threads that read for `digest`, and images handed to them at once

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """The pictures of a folder, in the order of their relative paths.

    Attributes:
        root: The folder.
        paths: Relative POSIX paths in Unicode's NFC form, sorted by code point.
        labels: int64 [N], the index into `classes` of each picture's first folder; -1 for a picture outside any.
        classes: Names of the first-level folders that hold pictures, sorted.
        on_disk: Relative paths as the file system spells them (they differ from `paths` on macOS).
    """

    root: Path
    paths: list[str]
    labels: npt.NDArray[np.int64]
    classes: list[str]
    on_disk: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """The file of picture `index`."""
        return self.root / self.on_disk[index]

    def read(self, index: int) -> UInt8Array:
        """Pixels uint8 [H, W, 3] of picture `index`; raises ImageError as `read_image`."""
        return read_image(self.file(index))

    def digest(self) -> str:
        """Hex sha256 of the names, classes and bytes of all images, which are read once: a copy has the same digest.

        Raises:
            ImageError: An image cannot be read.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        sums = hashlib.sha256()
        bar = tqdm(total=len(self), desc="checksums", unit="img", disable=hidden(show=len(self) > _PIECE))
        with ThreadPoolExecutor(_READERS) as pool, bar:
            for first in range(0, len(self), _PIECE):
                rows = range(first, min(first + _PIECE, len(self)))
                for index, content in zip(rows, pool.map(self._sha256, rows), strict=True):
                    name = self.classes[self.labels[index]] if self.labels[index] >= 0 else ""
                    sums.update(f"{self.paths[index]}\n{name}\n".encode() + content)
                bar.update(len(rows))
        return sums.hexdigest()

    def _sha256(self, index: int) -> bytes:
        return hashlib.sha256(read_bytes(self.file(index))).digest()

    def subset(self, indices: npt.ArrayLike) -> "ImageSet":
        """The pictures at `indices`, in that order, with the same classes."""
        chosen = np.asarray(indices, dtype=np.int64)
        return ImageSet(
            root=self.root,
            paths=[self.paths[i] for i in chosen],
            labels=self.labels[chosen],
            classes=self.classes,
            on_disk=[self.on_disk[i] for i in chosen],
        )


def scan(root: str | Path) -> ImageSet:
    """Lists the pictures under `root`, following links to folders as torchvision's `ImageFolder` does.

    Raises:
        RequestError: `root` is not a folder, holds no picture, holds a folder that cannot be listed, or names that cannot
            be listed in a text file.
    """
    if not str(root):
        raise RequestError("an empty name for a folder of images")
    root = Path(root)
    if not root.is_dir():
        raise RequestError(f"{root}: no such folder of images")
    found: dict[str, str] = {}
    try:
        files = _walk(root, ())
    except OSError as error:
        raise RequestError(f"{error.filename}: cannot be listed: {error.strerror}") from error
    for path in files:
        relative = path[len(str(root)) :].lstrip(os.sep).replace(os.sep, "/")
        name = unicodedata.normalize("NFC", relative)
        if not name.isprintable():
            raise RequestError(f"{root}: {relative!r} has characters that cannot be listed; rename it")
        if name in found:
            raise RequestError(f"{root}: {found[name]!r} and {relative!r} are one name in Unicode's NFC form; rename one")
        found[name] = relative
    if not found:
        raise RequestError(f"{root}: no images in this folder (looked for {', '.join(sorted(SUFFIXES))})")
    paths = sorted(found)
    folders = [path.split("/", 1)[0] if "/" in path else None for path in paths]
    classes = sorted({folder for folder in folders if folder is not None})
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([-1 if folder is None else index[folder] for folder in folders], dtype=np.int64)
    return ImageSet(root=root, paths=paths, labels=labels, classes=classes, on_disk=[found[path] for path in paths])


def _walk(folder: str | Path, above: tuple[tuple[int, int], ...]) -> list[str]:
    """Files with a picture's suffix under `folder`; a link back to a folder that it lies in is not followed."""
    stat = Path(folder).stat()
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return []
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                files += _walk(entry.path, (*above, here))
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:  # noqa: PTH122  (a million of them)
                files.append(entry.path)
    return files


def read_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header alone; EXIF orientation is ignored, as by torchvision's loader.

    Raises:
        ImageError: The file is missing, is no picture, or has a side over 65535 pixels.
    """
    try:
        with Image.open(path) as header:
            width, height = header.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise ImageError(f"{path}: not a readable image: {_reason(error)}") from error
    _check_size(height, width, path)
    return width, height


def _check_size(height: int, width: int, path: str | Path) -> None:
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(f"{path}: {width} x {height} pixels; a side may have {MAX_SIDE} at most, all {MAX_PIXELS}")


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a picture's file; raises ImageError with its name where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123  (a third of Path.read_bytes' time)
            return file.readall()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {_reason(error)}") from error


def decode(data: bytes, path: str | Path) -> UInt8Array:
    """Pixels uint8 [H, W, 3] RGB of the bytes of `path`.

    JPEGs are decoded by simplejpeg (libjpeg-turbo), all else by Pillow, which also has the last word on a JPEG that
    simplejpeg refuses: both give the same pixels (of CMYK, up to a level), and Pillow bears corrupt data but no truncated
    file. Greyscale, palette, CMYK, alpha and 16-bit pictures become 8-bit RGB (alpha is dropped, 16 bits lose the low
    byte). EXIF orientation is ignored.

    Raises:
        ImageError: The bytes are truncated or no picture; the message names `path`.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            with suppress(ValueError):  # not quite a JPEG: Pillow decides
                height, width, *_ = simplejpeg.decode_jpeg_header(data)
                _check_size(height, width, path)
                pixels: UInt8Array = simplejpeg.decode_jpeg(data, "RGB")
                return pixels
        with Image.open(io.BytesIO(data)) as picture:
            _check_size(picture.height, picture.width, path)
            if picture.mode.startswith("I;16") or picture.mode == "I":
                grey = (np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: not a readable image: {_reason(error)}") from error


def read_image(path: str | Path) -> UInt8Array:
    """Pixels uint8 [H, W, 3] RGB of a picture's file; see `decode`."""
    path = Path(path)
    return decode(read_bytes(path), path)


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
