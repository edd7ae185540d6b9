"""Writes the files of a store: its lists and manifest, and the arrays of a shard with their sidecars."""

import shutil
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from fkd_ssl import files, locks
from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops import Recipe, Records
from fkd_ssl.errors import FkdError, ImageError, RequestError
from fkd_ssl.images import ImageSource
from fkd_ssl.progress import bar_disabled
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.listing import IMAGES, MANIFEST, PUBLISHED, SIZE_DTYPE, SIZES, Part, is_unsafe, write_sidecar
from fkd_ssl.store.manifest import Manifest
from fkd_ssl.store.reader import Store
from fkd_ssl.text import format_bytes


def create_store(
    folder: Path,
    images: ImageSource,
    *,
    seed: int,
    recipe: Recipe,
    crops: int,
    skip_unreadable: bool,
    progress: bool = True,
    advice: str = "remove it or pass --on_unreadable skip",
) -> Manifest:
    """Writes the lists of images and sizes of a new store, then its manifest. Errors about unreadable images end with `advice`.

    Raises:
        RequestError: The folder has other contents.
        ImageAccessError: An image cannot be opened.
        ImageError: A header is damaged, and `skip_unreadable` is False.
    """
    check_folder(folder, {layout.CROPS, layout.TARGETS}, what="a store")
    check_names(images)
    sizes = read_sizes(images, skip_unreadable=skip_unreadable, advice=advice, progress=progress)
    for name in (layout.CROPS, layout.TARGETS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lists = write_lists(folder, images, sizes)
    manifest = Manifest(seed=seed, recipe=recipe, crops_per_image=crops, rows_per_shard=layout.ROWS_PER_SHARD, **lists)
    manifest.write(folder)
    return manifest


def extend_store(
    store: Store,
    images: ImageSource,
    *,
    skip_unreadable: bool,
    progress: bool = True,
    advice: str = "remove it or pass --on_unreadable skip",
) -> Store:
    """Adds rows for the images that a store lacks, and changes no file. Returns the store unchanged if it lacks none.

    Raises:
        RequestError: Images of the store are missing, or differ in bytes from those that it was made from.
        ImageError: A header of a new image is damaged, and `skip_unreadable` is False.
    """
    where = images.names.positions(store.paths)
    new = np.ones(len(images), dtype=bool)
    new[where[where >= 0]] = False
    lock = store.folder / ".extend.lock"
    if not new.any():
        if lock.exists():  # of a process that was killed after it had added the images
            with locks.locked(lock):
                pass
        return store
    gone = np.flatnonzero(where < 0)
    if len(gone):
        raise RequestError(
            f"{images.spec}: lacks {len(gone):,} of the {len(where):,} images of {store.folder}, for instance "
            f"{store.paths[int(gone[0])]!r}; a store can only grow: restore them, or make another store"
        )
    for row, index in enumerate(where.tolist()):
        if store.sizes["width"][row] and images.byte_size(index) != store.sizes["bytes"][row]:
            raise RequestError(
                f"{images.where(index)}: changed since the store was made ({store.sizes['bytes'][row]} bytes then); "
                "restore it, or make another store"
            )
    added = images.subset(np.flatnonzero(new))
    check_names(added)
    sizes = read_sizes(added, skip_unreadable=skip_unreadable, advice=advice, progress=progress)
    with locks.locked(lock, seconds=float("inf")):
        grown = Store(store.folder)
        is_same = grown.manifest.digest == store.manifest.digest
        if is_same:
            _remove_unlisted(grown)
            last = store.manifest.parts[-1]
            number = last.number + 1
            lists = write_lists(store.folder, added, sizes, number)
            path = Part(number=number, digest="", **lists).file(store.folder, ".json")
            files.write_json(path, {**lists, "manifest": last.digest})
    if not is_same:  # another process has extended it meanwhile
        return extend_store(grown, images, skip_unreadable=skip_unreadable, progress=progress, advice=advice)
    return Store(store.folder)


def _remove_unlisted(store: Store) -> None:
    """Removes the lists of the next extension, which a killed process has left, unless there are crops of it."""
    crops, last = layout.crops_file(store.folder, store.manifest.shards), store.manifest.parts[-1]
    if not files.exists(crops) and not files.exists(crops.with_suffix(".json")):
        for suffix in (".txt", ".npy"):
            replace(last, number=last.number + 1).file(store.folder, suffix).unlink(missing_ok=True)


def check_folder(folder: Path, parts: Set[str], *, what: str) -> None:
    """Raises RequestError if a folder contains anything but the files of `what` and its subfolders `parts`."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder}: is a file; expected a folder for {what}")
    there = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} if folder.is_dir() else set()
    foreign = there - {MANIFEST, IMAGES, SIZES, *PUBLISHED, *parts}  # another process may have written the manifest
    if foreign:
        raise RequestError(f"{folder}: holds {sorted(foreign)[0]!r}, which is not part of {what}; choose another folder")


def require_space(folder: Path, needed: int, advice: str) -> int:
    """Returns the free bytes on the disk of `folder`, which may be missing. Raises FkdError if fewer than `needed`."""
    disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise FkdError(
            f"{folder}: needs {format_bytes(needed)} more and the disk has {format_bytes(free)} free: free some, {advice}"
        )
    return free


def check_names(images: ImageSource) -> None:
    """Raises RequestError if a name is unsafe in a store, since it could lead out of a folder of images."""
    if is_unsafe(images.names.lines):
        wrong = [name for name in images.names if is_unsafe(f"{name}\n".encode())]
        some = ", ".join(repr(name) for name in wrong[:10])
        raise RequestError(f"{images.spec}: {len(wrong)} names have a '\\' or begin like a drive of Windows; rename {some}")


def read_sizes(
    images: ImageSource, *, skip_unreadable: bool, progress: bool, advice: str | None = None
) -> npt.NDArray[np.void]:
    """Reads byte size, width and height of each image, 0 for skipped images. `advice` and errors are as in `create_store`."""
    sizes = np.zeros(len(images), dtype=SIZE_DTYPE)
    hide = bar_disabled(show=progress and len(images) >= 2000)
    for row in tqdm(range(len(images)), desc="image headers", unit="img", disable=hide):
        try:
            sizes[row] = images.size(row)
        except ImageError as error:
            if not skip_unreadable:
                raise ImageError(f"{error}; {advice}" if advice else str(error)) from error
    return sizes


def write_lists(folder: Path, images: ImageSource, sizes: npt.NDArray[np.void], part: int = 0) -> dict[str, Any]:
    """Writes the names and sizes of a part; returns their values for the manifest or the extension."""
    names = images.names.lines
    lists: dict[str, Any] = {"count": len(images), "images_sha256": files.sha256(names), "sizes_sha256": ""}
    listed = Part(number=part, digest="", **lists)
    with files.create(listed.file(folder, ".txt")) as file:
        file.write(names)
    return {**lists, "sizes_sha256": files.write_npy(listed.file(folder, ".npy"), sizes)}


def write_crops(folder: Path, manifest: Manifest, shard: int, records: Records, images: Sequence[str]) -> None:
    """Writes the crop records of a shard, then the sidecar that marks them as finished.

    Args:
        folder: The store.
        manifest: The store's manifest.
        shard: The shard.
        records: Crop records [rows, C].
        images: sha256 of each row's image; empty for an image that was skipped as unreadable.
    """
    path, rows = layout.crops_file(folder, shard), manifest.shard_rows(shard)
    skipped = [row for row, checksum in zip(rows, images, strict=True) if not checksum]
    digest = files.write_npy(path, records)
    write_sidecar(path, manifest, shard, {"file": digest, "images": list(images), "skipped": skipped})


def write_codes(
    folder: Path, manifest: Manifest, shard: int, codes: UInt8Array | Callable[[Path], str], *, column: str, digest: str
) -> None:
    """Writes the codes of a shard, then the sidecar that marks them as finished.

    Args:
        folder: The store.
        manifest: The store's manifest.
        shard: The shard.
        codes: Codes uint8 [rows, C, code_size], or a function that writes them as a file and returns its sha256.
        column: Name of the column.
        digest: Digest of the column's meta.json.
    """
    path = layout.codes_file(folder, column, shard)
    written = codes(path) if callable(codes) else files.write_npy(path, codes)
    write_sidecar(path, manifest, shard, {"file": written, "column": digest})
