"""The manifest and the image list of a store: written once, never rewritten."""

import codecs
import hashlib
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from fkd_ssl import files
from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops import Recipe, Records
from fkd_ssl.errors import ImageError, NotFoundError, RequestError, StoreError
from fkd_ssl.images import ImageSource, Names
from fkd_ssl.progress import hidden

FORMAT = "fkd_ssl store"
VERSION = 1
ROWS_PER_SHARD = 1024
MOST_CROPS = 10**6
_MAX_LIST = 2**31  # bytes of images.txt, which is held in memory
_LONGEST_PATH = 4097  # bytes with its newline: PATH_MAX of Linux
_PIECE = 2**18
SIZE_DTYPE = np.dtype([("bytes", "<u8"), ("width", "<u2"), ("height", "<u2")])

MANIFEST, IMAGES, SIZES, CROPS, TARGETS = "manifest.json", "images.txt", "images.npy", "crops", "targets"
# what only a path has that is empty, absolute, has a backslash or a NUL, or leads out of the folder; a newline before each
_UNSAFE = (
    b"\\", b"\0", b"\n/", b"//", b"/\n", b"\n\n", b"\n./", b"\n../", b"\n.\n", b"\n..\n", b"/./", b"/../", b"/.\n", b"/..\n",
)  # fmt: skip
_DRIVE = re.compile(rb"\n[A-Za-z]:")
COLUMN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store is made of.

    Attributes:
        seed: Seed of the crops' draw.
        recipe: What the crops were drawn from.
        crops_per_image: C.
        rows_per_shard: Images in every shard but the last.
        count: N, images in the store.
        images_sha256: Of images.txt.
        sizes_sha256: Of images.npy.
    """

    seed: int
    recipe: Recipe
    crops_per_image: int
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
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"format": FORMAT, "version": VERSION, **values, "recipe": self.recipe.to_dict()}

    @cached_property
    def digest(self) -> str:
        """The `sha256` of manifest.json, by which sidecars name their store."""
        return files.sha256(files.canonical(self._values))

    def write(self, folder: Path) -> None:
        """Publishes manifest.json, the last file of a new store."""
        files.write_json(folder / MANIFEST, self._values)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        NotFoundError: The folder is missing or is not a store.
        StoreError: This version does not read it, or it is damaged.
    """
    path = folder / MANIFEST
    if not files.exists(path):
        what = "no such folder" if not folder.is_dir() else f"no {MANIFEST} in it"
        raise NotFoundError(f"{folder}: not a store ({what}); make one with fkd-ssl precompute")
    values = files.read_json(path)
    digest = files.sha256(files.canonical(values))
    if values.pop("format", None) != FORMAT:
        raise StoreError(f"{path}: not the manifest of a store")
    version = values.pop("version", None)
    if version != VERSION:
        raise StoreError(f"{path}: format {version!r}; this version of fkd_ssl reads {VERSION}: update fkd_ssl")
    try:
        manifest = Manifest(**{**values, "recipe": Recipe.from_dict(values["recipe"])})
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path}: keys are missing or unknown: {error}") from error
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error
    counts = (manifest.crops_per_image, manifest.rows_per_shard, manifest.count)
    most = (MOST_CROPS, 2**31, 2**31)
    fits = all(type(n) is int and 0 < n <= limit for n, limit in zip(counts, most, strict=True))
    if not fits or type(manifest.seed) is not int:
        raise StoreError(f"{path}: seed {manifest.seed!r} or counts {counts} are impossible")
    manifest.__dict__["digest"] = digest  # of the file: a later version's recipe has settings that this file lacks
    return manifest


class Listed(Protocol):
    """What a manifest says of its list of images: a store's, or that of label maps."""

    @property
    def count(self) -> int:
        """N."""

    @property
    def images_sha256(self) -> str:
        """Of images.txt."""

    @property
    def sizes_sha256(self) -> str:
        """Of images.npy."""


def read_images(folder: Path, manifest: Listed) -> tuple[Names, npt.NDArray[np.void]]:
    """Paths and sizes of a folder's rows; raises StoreError where they differ from what the manifest says."""
    data = files.read_plain(folder / IMAGES, min(_MAX_LIST, manifest.count * _LONGEST_PATH))
    if files.sha256(data) != manifest.images_sha256:
        raise StoreError(f"{folder / IMAGES}: altered: its sha256 is not the manifest's; restore it from a copy")
    # all checks before an array is made: a million empty lines would take nine times their bytes
    lines = data.count(b"\n")
    if lines != manifest.count or not data.endswith(b"\n"):
        raise StoreError(f"{folder / IMAGES}: {lines} lines, the manifest says {manifest.count}")
    if unsafe(data):
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


def unsafe(lines: bytes) -> bool:
    """Whether one of the paths, a line each, is empty, absolute, or escapes the image folder.

    Plain searches, since one regular expression of them takes a second and a half over a million lines.
    """
    first = b"\n" + lines[:_PIECE]  # of the whole file a copy would be made
    return any(
        any(part in text for part in _UNSAFE) or (b":" in text and _DRIVE.search(text) is not None) for text in (first, lines)
    )


def check_safe(images: ImageSource) -> None:
    """Raises RequestError if a name cannot be kept in a store, since it could lead out of a folder of images."""
    if unsafe(images.names.lines):
        wrong = [name for name in images.names if unsafe(f"{name}\n".encode())]
        some = ", ".join(repr(name) for name in wrong[:10])
        raise RequestError(
            f"{images.spec}: {len(wrong)} names with '\\', or like those of a drive, cannot be stored; rename {some}"
        )


