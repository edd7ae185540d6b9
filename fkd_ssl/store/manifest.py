"""The manifest of a store, and the paths of its files."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fkd_ssl.crops import Recipe
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.images import ImageSource
from fkd_ssl.store.listing import MANIFEST, MAX_COUNT, Listing, read_values, with_extensions

ROWS_PER_SHARD = 1024
MAX_CROPS = 10**6
CROPS, TARGETS = "crops", "targets"
COLUMN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Manifest(Listing):
    """The manifest of a store.

    Attributes:
        seed: Seed of the crops.
        recipe: Recipe that the crops were drawn from.
        crops_per_image: Number of crops per image C.
    """

    FORMAT: ClassVar[str] = "fkd_ssl store"
    seed: int
    recipe: Recipe
    crops_per_image: int


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a store and its extensions.

    Raises:
        NotFoundError: The folder is missing or is not a store.
        StoreError: The manifest or an extension is damaged, or this version cannot read it.
    """
    values, digest = read_values(folder, Manifest.FORMAT, what="a store", command="fkd-ssl precompute")
    path = folder / MANIFEST
    try:
        manifest = Manifest(**{**values, "recipe": Recipe.from_dict(values["recipe"])})
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path}: keys are missing or unknown: {error}") from error
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from error
    counts = (manifest.crops_per_image, manifest.rows_per_shard, manifest.count)
    limits = (MAX_CROPS, MAX_COUNT, MAX_COUNT)
    fits = all(type(n) is int and 0 < n <= limit for n, limit in zip(counts, limits, strict=True))
    if not fits or type(manifest.seed) is not int:
        raise StoreError(f"{path}: seed {manifest.seed!r} or counts {counts} are impossible")
    manifest.of_file(digest)
    return with_extensions(folder, manifest)


def in_hash_order(paths: Sequence[str], purpose: str) -> list[int]:
    """Returns the rows in the order of a hash of their paths, so that the first n are a sample across all folders."""

    def key(row: int) -> bytes:
        return hashlib.blake2b(f"{purpose}\n{paths[row]}".encode(), digest_size=16).digest()

    return sorted(range(len(paths)), key=key)


def limit_images(images: ImageSource, limit: int | None) -> ImageSource:
    """Returns the first `limit` images in hash order, sorted by path."""
    if limit is None or limit >= len(images):
        return images
    if limit < 1:
        raise RequestError(f"--limit {limit}: at least one image is needed")
    return images.subset(sorted(in_hash_order(images.names, "limit")[:limit]))


def crops_file(folder: Path, shard: int) -> Path:
    """Returns the file of a shard's crop records. Its sidecar has the suffix .json."""
    return folder / CROPS / f"{shard:05d}.npy"


def codes_file(folder: Path, column: str, shard: int) -> Path:
    """Returns the file of a shard's codes. Its sidecar has the suffix .json."""
    return folder / TARGETS / column / f"codes-{shard:05d}.npy"


def checked_name(name: str) -> str:
    """Returns the name of a column, which is also the name of a folder. Raises RequestError if it is invalid."""
    if not COLUMN_NAME.fullmatch(name):
        raise RequestError(f"--column {name!r}: use only letters, digits, '.', '_' and '-', and do not start with '.'")
    return name


def string_list(value: Any, length: int, path: Path) -> list[str]:
    """Returns `value` if it is a list of `length` strings. Raises StoreError, naming `path`, otherwise."""
    if not isinstance(value, list) or len(value) != length or not all(isinstance(v, str) for v in value):
        raise StoreError(f"{path}: expected {length} strings; the file is damaged")
    return value
