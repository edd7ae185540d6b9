"""The list of images, divided into shards, and its manifest. Stores and folders of label maps share them."""

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
_MAX_LIST = 2**31  # maximum bytes of images.txt, which is held in memory
_LONGEST_PATH = 4097  # maximum bytes of a path and its newline: PATH_MAX of Linux
_PIECE = 2**18
# one of these occurs if a path is empty or absolute, contains a backslash or a NUL, or leads out of the folder
_UNSAFE = (
    b"\\",
    b"\0",
    b"\n/",
    b"//",
    b"/\n",
    b"\n\n",
    b"\n./",
    b"\n../",
    b"\n.\n",
    b"\n..\n",
    b"/./",
    b"/../",
    b"/.\n",
    b"/..\n",
)
_DRIVE = re.compile(rb"\n[A-Za-z]:")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The part of a manifest that describes the list of images.

    Attributes:
        rows_per_shard: Number of images in every shard but the last.
        count: Number of images N.
        images_sha256: sha256 of images.txt.
        sizes_sha256: sha256 of images.npy.
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
        """Returns the rows of a shard."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.count))

    @property
    def _values(self) -> dict[str, Any]:
        """Returns the values of manifest.json without its own sha256."""
        return {"format": self.FORMAT, "version": VERSION, **asdict(self)}

    @cached_property
    def digest(self) -> str:
        """The `sha256` of manifest.json, by which sidecars identify their folder."""
        return files.sha256(files.canonical(self._values))

    def write(self, folder: Path) -> None:
        """Publishes manifest.json, which is the last file of a new folder."""
        files.write_json(folder / MANIFEST, self._values)


def read_values(folder: Path, expected: str, *, what: str, command: str) -> tuple[dict[str, Any], str]:
    """Reads a manifest; returns its values without format and version, and its digest.

    Args:
        folder: Folder of the manifest.
        expected: The expected format.
        what: Name of such a folder in messages.
        command: The command that makes such a folder.

    Raises:
        NotFoundError: The folder or its manifest is missing.
        StoreError: The manifest is damaged, or has another format or version.
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
    """Returns paths and sizes of a folder's rows. Raises StoreError if they do not match the manifest."""
    data = files.read_regular(folder / IMAGES, min(_MAX_LIST, manifest.count * _LONGEST_PATH))
    if files.sha256(data) != manifest.images_sha256:
        raise StoreError(
            f"{folder / IMAGES}: damaged: its sha256 differs from the one in the manifest; restore it from a backup"
        )
    # checked before an array is created: for a million empty lines it would take nine times their bytes
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
        raise StoreError(
            f"{folder / SIZES}: damaged: its sha256 differs from the one in the manifest; restore it from a backup"
        )
    return paths, sizes


def is_unsafe(lines: bytes) -> bool:
    """Whether one of the paths, one per line, is empty or absolute, or leads out of the image folder.

    It searches for plain strings, since a regular expression takes 1.5 seconds for a million lines.
    """
    first = b"\n" + lines[:_PIECE]  # for the first line; not a copy of the whole file
    return any(
        any(part in text for part in _UNSAFE) or (b":" in text and _DRIVE.search(text) is not None) for text in (first, lines)
    )


def write_sidecar(path: Path, manifest: Listing, shard: int, values: dict[str, Any]) -> None:
    """Publishes the sidecar of a shard's array, which marks it as finished: `values`, the shard and the manifest's digest."""
    files.write_json(path.with_suffix(".json"), {**values, "shard": shard, "manifest": manifest.digest})


def read_sidecar(path: Path, manifest: Listing, shard: int, keys: Set[str]) -> dict[str, Any]:
    """Reads the sidecar of a shard's array.

    Args:
        path: The file of the array.
        manifest: The folder's manifest.
        shard: The shard.
        keys: Keys of the sidecar in addition to `file`, `shard` and `manifest`.

    Raises:
        StoreError: The sidecar is damaged, or belongs to another shard or folder.
    """
    path = path.with_suffix(".json")
    values = files.read_json(path)
    if values.keys() != {"file", "shard", "manifest", *keys}:
        raise StoreError(f"{path}: keys are missing or unknown; the file is damaged or newer")
    if values["shard"] != shard or values["manifest"] != manifest.digest:
        where = f"shard {values['shard']!r}" if values["manifest"] == manifest.digest else "another folder"
        raise StoreError(f"{path}: belongs to {where}: files were swapped; restore this shard's own")
    return values
