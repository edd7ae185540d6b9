"""Makes a smaller copy of an image set, as files in the same folders or in tars, for small crops."""

import functools
import io
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from tqdm.auto import tqdm

from fkd_ssl import files, progress
from fkd_ssl.arrays import UInt8Array
from fkd_ssl.errors import FkdError, ImageError, RequestError
from fkd_ssl.images import SUFFIXES, ImageSource, decode, read_size
from fkd_ssl.images.names import refuse
from fkd_ssl.images.packing import TarWriter
from fkd_ssl.text import format_bytes, plural

_JPEG = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})
_SAMPLED = 32  # images that are shrunk first to estimate the size of the copy
_AHEAD = 64  # images that are processed at a time
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CacheSummary:
    """Result of `shrink_set`."""

    written: int
    """Images written by this call."""
    unreadable: list[str]
    """Relative paths that were skipped."""
    bytes: int
    """Bytes of all images of the copy."""
    source_bytes: int
    """Bytes of the images that the copy was made from."""


def shrink(image: UInt8Array, short_side: int) -> UInt8Array:
    """Shrinks an image to a short side of at most `short_side` by area means: uint8 [h, w, 3]. Smaller ones are unchanged."""
    height, width = image.shape[:2]
    size = _scaled(width, height, short_side)
    if size == (width, height):
        return image
    small: UInt8Array = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return small


def _scaled(width: int, height: int, short_side: int) -> tuple[int, int]:
    scale = min(1.0, short_side / min(width, height))
    return round(width * scale), round(height * scale)


def encode(image: UInt8Array, name: str, quality: int) -> bytes:
    """Encodes uint8 [H, W, 3] in the format that the suffix of `name` states.

    JPEG keeps full colour resolution; Pillow writes the other formats, GIF with 256 colours.
    """
    suffix = Path(name).suffix.lower()
    if suffix in _JPEG:
        data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorsubsampling="444")
        return data
    buffer = io.BytesIO()
    options = {"quality": quality} if suffix in (".webp", ".avif") else {}
    Image.fromarray(image).save(buffer, format=Image.registered_extensions()[suffix], **options)
    return buffer.getvalue()


def shrink_set(
    images: ImageSource,
    folder: Path,
    *,
    short_side: int,
    quality: int = 95,
    tars: int | None = None,
    skip_unreadable: bool = False,
    threads: int = 2,
    log: Callable[[str], None] = lambda message: None,
) -> CacheSummary:
    """Writes a smaller copy of every image, with the same relative path and format. Continues after an interruption.

    Images that are small enough are copied byte for byte.

    Args:
        images: The image set.
        folder: Folder of the copy. Existing files are kept if they are readable images of the right size.
        short_side: Maximum short side of the copies, in pixels; 0 copies every image byte for byte.
        quality: Quality of JPEG and WebP.
        tars: Number of tar files that hold the copies. Default: each copy is a file.
        skip_unreadable: Leave out damaged images instead of stopping.
        threads: Number of threads that read, shrink and write.
        log: Called with each line for the user.

    Raises:
        RequestError: One folder would be inside the other, a name has no suffix of an image format, or a setting is invalid.
        ImageAccessError: An image cannot be opened.
        ImageError: An image is damaged, or an existing file in `folder` does not belong to the copy.
        FkdError: There is not enough disk space.
    """
    if not (short_side == 0 or 8 <= short_side <= 4096) or not 1 <= quality <= 100 or threads < 1:
        raise RequestError(
            f"short_side {short_side}, quality {quality}, threads {threads}: expected 0 or 8 to 4096, 1 to 100, at least 1"
        )
    check_apart(images.spec, folder)
    odd = (name for name in images.names if Path(name).suffix.lower() not in SUFFIXES)
    refuse(images.spec, odd, "have no suffix of an image format, which a file needs")
    writer = None if tars is None else TarWriter(images, folder, tars)
    log(_announce(images, folder, short_side, quality))
    for place in {folder} if writer is not None else sorted({folder / Path(name).parent for name in images.names}):
        place.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(place, seconds=0)  # safe, since this process holds the folder's lock

    def tried(copy: Callable[[int], T], index: int) -> T | None:
        """Returns the copy of an image; None if it is unreadable and skipped."""
        try:
            return copy(index)
        except ImageError as error:
            if skip_unreadable:
                return None
            raise ImageError(f"{error}; remove it or pass --on_unreadable skip") from error

    made = _Made(images)
    with ThreadPoolExecutor(threads) as pool, made.bar:

        def copies(copy: Callable[[int], T], rows: range) -> Iterator[tuple[int, T | None]]:
            for first in range(rows.start, rows.stop, _AHEAD):
                some = range(first, min(first + _AHEAD, rows.stop))
                images.expect(dict.fromkeys(images.group(row) for row in range(first, min(first + 2 * _AHEAD, len(images)))))
                yield from zip(some, pool.map(functools.partial(tried, copy), some), strict=True)

        if writer is None:
            to_file = functools.partial(_copy, images, folder, short_side, quality)
            for row, of_file in copies(to_file, range(len(images))):
                made.add(row, of_file)
            return made.summary()

        def to_tar(index: int) -> tuple[int, bytes]:
            data = images.read(index)
            return len(data), _shrunk(data, images.where(index), short_side, quality)

        def members(rows: range) -> Iterator[tuple[int, bytes]]:
            for row, in_tar in copies(to_tar, rows):
                made.add(row, in_tar and (in_tar[0], len(in_tar[1]), True))
                if in_tar is not None:
                    yield row, in_tar[1]

        for tar, rows in writer.tars():
            finished = writer.finished(tar, rows)
            if finished is None:
                writer.write(tar, members(rows))
                continue
            for row in rows:
                made.add(row, (images.byte_size(row), finished[row], False) if row in finished else None)
    return made.summary()