def create(
    folder: Path, images: ImageSource, *, seed: int, recipe: Recipe, crops: int, skip_unreadable: bool, progress: bool = True,
    advice: str = "remove it or pass --on_unreadable skip",
) -> Manifest:  # fmt: skip
    """Lists the images and their sizes into a new store, the manifest last; `advice` ends the error of an unreadable one.

    Raises:
        RequestError: The folder holds something else.
        ImageAccessError: An image cannot be opened.
        ImageError: A header is damaged, unless `skip_unreadable`.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: is a file, no folder for a store; choose another name")
    there = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} if folder.is_dir() else set()
    foreign = there - {MANIFEST, IMAGES, SIZES, CROPS, TARGETS}  # the manifest, where another process was faster
    if foreign:
        raise RequestError(f"{folder}: exists and is not a store (it holds {sorted(foreign)[0]!r}); choose another folder")
    check_safe(images)
    sizes = np.zeros(len(images), dtype=SIZE_DTYPE)
    for row in tqdm(
        range(len(images)), desc="image headers", unit="img", disable=hidden(show=progress and len(images) >= 2000)
    ):
        try:
            sizes[row] = images.size(row)
        except ImageError as error:
            if not skip_unreadable:
                raise ImageError(f"{error}; {advice}") from error
    for name in (CROPS, TARGETS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with files.publish(folder / IMAGES) as file:
        file.write(images.names.lines)
    manifest = Manifest(
        seed=seed,
        recipe=recipe,
        crops_per_image=crops,
        rows_per_shard=ROWS_PER_SHARD,
        count=len(images),
        images_sha256=files.sha256(images.names.lines),
        sizes_sha256=files.write_npy(folder / SIZES, sizes),
    )
    manifest.write(folder)
    return manifest


def in_hash_order(paths: Sequence[str], purpose: str) -> list[int]:
    """Rows ordered by a hash of their paths: any first part is a sample that no folder dominates."""

    def key(row: int) -> bytes:
        return hashlib.blake2b(f"{purpose}\n{paths[row]}".encode(), digest_size=16).digest()

    return sorted(range(len(paths)), key=key)


def limit_images(images: ImageSource, limit: int | None) -> ImageSource:
    """The first `limit` images in hash order, listed by path again."""
    if limit is None or limit >= len(images):
        return images
    if limit < 1:
        raise RequestError(f"--limit {limit}: at least one image is needed")
    return images.subset(sorted(in_hash_order(images.names, "limit")[:limit]))


def crops_file(folder: Path, shard: int) -> Path:
    """Crop records of a shard; its sidecar has the suffix .json."""
    return folder / CROPS / f"{shard:05d}.npy"


def codes_file(folder: Path, column: str, shard: int) -> Path:
    """Codes of a shard; its sidecar has the suffix .json."""
    return folder / TARGETS / column / f"codes-{shard:05d}.npy"


def publish_crops(folder: Path, manifest: Manifest, shard: int, records: Records, images: Sequence[str]) -> None:
    """Publishes the crop records of a shard, then the sidecar that finishes it.

    Args:
        folder: The store.
        manifest: Its manifest.
        shard: The shard.
        records: Crop records [rows, C].
        images: sha256 of each row's image; empty for one that was skipped as unreadable.
    """
    path, rows = crops_file(folder, shard), manifest.shard_rows(shard)
    skipped = [row for row, checksum in zip(rows, images, strict=True) if not checksum]
    digest = files.write_npy(path, records)
    _write_sidecar(path, manifest, shard, {"file": digest, "images": list(images), "skipped": skipped})


def publish_codes(
    folder: Path, manifest: Manifest, shard: int, codes: UInt8Array | Callable[[Path], str], *, column: str, digest: str
) -> None:
    """Publishes the codes of a shard, then the sidecar that finishes it.

    Args:
        folder: The store.
        manifest: Its manifest.
        shard: The shard.
        codes: Codes uint8 [rows, C, code_size]; or what publishes them as a file, and returns its sha256.
        column: Name of the column.
        digest: Of its meta.json.
    """
    path = codes_file(folder, column, shard)
    written = codes(path) if callable(codes) else files.write_npy(path, codes)
    _write_sidecar(path, manifest, shard, {"file": written, "column": digest})


def _write_sidecar(path: Path, manifest: Manifest, shard: int, values: dict[str, Any]) -> None:
    files.write_json(path.with_suffix(".json"), {**values, "shard": shard, "manifest": manifest.digest})


def read_sidecar(path: Path, manifest: Manifest, shard: int, keys: Set[str]) -> dict[str, Any]:
    """The sidecar of an array of a shard.

    Args:
        path: The array.
        manifest: The store's.
        shard: The shard.
        keys: What it has beside `file`, `shard` and `manifest`.

    Raises:
        StoreError: It is damaged, or was written for another shard or another store.
    """
    path = path.with_suffix(".json")
    values = files.read_json(path)
    if values.keys() != {"file", "shard", "manifest", *keys}:
        raise StoreError(f"{path}: keys are missing or unknown; the file is damaged or newer")
    if values["shard"] != shard or values["manifest"] != manifest.digest:
        where = f"shard {values['shard']!r}" if values["manifest"] == manifest.digest else "another store"
        raise StoreError(f"{path}: written for {where}: files were swapped or copied; restore this shard's own")
    return values


def checked_name(name: str) -> str:
    """A column's name, which is a folder's name too; raises RequestError where it cannot be one."""
    if not COLUMN_NAME.fullmatch(name):
        raise RequestError(f"--name {name!r}: letters, digits, '.', '_' and '-' only, and no '.' first")
    return name


def string_list(value: Any, length: int, path: Path) -> list[str]:
    """`value` as a list of `length` strings; raises StoreError, naming `path`, where it is none."""
    if not isinstance(value, list) or len(value) != length or not all(isinstance(v, str) for v in value):
        raise StoreError(f"{path}: expected {length} strings; the file is damaged")
    return value
