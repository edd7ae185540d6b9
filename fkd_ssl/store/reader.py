"""Reads a store: crop records and decoded targets by row. All files are treated as untrusted."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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
from fkd_ssl.store.listing import read_images, read_sidecar
from fkd_ssl.store.remote import Remote, open_remote
from fkd_ssl.store.shards import Index, ShardFiles
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.text import format_bytes, is_url, plural

_TEACHERS = "teacher-"  # prefix of the names of a teacher's arrays
_MAX_NUMBER = 2.0**53
MAX_ARRAY = 2**28  # maximum bytes of all arrays of a teacher with their headers, and of one array of a codec
_SHA256 = re.compile("[0-9a-f]{64}")
# matches a sidecar of crops, to find the skipped rows among a million without parsing a million checksums
_CROPS_SIDECAR = re.compile(
    rb'\{"file":"[0-9a-f]{64}","images":\[(?P<images>[0-9a-f",]*+)\],"manifest":"(?P<manifest>[0-9a-f]{64})",'
    rb'"sha256":"(?P<sha256>[0-9a-f]{64})","shard":(?P<shard>\d{1,10}),'
    rb'"skipped":\[(?P<skipped>(?:\d{1,10}(?:,\d{1,10})*+)?)\]\}\n'
)


COSINES = ("cosine_mean", "cosine_min")


@dataclass(frozen=True, kw_only=True)
class ColumnMeta:
    """meta.json of a column: its targets and their encoding."""

    teacher: TeacherInfo
    """The teacher, with kind and shape of the targets. Its `pixels` is the side of the crops that it saw."""
    codec: str
    """faiss factory string for embeddings, or a label codec for class probabilities."""
    code_size: int
    """Bytes of one code."""
    fidelity: dict[str, Any]
    """Cosine of decoded to original targets on a held-out sample: `cosine_mean`, `cosine_min`, `sample`. For a recoded column,
    the originals are the targets of its source. It also has `source_codec`, `source_column` (sha256 of the source's meta.json
    as in sidecars), and the source's cosines to the teacher's targets, `source_cosine_mean` and `source_cosine_min`."""
    chunk_size: int
    """Number of crops per forward pass. Another number changes the last bits of the targets."""
    replay_digest: str
    """Identifies the code that made the pixels; see fkd_ssl.crops.replay_digest."""
    arrays: dict[str, str]
    """sha256 of each .npy file of the column: the codec's parameters, and the teacher's arrays (`teacher-` and their name)."""

    @property
    def target(self) -> TargetSpec:
        """Kind and shape of the targets."""
        return self.teacher.spec

    def to_json(self) -> dict[str, Any]:
        """Returns the values for the file."""
        return {**vars(self), "teacher": self.teacher.to_json()}


def cosine_to_teacher(meta: ColumnMeta, key: str) -> float:
    """Estimates the cosine of a column's targets to the teacher's. The losses of a recoded column and its source add up."""
    return float(meta.fidelity[key] + meta.fidelity.get(f"source_{key}", 1.0) - 1)


def read_meta(path: Path) -> tuple[ColumnMeta, str]:
    """Reads a column's meta.json; returns it with the digest that the column's sidecars contain.

    Raises:
        StoreError: The file cannot be read, or a value is invalid.
    """
    values = files.read_json(path)
    try:
        teacher = TeacherInfo.from_json(values.get("teacher"))
        meta = ColumnMeta(**{**values, "teacher": teacher})
    except (TypeError, RequestError) as error:
        raise StoreError(f"{path}: {error}; the file is damaged or newer") from error
    _check_meta(meta, path)
    return meta, files.sha256(files.canonical(values))


def _check_meta(meta: ColumnMeta, path: Path) -> None:
    """Raises StoreError if a value is invalid."""
    fidelity, definition = meta.fidelity, meta.target.definition
    right = {
        "codec": isinstance(meta.codec, str) and definition.has_codec(meta.codec),
        "code_size": type(meta.code_size) is int,
        "chunk_size": type(meta.chunk_size) is int and 0 < meta.chunk_size <= 2**16,
        "replay_digest": isinstance(meta.replay_digest, str),
        "fidelity": isinstance(fidelity, dict)
        and all(isinstance(fidelity.get(key), (int, float)) for key in (*definition.fidelity_keys, "sample"))
        and all(isinstance(fidelity.get(f"source_{key}", 1.0), (int, float)) for key in COSINES)
        and all(abs(value) <= _MAX_NUMBER for value in fidelity.values() if isinstance(value, (int, float))),
        "arrays": isinstance(meta.arrays, dict)
        and all(layout.COLUMN_NAME.fullmatch(name) for name in meta.arrays)  # each is the name of a file
        and all(isinstance(value, str) and _SHA256.fullmatch(value) for value in meta.arrays.values()),
    }
    wrong = [key for key, fits in right.items() if not fits]
    if wrong:
        raise StoreError(f"{path}: its {wrong[0]} is invalid; the file is damaged or newer")


def _check_digests(values: Iterable[Any], path: Path) -> None:
    """Raises StoreError if a value of the sidecar `path` is not a hexadecimal sha256."""
    if not all(isinstance(value, str) and _SHA256.fullmatch(value) for value in values):
        raise StoreError(f"{path}: a checksum is missing or is not a hexadecimal sha256; the file is damaged")


class Column:
    """One teacher's targets in a store."""

    def __init__(self, store: "Store", name: str) -> None:
        self.store = store
        self.name = name
        self.folder = files.reject_symlink(store.folder / layout.TARGETS / name)
        path = self.folder / "meta.json"
        self.meta, self.digest = read_meta(path)
        meta = self.meta
        try:
            shapes = meta.target.definition.parameter_shapes(meta.codec, meta.target.shape)
        except StoreError as error:
            raise StoreError(f"{path}: {error}") from error
        own = {name for name in meta.arrays if not name.startswith(_TEACHERS)}
        if own != set(shapes):
            raise StoreError(f"{path}: codec {meta.codec}: has arrays {sorted(own)}, expected {sorted(shapes)}")
        parameters = {name: self._array(name, shape) for name, shape in shapes.items()}
        self.codec = meta.target.definition.load(meta.codec, meta.target.shape, parameters)
        if self.codec.code_size != meta.code_size:
            raise StoreError(f"{path}: code size {meta.code_size}, but {meta.codec} has {self.codec.code_size}")
        self._files = ShardFiles(self._finished, np.dtype(np.uint8), (store.crops_per_image, meta.code_size))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Store.column, (self.store, self.name))

    def array(self, name: str) -> Float32Array:
        """Returns an array stored with the codes, for instance a SwAV teacher's `teacher-prototypes` float32 [K, D]."""
        if name not in self.meta.arrays or not layout.COLUMN_NAME.fullmatch(name):
            raise StoreError(f"{self.folder}: no array {name!r}; there are {sorted(self.meta.arrays)}")
        shapes = self.meta.target.definition.parameter_shapes(self.meta.codec, self.meta.target.shape)
        return self._array(name, shapes.get(name))

    def _array(self, name: str, shape: tuple[int, ...] | None) -> Float32Array:
        """Returns an array of `shape`, or of any shape up to the maximum size if None."""
        path = self.folder / f"{name}.npy"
        if shape is None:
            self._check_teacher_bytes()
        mapped = files.map_npy(path, np.dtype(np.float32), shape)
        if files.sha256_file(path) != self.meta.arrays[name]:
            raise StoreError(f"{path}: damaged: its sha256 differs from the one in meta.json; restore it from a backup")
        return np.array(mapped)

    def _check_teacher_bytes(self) -> None:
        """Raises StoreError, before any array is read, if the teacher's arrays together are larger than `MAX_ARRAY`."""
        total = 0
        for name in self.meta.arrays:
            if name.startswith(_TEACHERS):
                with suppress(FileNotFoundError):  # reported when it is read
                    total += (self.folder / f"{name}.npy").lstat().st_size
        if total > MAX_ARRAY:
            raise StoreError(f"{self.folder}: arrays of its teacher have {total:,} bytes in all, over {MAX_ARRAY:,}")

    @property
    def info(self) -> TeacherInfo:
        """The teacher, with the column's name and with its arrays, for instance `prototypes` float32 [K, D]."""
        own = {name.removeprefix(_TEACHERS): self.array(name) for name in self.meta.arrays if name.startswith(_TEACHERS)}
        return replace(self.meta.teacher, name=self.name, arrays=own)

    @cached_property
    def missing_shards(self) -> list[int]:
        """Shards without codes or crops. The folder is listed at the first access."""
        there, crops = files.names(self.folder), self.store.shards_with_crops()
        return [s for s in range(self.store.manifest.shards) if f"codes-{s:05d}.json" not in there or s not in crops]

    @cached_property
    def rows(self) -> Int64Array:
        """Row numbers with targets in ascending order, without rows skipped as unreadable."""
        present = np.ones(self.store.manifest.shards, dtype=bool)
        present[self.missing_shards] = False
        rows = self.store.rows
        return rows[present[self.store.manifest.shards_of(rows)]]

    def require_complete(self) -> None:
        """Raises StoreError if shards are missing."""
        absent = self.missing_shards
        if absent:
            total = self.store.manifest.shards
            raise StoreError(
                f"{self.folder}: {len(absent)} of {plural(total, 'shard')} missing (the first is "
                f"{absent[0]}): run the same fkd-ssl precompute again, or the training that records it, "
                "to finish them"
            )

    def codes(self, row: int, index: Index) -> UInt8Array:
        """Returns the codes uint8 [m, code_size] of the crops `index` of a row, read-only."""
        return self._files.read(*self.store.locate(row), index)

    def shard(self, shard: int) -> UInt8Array:
        """Returns the codes of a shard, memory-mapped: uint8 [rows, C, code_size]."""
        return self._files.map(shard)

    def require(self, shard: int) -> Path:
        """Returns the path of a shard's codes in the store. Raises StoreError if they are not finished."""
        path = layout.codes_file(self.store.folder, self.name, shard)
        if not files.exists(path.with_suffix(".json")):
            raise StoreError(f"{path}: this shard is not finished; run the same fkd-ssl precompute again")
        return path

    def file(self, shard: int) -> Path:
        """Returns the file of a shard's codes, after it is fetched. Raises StoreError if they are not finished."""
        path, remote = self.require(shard), self.remote_file(shard)
        return path if remote is None else remote.path()

    def remote_file(self, shard: int) -> RemoteFile | None:
        """Returns the file of a shard's codes at the store's URL; None if the store is local."""
        if self.store.remote is None:
            return None
        body = len(self.store.manifest.shard_rows(shard)) * self.store.crops_per_image * self.meta.code_size
        return self.store.remote.array(self.require(shard), body=body, sha256=lambda: self.sidecar(shard)["file"])

    def _finished(self, shard: int) -> tuple[Path, int]:
        self.sidecar(shard)
        return self.file(shard), len(self.store.manifest.shard_rows(shard))

    def sidecar(self, shard: int) -> dict[str, Any]:
        """Reads the sidecar of a shard's codes. Raises StoreError if it is damaged, or of another shard, column or store."""
        path = self.require(shard)
        values = read_sidecar(path, self.store.manifest, shard, {"column"})
        _check_digests([values["file"], values["column"]], path.with_suffix(".json"))
        if values["column"] != self.digest:
            raise StoreError(f"{path}: belongs to another column: files were swapped; restore this shard's own")
        return values


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

    def prefetcher(self, columns: Sequence["Column"]) -> Prefetcher:
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
        _check_digests([values["file"], *filter(None, checksums)], path)  # "" stands for a skipped image
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
        return Store(remote.folder, remote)
    return Store(folder)
