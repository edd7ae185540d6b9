"""A list of images, cut into shards, and its manifest: what the folders of stores and of label maps have in common."""

import codecs
import re
from collections.abc import Set
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fkd_ssl import files
from fkd_ssl.errors import NotFoundError, StoreError
from fkd_ssl.images import Names

VERSION = 1
MANIFEST, IMAGES, SIZES = "manifest.json", "images.txt", "images.npy"
SIZE_DTYPE = np.dtype([("bytes", "<u8"), ("width", "<u2"), ("height", "<u2")])
_MAX_LIST = 2**31  # bytes of images.txt, which is held in memory
_LONGEST_PATH = 4097  # bytes with its newline: PATH_MAX of Linux
_PIECE = 2**18
# what only a path has that is empty, absolute, has a backslash or a NUL, or leads out of the folder; a newline before each
_UNSAFE = (
    b"\\", b"\0", b"\n/", b"//", b"/\n", b"\n\n", b"\n./", b"\n../", b"\n.\n", b"\n..\n", b"/./", b"/../", b"/.\n", b"/..\n",
)  # fmt: skip
_DRIVE = re.compile(rb"\n[A-Za-z]:")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a manifest says of its images.

    Attributes:
        rows_per_shard: Images in every shard but the last.
        count: N, images.
        images_sha256: Of images.txt.
        sizes_sha256: Of images.npy.
    """

    FORMAT: ClassVar[str]
    rows_per_shard: int
    count: int
    images_sha256: str
    sizes_sha256: str

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """The rows of a shard."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.count))

    @property
    def _values(self) -> dict[str, Any]:
        """What manifest.json holds, without its own sha256."""
        return {"format": self.FORMAT, "version": VERSION, **asdict(self)}

    @cached_property
    def digest(self) -> str:
        """The `sha256` of manifest.json, by which sidecars name their folder."""
        return files.sha256(files.canonical(self._values))

    def write(self, folder: Path) -> None:
        """Publishes manifest.json, the last file of a new folder."""
        files.write_json(folder / MANIFEST, self._values)


def read_values(folder: Path, expected: str, *, what: str, command: str) -> tuple[dict[str, Any], str]:
    """The values of a manifest but for its format and version, and its digest.

    Args:
        folder: Where it is.
        expected: Its format.
        what: What the folder should be, in words.
        command: What makes such a folder.

    Raises:
        NotFoundError: The folder or its manifest is missing.
        StoreError: The manifest is damaged, or of another format or version.
    """
    path = folder / MANIFEST
    if not files.exists(path):
        found = "no such folder" if not folder.is_dir() else f"no {MANIFEST} in it"
        raise NotFoundError(f"{folder}: not {what} ({found}); make one with {command}")
    values = files.read_json(path)
    digest = files.sha256(files.canonical(values))
    if values.pop("format", None) != expected:
        raise StoreError(f"{path}: not the manifest of {what}; make one with {command}")
    version = values.pop("version", None)
    if version != VERSION:
        raise StoreError(f"{path}: format {version!r}; this version of fkd_ssl reads {VERSION}: update fkd_ssl")
    return values, digest


def read_images(folder: Path, manifest: Listing) -> tuple[Names, npt.NDArray[np.void]]:
    """Paths and sizes of a folder's rows; raises StoreError where they differ from what the manifest says."""
    data = files.read_regular(folder / IMAGES, min(_MAX_LIST, manifest.count * _LONGEST_PATH))
    if files.sha256(data) != manifest.images_sha256:
        raise StoreError(f"{folder / IMAGES}: altered: its sha256 is not the manifest's; restore it from a copy")
    # all checks before an array is made: a million empty lines would take nine times their bytes
    lines = data.count(b"\n")
    if lines != manifest.count or not data.endswith(b"\n"):
        raise StoreError(f"{folder / IMAGES}: {lines} lines, the manifest says {manifest.count}")
    if is_unsafe(data):
        raise StoreError(f"{folder / IMAGES}: a path is empty, absolute or escapes the image folder")
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for first in range(0, len(data), _PIECE):
            decoder.decode(data[first : first + _PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise StoreError(f"{folder / IMAGES}: not UTF-8 ({error.reason}); the file is damaged") from error
    paths = Names(data)
    sizes = files.map_npy(folder / SIZES, SIZE_DTYPE, (manifest.count,))
    if files.sha256_file(folder / SIZES) != manifest.sizes_sha256:
        raise StoreError(f"{folder / SIZES}: altered: its sha256 is not the manifest's; restore it from a copy")
    return paths, sizes


def is_unsafe(lines: bytes) -> bool:
    """Whether one of the paths, a line each, is empty, absolute, or escapes the image folder.

    Plain searches, since one regular expression of them takes a second and a half over a million lines.
    """
    first = b"\n" + lines[:_PIECE]  # of the whole file a copy would be made
    return any(
        any(part in text for part in _UNSAFE) or (b":" in text and _DRIVE.search(text) is not None) for text in (first, lines)
    )


def write_sidecar(path: Path, manifest: Listing, shard: int, values: dict[str, Any]) -> None:
    """Publishes the sidecar of an array of a shard, which finishes it: `values`, the shard and the manifest's digest."""
    files.write_json(path.with_suffix(".json"), {**values, "shard": shard, "manifest": manifest.digest})


def read_sidecar(path: Path, manifest: Listing, shard: int, keys: Set[str]) -> dict[str, Any]:
    """The sidecar of an array of a shard.

    Args:
        path: The array.
        manifest: The folder's.
        shard: The shard.
        keys: What it has beside `file`, `shard` and `manifest`.

    Raises:
        StoreError: It is damaged, or was written for another shard or another folder.
    """
    path = path.with_suffix(".json")
    values = files.read_json(path)
    if values.keys() != {"file", "shard", "manifest", *keys}:
        raise StoreError(f"{path}: keys are missing or unknown; the file is damaged or newer")
    if values["shard"] != shard or values["manifest"] != manifest.digest:
        where = f"shard {values['shard']!r}" if values["manifest"] == manifest.digest else "another folder"
        raise StoreError(f"{path}: written for {where}: files were swapped or copied; restore this shard's own")
    return values
