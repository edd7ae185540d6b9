"""A folder of images as a sorted list of relative paths."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import features
from tqdm import tqdm

from fkd_ssl.errors import RequestError
from fkd_ssl.images.decoding import UInt8Array, header_size, inaccessible, open_file, read_bytes, read_image
from fkd_ssl.progress import hidden

# one list for all machines, since a store of the same folder must list the same images
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".avif", ".jp2", ".j2k"}
    | {".pbm", ".pgm", ".ppm", ".pnm", ".tga", ".tif", ".tiff"}
)
_OPTIONAL = {".avif": "avif", ".webp": "webp", ".jp2": "jpg_2000", ".j2k": "jpg_2000"}  # what Pillow may be built without
CONTENTS = "contents of "
"""How the names of those entries of an identity begin that change when a damaged image is replaced."""
_LISTED = 10  # names in a message
_READERS, _PIECE = 16, 4096  # threads that read for `digest`, and images handed to them at once


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """The pictures of a folder, in the order of their relative paths.

    Attributes:
        root: The folder.
        paths: Relative POSIX paths in Unicode's NFC form, sorted by code point.
        labels: int64 [N], the index into `classes` of each picture's first folder; -1 for a picture outside any.
        classes: Names of the first-level folders that hold pictures, sorted.
        on_disk: Relative paths as the file system spells them (they differ from `paths` on macOS).
        left_out: How many files were left out, by their suffix, since it is not that of an image.
    """

    root: Path
    paths: list[str]
    labels: npt.NDArray[np.int64]
    classes: list[str]
    on_disk: list[str]
    left_out: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """The file of picture `index`."""
        return self.root / self.on_disk[index]

    def read(self, index: int) -> UInt8Array:
        """Pixels uint8 [H, W, 3] of picture `index`; raises as `read_image`."""
        return read_image(self.file(index))

    def size(self, index: int) -> tuple[int, int, int]:
        """Bytes, width and height of picture `index`, from its header; raises as `read_size`."""
        with open_file(self.file(index)) as file:
            return os.fstat(file.fileno()).st_size, *header_size(file, self.file(index))

    def digest(self) -> str:
        """Hex sha256 of the names, classes and bytes of all images, which are read once: a copy has the same digest.

        Raises:
            ImageAccessError: An image cannot be read.
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

    def identity(self, name: str = "images", *, sizes: bool = True) -> dict[str, str]:
        """What a run keeps of this set to know it again: digests of names and classes, and of byte sizes; nothing is read.

        Neither the folder's path nor times count: a copy has the same identity. An image that was replaced by another one of
        the same number of bytes is not noticed; `digest` would notice it, and reads every image.

        Args:
            name: What the set is for the run.
            sizes: Include byte sizes. A store has its own, which each image is compared with when it is read.

        Raises:
            ImageAccessError: An image is gone.
        """
        names, lengths = hashlib.sha256(), hashlib.sha256()
        for index, (path, label) in enumerate(zip(self.paths, self.labels.tolist(), strict=True)):
            names.update(f"{path}\n{self.classes[label] if label >= 0 else ''}\n".encode())
            if sizes:
                lengths.update(f"{self._bytes(index)}\n".encode())
        found = {name: f"{len(self)} images in {len(self.classes)} classes, sha256 {names.hexdigest()}"}
        return found | ({f"{CONTENTS}{name}": f"sha256 {lengths.hexdigest()}"} if sizes else {})

    def _bytes(self, index: int) -> int:
        try:
            return os.stat(f"{self.root}/{self.on_disk[index]}").st_size  # noqa: PTH116  (of a million files)
        except OSError as error:
            raise inaccessible(self.file(index), error) from error

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
        RequestError: `root` is not a folder, holds no picture, holds a folder that cannot be listed, images of a format that
            this Pillow was built without, or names that a list of lines cannot hold.
    """
    if not str(root):
        raise RequestError("an empty name for a folder of images")
    root = Path(root)
    if not root.is_dir():
        raise RequestError(f"{root}: no such folder of images")
    left_out: Counter[str] = Counter()
    try:
        files = _walk(root, (), left_out)
    except OSError as error:
        raise RequestError(f"{error.filename}: cannot be listed: {error.strerror}") from error
    relative = [path[len(str(root)) :].lstrip(os.sep).replace(os.sep, "/") for path in files]
    wrong = (name for name in relative if not _is_line(name))
    _refuse(root, wrong, "have control characters, line separators or bytes that are not UTF-8")
    found: dict[str, str] = {}
    twice: list[str] = []
    for name in relative:
        if (first := found.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            twice += [first, name]
    _refuse(root, twice, "are the same in Unicode's NFC form as another one")
    if not found:
        raise RequestError(f"{root}: no images in this folder (looked for {', '.join(sorted(SUFFIXES))}){_others(left_out)}")
    _check_formats(root, found)
    paths = sorted(found)
    folders = [path.split("/", 1)[0] if "/" in path else None for path in paths]
    classes = sorted({folder for folder in folders if folder is not None})
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([-1 if folder is None else index[folder] for folder in folders], dtype=np.int64)
    on_disk = [found[path] for path in paths]
    return ImageSet(root=root, paths=paths, labels=labels, classes=classes, on_disk=on_disk, left_out=left_out)


def _is_line(name: str) -> bool:
    """Whether a text file can hold the name as one line: it has no control character, line separator or lone surrogate."""
    return name.isprintable() or not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)


def _refuse(root: Path, names: Iterable[str], why: str) -> None:
    """Raises RequestError if there are such names, with the first ones and their number."""
    if wrong := sorted(names):
        some = "".join(f"\n  {name!r}" for name in wrong[:_LISTED])
        more = f"\n  and {len(wrong) - _LISTED:,} more" if len(wrong) > _LISTED else ""
        raise RequestError(f"{root}: {len(wrong):,} names {why}; rename these files:{some}{more}")


def _check_formats(root: Path, paths: Iterable[str]) -> None:
    """Raises RequestError if images have a format that this Pillow does not read: they would count as damaged."""
    suffixes = {os.path.splitext(path)[1].lower() for path in paths}  # noqa: PTH122  (a million of them)
    for suffix in sorted(suffixes & _OPTIONAL.keys()):
        if not features.check(_OPTIONAL[suffix]):
            raise RequestError(f"{root}: this Pillow was built without {suffix}; update it (pip install --upgrade pillow)")


def _others(left_out: Counter[str]) -> str:
    """What was left out, in words, or nothing."""
    kinds = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in left_out.most_common(_LISTED))
    return f"; files of other kinds: {kinds}" if kinds else ""


def _walk(folder: str | Path, above: tuple[tuple[int, int], ...], left_out: Counter[str]) -> list[str]:
    """Files with an image's suffix under `folder`, the others counted; a link to a folder above it is not followed."""
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
                files += _walk(entry.path, (*above, here), left_out)
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in SUFFIXES:  # noqa: PTH122  (a million of them)
                files.append(entry.path)
            else:
                left_out[suffix] += 1
    return files
