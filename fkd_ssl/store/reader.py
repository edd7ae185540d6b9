"""Reads a store: crop records and decoded targets by row. All files are treated as untrusted."""

import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from fkd_ssl import files
from fkd_ssl.arrays import Float32Array, Int64Array, UInt8Array
from fkd_ssl.crops import CROP_DTYPE, Records
from fkd_ssl.errors import NotFoundError, RequestError, StoreError
from fkd_ssl.fetching import MIXED, RemoteFile
from fkd_ssl.images import ImageSource
from fkd_ssl.prefetcher import Prefetcher
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.column import Column, check_digests
from fkd_ssl.store.listing import read_images, read_sidecar
from fkd_ssl.store.remote import Remote, naming_url, open_remote
from fkd_ssl.store.shards import Index, ShardFiles
from fkd_ssl.text import format_bytes, is_url

# matches a sidecar of crops, to find the skipped rows among a million without parsing a million checksums
_CROPS_SIDECAR = re.compile(
    rb'\{"file":"[0-9a-f]{64}","images":\[(?P<images>[0-9a-f",]*+)\],"manifest":"(?P<manifest>[0-9a-f]{64})",'
    rb'"sha256":"(?P<sha256>[0-9a-f]{64})","shard":(?P<shard>\d{1,10}),'
    rb'"skipped":\[(?P<skipped>(?:\d{1,10}(?:,\d{1,10})*+)?)\]\}\n'
)


