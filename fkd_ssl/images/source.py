"""The base class of all image sets, wherever the images are stored."""

import hashlib
import io
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from fkd_ssl import files
from fkd_ssl.arrays import Int64Array, UInt8Array
from fkd_ssl.errors import RequestError
from fkd_ssl.images.decoding import decode, header_size
from fkd_ssl.images.names import Names
from fkd_ssl.progress import bar_disabled

CONTENTS = "contents of "
"""Prefix of the entries of an identity that change when a damaged image is replaced."""
_SHA256 = re.compile("[0-9a-f]{64}")
_SETTLED = 10  # seconds; a file that changed more recently may change again within one tick of its file system's clock
_READERS, _PIECE = 16, 4096  # threads that read for `digest`, and images per batch for them


class ImageSource(ABC):
    """A set of labelled images, identified by their names.

    A store refers to its images by name only, and their crops are drawn from their names. So the same images with the same
    names give the same store, wherever the images are stored.

    To add a source, subclass this class and implement `read`. Open it with `module:function` in place of a folder, or with a
    function in `SOURCES`. Override `size` if headers can be read without the rest of the image, and `group` if some images are
    read together (a tar, a row group). `read` is called from threads and from forked processes.

    Args:
        spec: The argument of `open_images`.
        names: Names of the images in the order of the set: "/"-separated, in Unicode's NFC form, and unique.
        labels: Indices into `classes` [N]; -1 for an image without a class.
        classes: Names of the classes.

    Attributes:
        spec: As given; used in messages and results.
        names: As given.
        labels: int64 [N].
        classes: As given.
        notes: Lines that the user should see, such as what was left out.
        mix_groups: Number of groups whose images a training mixes by default; 0 mixes all images.
    """

    mix_groups = 0

    def __init__(self, spec: str, names: Iterable[str] | bytes, labels: npt.ArrayLike, classes: list[str]) -> None:
        self.spec = spec
        try:
            self.names = names if isinstance(names, Names) else Names(names)
        except UnicodeEncodeError as error:
            raise RequestError(f"{spec}: a name has characters that UTF-8 cannot hold: {error.object!r}") from error
        self.labels: Int64Array = np.asarray(labels, dtype=np.int64)
        self.classes = classes
        self.notes: list[str] = []
        if len(self.labels) != len(self.names):
            raise RequestError(f"{spec}: {len(self.labels)} labels of {len(self.names)} images")

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Returns the encoded image `index`.

        Raises:
            ImageAccessError: The image cannot be opened.
            ImageError: The image is damaged.
        """

    def size(self, index: int) -> tuple[int, int, int]:
        """Returns bytes, width and height of image `index` from its header. Raises as `read`, and if it is not an image."""
        data = self.read(index)
        return len(data), *header_size(io.BytesIO(data), self.where(index))

    def byte_size(self, index: int) -> int:
        """Returns the number of bytes of the encoded image `index`. Raises as `read` does."""
        return len(self.read(index))

    def group(self, index: int) -> int:
        """Returns the group of image `index`: images of one group are read faster in sequence. Default: 0 for all images."""
        return 0

    def groups(self, indices: Int64Array) -> Int64Array:
        """Returns the group of each of these images: int64 [n]."""
        return np.array([self.group(index) for index in indices.tolist()], dtype=np.int64)

    def expect(self, groups: Iterable[int]) -> None:  # noqa: B027  (optional)
        """Tells the source which groups are read next, in order, so that it can fetch them ahead. Default: does nothing."""

    def where(self, index: int) -> str:
        """Returns the location of image `index`, for messages."""
        return f"{self.spec}/{self.names[index]}"

    def pixels(self, index: int) -> UInt8Array:
        """Decodes image `index` to RGB pixels uint8 [H, W, 3]. Raises as `read` and `decode` do."""
        return decode(self.read(index), self.where(index))

    def digest(self) -> str:
        """Returns the hex sha256 of the names, classes and bytes of all images. A copy has the same digest.

        The digest is kept in the cache folder, so that the images are read again only after a `stamp` has changed.

        Raises:
            ImageAccessError: An image cannot be opened.
        """
        return self._digest

    def stamp(self, index: int) -> tuple[str, float] | None:
        """Returns a value that changes whenever image `index` changes, and the time of the last change. Reads no image.

        Returns:
            The stamp, and the time in seconds since the epoch; None if the source has no stamps.

        Raises:
            ImageAccessError: The image is missing.
        """
        return None

    @cached_property
    def _digest(self) -> str:
        kept = self._kept_digest()
        if kept is not None and kept.exists() and _SHA256.fullmatch(found := kept.read_text(errors="replace")):
            return found
        sums = hashlib.sha256()
        bar = tqdm(total=len(self), desc="checksums", unit="img", disable=bar_disabled(show=len(self) > _PIECE))
        with ThreadPoolExecutor(_READERS) as pool, bar:
            for first in range(0, len(self), _PIECE):
                rows = range(first, min(first + _PIECE, len(self)))
                for index, content in zip(rows, pool.map(self._sha256, rows), strict=True):
                    sums.update(f"{self.names[index]}\n{self.class_of(index)}\n".encode() + content)
                bar.update(len(rows))
        if kept is not None:
            with suppress(OSError):  # without a writable cache folder, the images are only read again
                kept.parent.mkdir(parents=True, exist_ok=True)
                files.replace(kept, sums.hexdigest().encode())
        return sums.hexdigest()

    def _kept_digest(self) -> Path | None:
        """Returns the file in the cache folder that keeps the digest; None if the stamps are not reliable."""
        stamps, newest = hashlib.sha256(), time.time() - _SETTLED
        for index in range(len(self)):
            stamp = self.stamp(index)
            if stamp is None or stamp[1] > newest:
                return None
            stamps.update(f"{self.names[index]}\n{self.class_of(index)}\n{stamp[0]}\n".encode())
        return files.cache_folder() / "digests" / stamps.hexdigest()

    def class_of(self, index: int) -> str:
        """Returns the name of an image's class; empty if it has none."""
        label = int(self.labels[index])
        return self.classes[label] if label >= 0 else ""

    def _sha256(self, index: int) -> bytes:
        return hashlib.sha256(self.read(index)).digest()

    def identity(self, name: str = "images", *, sizes: bool = True) -> dict[str, str]:
        """Returns what identifies this set in a run: digests of names and classes, and of byte sizes. Reads no image.

        The location of the images does not matter: a copy has the same identity. An image that was replaced by another one of
        the same size in bytes is not detected; `digest` detects it, but reads every image.

        Args:
            name: Name of the set in the run.
            sizes: Include byte sizes. A store has its own, and compares each image with them when it is read.

        Raises:
            ImageAccessError: An image is missing.
        """
        names, lengths = hashlib.sha256(), hashlib.sha256()
        for index, (image, label) in enumerate(zip(self.names, self.labels.tolist(), strict=True)):
            names.update(f"{image}\n{self.classes[label] if label >= 0 else ''}\n".encode())
            if sizes:
                lengths.update(f"{self.byte_size(index)}\n".encode())
        found = {name: f"{len(self)} images in {len(self.classes)} classes, sha256 {names.hexdigest()}"}
        return found | ({f"{CONTENTS}{name}": f"sha256 {lengths.hexdigest()}"} if sizes else {})

    def subset(self, indices: npt.ArrayLike) -> "ImageSource":
        """Returns the images at `indices`, in that order, with the same classes."""
        return _Subset(self, np.asarray(indices, dtype=np.int64))


class _Subset(ImageSource):
    def __init__(self, source: ImageSource, indices: Int64Array) -> None:
        super().__init__(source.spec, source.names.take(indices), source.labels[indices], source.classes)
        self._source, self._indices = source, indices
        self.mix_groups = source.mix_groups

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))

    def size(self, index: int) -> tuple[int, int, int]:
        return self._source.size(int(self._indices[index]))

    def byte_size(self, index: int) -> int:
        return self._source.byte_size(int(self._indices[index]))

    def stamp(self, index: int) -> tuple[str, float] | None:
        return self._source.stamp(int(self._indices[index]))

    def group(self, index: int) -> int:
        return self._source.group(int(self._indices[index]))

    def groups(self, indices: Int64Array) -> Int64Array:
        return self._source.groups(self._indices[indices])

    def expect(self, groups: Iterable[int]) -> None:
        self._source.expect(groups)

    def where(self, index: int) -> str:
        return self._source.where(int(self._indices[index]))
