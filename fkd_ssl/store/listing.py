"""The list of images, divided into shards, and its manifest. Stores and folders of label maps share them."""

import codecs
import re
from bisect import bisect_right
from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from fkd_ssl import files
from fkd_ssl.arrays import Int64Array
from fkd_ssl.errors import NotFoundError, StoreError
from fkd_ssl.images import Names
from fkd_ssl.images.names import has_bad_parts

VERSION = 1
MANIFEST, IMAGES, SIZES = "manifest.json", "images.txt", "images.npy"
PUBLISHED = ("files.txt", "README.md")
"""The files that fkd-ssl publish adds."""
MAX_COUNT = 2**31
_EXTENSION = re.compile(r"images-(\d{5})\.json")
SIZE_DTYPE = np.dtype([("bytes", "<u8"), ("width", "<u2"), ("height", "<u2")])
_MAX_LIST = 2**31  # maximum bytes of images.txt, which is held in memory
_LONGEST_PATH = 4097  # maximum bytes of a path and its newline: PATH_MAX of Linux
_PIECE = 2**18
_DRIVE = re.compile(rb"\n[A-Za-z]:")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that were listed at once: those of a new folder (part 0), or those that an extension added.

    Each part begins a new shard.

    Attributes:
        number: Number of the part.
        count: Number of images.
        images_sha256: sha256 of its list of images.
        sizes_sha256: sha256 of its array of sizes.
        digest: The `sha256` of manifest.json or of the extension, by which sidecars identify the part.
    """

    number: int
    count: int
    images_sha256: str
    sizes_sha256: str
    digest: str

    def file(self, folder: Path, suffix: str) -> Path:
        """Returns the file of names (.txt), of sizes (.npy) or, for an extension, of the part itself (.json)."""
        return folder / (f"images-{self.number:05d}{suffix}" if self.number else f"images{suffix}")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The part of a manifest that describes the list of images.

    Attributes:
        rows_per_shard: Number of images in every shard but the last one of a part.
        count: Number of images N, with those of the extensions.
        images_sha256: sha256 of images.txt.
        sizes_sha256: sha256 of images.npy.
        extensions: The parts that were added later. manifest.json does not contain them.
    """

    FORMAT: ClassVar[str]
    rows_per_shard: int
    count: int
    images_sha256: str
    sizes_sha256: str
    extensions: tuple[Part, ...] = ()

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The first part and the extensions."""
        count = self.count - sum(part.count for part in self.extensions)
        first = Part(
            number=0, count=count, images_sha256=self.images_sha256, sizes_sha256=self.sizes_sha256, digest=self._first_digest
        )
        return (first, *self.extensions)

    @cached_property
    def _starts(self) -> tuple[list[int], list[int]]:
        """The first row and the first shard of each part, and the numbers of rows and shards at the end."""
        rows, shards = [0], [0]
        for part in self.parts:
            rows.append(rows[-1] + part.count)
            shards.append(shards[-1] - (-part.count // self.rows_per_shard))
        return rows, shards

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self._starts[1][-1]

    def shard_rows(self, shard: int) -> range:
        """Returns the rows of a shard."""
        rows, shards = self._starts
        part = bisect_right(shards, shard) - 1
        first = rows[part] + (shard - shards[part]) * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, rows[part + 1]))

    def locate(self, row: int) -> tuple[int, int]:
        """Returns the shard of a row, and the row's position in it."""
        rows, shards = self._starts
        part = bisect_right(rows, row) - 1
        shard, within = divmod(row - rows[part], self.rows_per_shard)
        return shards[part] + shard, within

    def shards_of(self, rows: Int64Array) -> Int64Array:
        """Returns the shard of each row: int64 [n]."""
        first_rows, first_shards = (np.array(starts, dtype=np.int64) for starts in self._starts)
        part = np.searchsorted(first_rows, rows, side="right") - 1
        shards: Int64Array = first_shards[part] + (rows - first_rows[part]) // self.rows_per_shard
        return shards

    def digest_of(self, shard: int) -> str:
        """Returns the digest that the sidecars of a shard contain: that of its part."""
        return self.parts[bisect_right(self._starts[1], shard) - 1].digest

    @property
    def digest(self) -> str:
        """The digest of the last part, which identifies the folder with all its images."""
        return self.parts[-1].digest

    @property
    def _values(self) -> dict[str, Any]:
        """Returns the values of manifest.json without its own sha256."""
        values = {"format": self.FORMAT, "version": VERSION, **asdict(self)}
        values["count"] -= sum(part["count"] for part in values.pop("extensions"))
        return values

    @cached_property
    def _first_digest(self) -> str:
        """The `sha256` of manifest.json."""
        return files.sha256(files.canonical(self._values))

    def of_file(self, digest: str) -> None:
        """Sets the `sha256` of the manifest.json that this was read from, which may lack settings of a later version."""
        self.__dict__["_first_digest"] = digest

    def write(self, folder: Path) -> None:
        """Writes manifest.json, which is the last file of a new folder."""
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
    if "extensions" in values:
        raise StoreError(f"{path}: keys are missing or unknown: 'extensions'")
    return values, digest