class Store:
    """The crops and targets of one image set, opened for reading.

    Attributes:
        folder: The folder of the store. For a store at a URL, a folder of the cache without the arrays of shards.
        remote: The store at its URL; None if it is local.
        manifest: The store's manifest.
        paths: Relative path of each row.
        sizes: Byte size, width and height of each row's image.
    """

    def __init__(self, folder: str | os.PathLike[str], remote: Remote | None = None) -> None:
        self.folder = Path(folder)
        self.remote = remote
        self.manifest = layout.read_manifest(self.folder)
        self.paths, self.sizes = read_images(self.folder, self.manifest)
        for part in (layout.CROPS, layout.TARGETS):
            files.reject_symlink(self.folder / part)
        self._files = ShardFiles(self._finished, CROP_DTYPE, (self.crops_per_image,))
        self._columns: dict[str, Column] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Store, (self.folder, self.remote))  # a worker process opens the files itself

    def __fspath__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The folder or the URL of the store."""
        return os.fspath(self.folder) if self.remote is None else self.remote.url

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return files.total_bytes(self.folder) if self.remote is None else self.remote.list.total

    @property
    def mix_groups(self) -> int:
        """Number of shards whose images a training mixes by default; 0 mixes all images."""
        return 0 if self.remote is None else MIXED

    def prefetcher(self, columns: Sequence[Column]) -> Prefetcher:
        """Returns what fetches the crops and some columns of shards ahead, if the store is at a URL."""
        return Prefetcher(partial(_remote_files, [self, *columns]))

    def require_local(self) -> None:
        """Raises RequestError if the store is at a URL, where it cannot be changed."""
        if self.remote is not None:
            raise RequestError(f"{self.name}: cannot be changed at its URL: copy it with fkd-ssl pull, and publish the copy")

    def __repr__(self) -> str:
        columns = ", ".join(self.column_names) or "none yet"
        return (
            f"Store {self.name}: {len(self.paths):,} images x {self.crops_per_image} crops, "
            f"{format_bytes(self.total_bytes)}; columns: {columns}"
        )

    def __len__(self) -> int:
        """Number of images with stored crops: all images of finished shards, without those skipped as unreadable."""
        return len(self.rows)

    @property
    def crops_per_image(self) -> int:
        """C."""
        return self.manifest.crops_per_image

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        targets = self.folder / layout.TARGETS
        named = [name for name in files.names(targets) if layout.COLUMN_NAME.fullmatch(name)]
        folders = [targets / name for name in named if (targets / name).is_dir() and not (targets / name).is_symlink()]
        return sorted(folder.name for folder in folders if files.exists(folder / "meta.json"))

    def broken_columns(self) -> list[str]:
        """Returns a message for each folder among the columns that has no meta.json or is a link.

        New columns are written under a temporary name and renamed when complete, so a folder without meta.json is damaged.
        """
        problems = []
        targets = self.folder / layout.TARGETS
        for path in (targets / name for name in sorted(files.names(targets)) if not name.startswith(".")):
            if path.is_symlink():
                problems.append(f"{path}: a symbolic link, which is not followed inside a store; replace it with the folder")
            elif path.is_dir() and not layout.COLUMN_NAME.fullmatch(path.name):
                problems.append(f"{path}: not a valid name of a column; move the folder away")
            elif path.is_dir() and not files.exists(path / "meta.json"):
                problems.append(
                    f"{path}: meta.json is missing: restore the folder from a backup, or move it away and run the "
                    "same precompute again"
                )
        return problems

    @cached_property
    def rows(self) -> Int64Array:
        """Row numbers that can be read, in ascending order."""
        found = self.shards_with_crops()
        readable = np.zeros(self.manifest.count, dtype=bool)
        for shard in range(self.manifest.shards):
            if shard in found:
                rows = self.manifest.shard_rows(shard)
                readable[rows.start : rows.stop] = True
                readable[self.skipped(shard)] = False
        return np.flatnonzero(readable)

    def shards_with_crops(self) -> set[int]:
        """Returns the shards with finished crops, from one listing of the folder."""
        there = files.names(self.folder / layout.CROPS)
        return {shard for shard in range(self.manifest.shards) if f"{shard:05d}.json" in there}

    def has_crops(self, shard: int) -> bool:
        """Whether a shard's crops are finished."""
        return files.exists(layout.crops_file(self.folder, shard).with_suffix(".json"))

    def crops_sidecar(self, shard: int) -> dict[str, Any]:
        """Reads the sidecar of a shard's crops: `file`, `images` (sha256 of each), `skipped` (rows)."""
        path = layout.crops_file(self.folder, shard)
        values = read_sidecar(path, self.manifest, shard, {"images", "skipped"})
        rows, path = self.manifest.shard_rows(shard), path.with_suffix(".json")
        checksums = layout.string_list(values["images"], len(rows), path)
        check_digests([values["file"], *filter(None, checksums)], path)  # "" stands for a skipped image
        skipped = values["skipped"]
        if not isinstance(skipped, list) or not all(type(row) is int and row in rows for row in skipped):
            raise StoreError(f"{path}: invalid list of skipped rows; the file is damaged")
        return values

    def skipped(self, shard: int) -> list[int]:
        """Returns the rows of a shard that were skipped as unreadable."""
        if match := self._match_sidecar(shard):
            skipped = [int(row) for row in match["skipped"].split(b",") if row]
            if all(row in self.manifest.shard_rows(shard) for row in skipped):
                return skipped
        whole: list[int] = self.crops_sidecar(shard)["skipped"]  # raises an error if it is damaged
        return whole

    def _match_sidecar(self, shard: int) -> re.Match[bytes] | None:
        """Matches the sidecar of a shard's crops without parsing its JSON; None if it is not valid."""
        path, rows = layout.crops_file(self.folder, shard).with_suffix(".json"), self.manifest.shard_rows(shard)
        match = files.match_with_checksum(path, _CROPS_SIDECAR)
        own = match is not None and (match["manifest"].decode(), int(match["shard"])) == (self.manifest.digest_of(shard), shard)
        return match if match is not None and own and match["images"].count(b'"') == 2 * len(rows) else None

    def find_images(self, images: ImageSource, rows: Int64Array | None = None) -> Int64Array:
        """Returns the index of each row's image in an image set: int64 [len(rows)]. Default: all rows.

        Raises:
            StoreError: An image is missing; the message names one.
            NotFoundError: All of them are, so these are not the images of the store.
        """
        found = images.names.positions(self.paths)
        found = found if rows is None else found[rows]
        if missing := np.flatnonzero(found < 0).tolist():
            first = missing[0] if rows is None else int(rows[missing[0]])
            ending = f"/{self.paths[first]}"
            inside = next((name.removesuffix(ending) for name in images.names if name.endswith(ending)), None)
            nested = inside is not None and Path(images.spec, inside)  # a folder with the store's images, if any
            hint = f"; did you mean {nested}?" if nested and nested.is_dir() else ""
            failed = NotFoundError if len(missing) == len(found) else StoreError
            raise failed(
                f"{images.spec}: lacks {len(missing)} of the {len(found)} images of {self.folder}, for instance "
                f"{self.paths[first]!r}: give the images that the store was made from{hint}"
            )
        return found

    def image_checksums(self, shard: int) -> UInt8Array:
        """Returns the sha256 of a shard's images as uint8 [rows, 32], zeros for those skipped as unreadable."""
        match = self._match_sidecar(shard)
        listed = match["images"].decode().replace('"', "").split(",") if match else self.crops_sidecar(shard)["images"]
        return files.digest_array(listed, layout.crops_file(self.folder, shard).with_suffix(".json"))

    def crops(self, row: int, index: Index) -> Records:
        """Returns the records [m] of the crops `index` of a row, read-only."""
        return self._files.read(*self.locate(row), index)

    def locate(self, row: int) -> tuple[int, int]:
        """Returns the shard of a row, and the row's position in it. Raises IndexError if the row does not exist."""
        if not 0 <= row < self.manifest.count:
            raise IndexError(f"row {row} of {self.manifest.count}")
        return self.manifest.locate(row)

    def by_shard(self, rows: Int64Array) -> Iterator[tuple[int, Int64Array, Int64Array]]:
        """Yields each shard of some rows, the positions of its rows in `rows`, and their positions in the shard."""
        shards = self.manifest.shards_of(rows)
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            yield shard, here, rows[here] - self.manifest.shard_rows(shard).start

    def crops_file(self, shard: int) -> Path:
        """Returns the file of a shard's crop records, after it is fetched."""
        remote = self.remote_file(shard)
        return layout.crops_file(self.folder, shard) if remote is None else remote.path()

    def remote_file(self, shard: int) -> RemoteFile | None:
        """Returns the file of a shard's crop records at the store's URL; None if the store is local."""
        if self.remote is None:
            return None
        body = len(self.manifest.shard_rows(shard)) * self.crops_per_image * CROP_DTYPE.itemsize
        path = layout.crops_file(self.folder, shard)
        return self.remote.array(path, body=body, sha256=lambda: self.crops_sidecar(shard)["file"])

    def _finished(self, shard: int) -> tuple[Path, int]:
        if not self.has_crops(shard):
            path = layout.crops_file(self.folder, shard)
            raise StoreError(f"{path}: this shard is not finished; run the same fkd-ssl precompute again")
        self.skipped(shard)  # checks that the sidecar belongs to this shard
        return self.crops_file(shard), len(self.manifest.shard_rows(shard))

    def column(self, name: str | None = None) -> Column:
        """Opens the column of one teacher. Default: the only column.

        Raises:
            NotFoundError: The column does not exist, or no name is given and the store has several columns.
        """
        if name in self._columns:
            return self._columns[name]
        there = self.column_names
        if name is None:
            if not there:
                raise NotFoundError(f"{self.folder}: has no targets yet; run fkd-ssl precompute")
            if len(there) > 1:
                raise NotFoundError(f"{self.folder}: has the columns {', '.join(there)}; choose one with --column")
            name = there[0]
        if name not in there:
            raise NotFoundError(f"{self.folder}: no targets of {name!r}; there are {there or 'none yet'}")
        return self._columns.setdefault(name, Column(self, name))

    def targets(self, name: str, row: int, index: Index) -> Float32Array:
        """Returns the decoded targets float32 [m, D] of the crops `index` of a row."""
        column = self.column(name)
        return column.codec.decode(column.codes(row, index))


def _remote_files(sources: Sequence[Store | Column], shard: int) -> list[RemoteFile]:
    """Returns the files of a shard at the URL of their store."""
    return [file for source in sources if (file := source.remote_file(shard)) is not None]


def open_store(folder: str | os.PathLike[str]) -> Store:
    """Opens a store for reading.

    Args:
        folder: Its folder, or the URL where `fkd-ssl publish` wrote it, such as hf://, s3:// or https://.

    Raises:
        NotFoundError: There is no store.
        StoreError: It is damaged.
        FetchError: A file cannot be fetched.
    """
    if isinstance(folder, str) and is_url(folder):
        remote = open_remote(folder)
        with naming_url(remote):
            return Store(remote.folder, remote)
    return Store(folder)