class _Made:
    """Counts copies."""

    def __init__(self, images: ImageSource) -> None:
        self._images = images
        self._written = self._bytes = self._source_bytes = 0
        self._unreadable: list[str] = []
        hidden = progress.bar_disabled(show=True)
        self.bar = tqdm(total=len(images), unit="img", desc="cache", disable=hidden, smoothing=0.05)

    def add(self, row: int, copy: tuple[int, int, bool] | None) -> None:
        """Adds an image: its bytes, the bytes of its copy, and whether it was written now; None if it is unreadable."""
        if copy is None:
            self._unreadable.append(self._images.names[row])
            self.bar.update(1)
            return
        self._source_bytes += copy[0]
        self._bytes += copy[1]
        self._written += copy[2]
        self.bar.update(1) if copy[2] else progress.advance_done(self.bar, 1)

    def summary(self) -> CacheSummary:
        """Returns the counts."""
        return CacheSummary(
            written=self._written, unreadable=self._unreadable, bytes=self._bytes, source_bytes=self._source_bytes
        )


def check_apart(source: str, folder: Path) -> None:
    """Raises RequestError if the folder of a copy is inside the folder of its images, or contains it."""
    a, b = Path(source).resolve(), folder.resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise RequestError(f"{folder}: is inside {source} or contains it; choose an --out outside the folder of images")


def _announce(images: ImageSource, folder: Path, short_side: int, quality: int) -> str:
    """Describes the estimated size of the copy, from a sample. Raises FkdError if there is not enough disk space."""
    sizes = []
    for index in np.linspace(0, len(images) - 1, min(_SAMPLED, len(images))).astype(int):
        with suppress(ImageError):  # reported when the image is copied
            data = images.read(int(index))
            sizes.append((len(data), len(_shrunk(data, images.where(int(index)), short_side, quality))))
    if not sizes:
        raise ImageError(f"{images.spec}: none of {min(_SAMPLED, len(images))} images can be read")
    before, after = np.mean(sizes, axis=0) * len(images)
    disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(disk).free
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    if after - there > free:
        raise FkdError(
            f"{folder}: needs about {format_bytes(after - there)} more and the disk has {format_bytes(free)} free: free some, "
            "or choose a smaller --short_side or --quality"
        )
    line = (
        f"{plural(len(images), 'image')}, about {format_bytes(before)}, "
        f"{f'to short sides of {short_side} px' if short_side else 'unchanged'}: about {format_bytes(after)}; "
        f"{format_bytes(free)} free on the disk"
    )
    if after > before:
        line += (
            "\nwarning: the copy would be larger than its source: choose a smaller --short_side or --quality, or train on "
            f"{images.spec} itself"
        )
    return line


def _shrunk(data: bytes, name: str, short_side: int, quality: int) -> bytes:
    image = decode(data, name)  # raises an error if it is damaged
    if not short_side:
        return data
    small = shrink(image, short_side)
    return data if small is image else encode(small, name, quality)


def _copy(images: ImageSource, folder: Path, short_side: int, quality: int, index: int) -> tuple[int, int, bool]:
    """Returns the bytes of an image, the bytes of its copy, and whether the copy was written now."""
    copy = folder / images.names[index]
    if copy.exists():
        with suppress(ImageError):
            size, width, height = images.size(index)
            if read_size(copy) == _scaled(width, height, short_side or max(width, height)):
                return size, copy.stat().st_size, False
        raise ImageError(
            f"{copy}: exists and is not a copy of {images.where(index)} at this size; delete it or choose another --out"
        )
    data = images.read(index)
    small = _shrunk(data, images.where(index), short_side, quality)
    with files.create(copy) as file:
        file.write(small)
    return len(data), len(small), True