_Listing = TypeVar("_Listing", bound=Listing)


def with_extensions(folder: Path, manifest: _Listing) -> _Listing:
    """Returns the manifest with the extensions that the folder has.

    Raises:
        StoreError: An extension is damaged or missing, or belongs to another folder.
    """
    parts = list(manifest.parts)
    for number in sorted(int(match[1]) for name in files.names(folder) if (match := _EXTENSION.fullmatch(name))):
        path = folder / f"images-{number:05d}.json"
        values = files.read_json(path)
        digest = files.sha256(files.canonical(values))
        if values.keys() != {"count", "images_sha256", "sizes_sha256", "manifest"}:
            raise StoreError(f"{path}: keys are missing or unknown; the file is damaged or newer")
        if number != len(parts) or values.pop("manifest") != parts[-1].digest:
            raise StoreError(
                f"{path}: does not follow the previous list of images; restore the missing or original images-*.json"
            )
        part = Part(number=number, digest=digest, **values)
        if type(part.count) is not int or not 0 < part.count <= MAX_COUNT - sum(other.count for other in parts):
            raise StoreError(f"{path}: count {part.count!r} is invalid")
        parts.append(part)
    grown = replace(manifest, count=sum(part.count for part in parts), extensions=tuple(parts[1:]))
    grown.of_file(parts[0].digest)
    return grown


def read_images(folder: Path, manifest: Listing) -> tuple[Names, npt.NDArray[np.void]]:
    """Returns paths and sizes of a folder's rows. Raises StoreError if they do not match the manifest."""
    read = [(read_names(folder, part), read_sizes(folder, part)) for part in manifest.parts]
    if len(read) == 1:
        return Names(read[0][0]), read[0][1]
    return Names(b"".join(names for names, _ in read)), np.concatenate([sizes for _, sizes in read])


def read_names(folder: Path, part: Part) -> bytes:
    """Returns the lines of a part's names. Raises StoreError if they do not match the part."""
    path = part.file(folder, ".txt")
    data = files.read_regular(path, min(_MAX_LIST, part.count * _LONGEST_PATH))
    if files.sha256(data) != part.images_sha256:
        raise StoreError(f"{path}: damaged: its sha256 differs from the one in the manifest; restore it from a backup")
    # checked before an array is created: for a million empty lines it would take nine times their bytes
    lines = data.count(b"\n")
    if lines != part.count or not data.endswith(b"\n"):
        raise StoreError(f"{path}: {lines} lines, the manifest says {part.count}")
    if is_unsafe(data):
        raise StoreError(f"{path}: a path is empty, absolute or escapes the image folder")
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for first in range(0, len(data), _PIECE):
            decoder.decode(data[first : first + _PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: not UTF-8 ({error.reason}); the file is damaged") from error
    return data


def read_sizes(folder: Path, part: Part) -> npt.NDArray[np.void]:
    """Returns the sizes of a part's images. Raises StoreError if they do not match the part."""
    path = part.file(folder, ".npy")
    sizes = files.map_npy(path, SIZE_DTYPE, (part.count,))
    if files.sha256_file(path) != part.sizes_sha256:
        raise StoreError(f"{path}: damaged: its sha256 differs from the one in the manifest; restore it from a backup")
    return sizes


def is_unsafe(lines: bytes) -> bool:
    """Whether one of the paths, one per line, is empty or absolute, has a backslash or a NUL, or leads out of the folder."""
    if b"\\" in lines or b"\0" in lines or has_bad_parts(lines):
        return True
    first = b"\n" + lines[:_PIECE]  # for the first line; not a copy of the whole file
    return any(b":" in text and _DRIVE.search(text) is not None for text in (first, lines))


def write_sidecar(path: Path, manifest: Listing, shard: int, values: dict[str, Any]) -> None:
    """Writes the sidecar of a shard's array, which marks it as finished: `values`, the shard and the manifest's digest."""
    files.write_json(path.with_suffix(".json"), {**values, "shard": shard, "manifest": manifest.digest_of(shard)})


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
    if values["shard"] != shard or values["manifest"] != manifest.digest_of(shard):
        where = f"shard {values['shard']!r}" if values["manifest"] == manifest.digest_of(shard) else "another folder"
        raise StoreError(f"{path}: belongs to {where}: files were swapped; restore this shard's own")
    return values
