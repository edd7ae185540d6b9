"""One teacher's targets in a store: the column's description, and its codes and decoded targets by row."""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fkd_ssl import files
from fkd_ssl.arrays import Float32Array, Int64Array, UInt8Array
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.fetching import RemoteFile
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.listing import read_sidecar
from fkd_ssl.store.shards import Index, ShardFiles
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.text import plural

if TYPE_CHECKING:
    from fkd_ssl.store.reader import Store

COSINES = ("cosine_mean", "cosine_min")
MAX_ARRAY = 2**28  # maximum bytes of all arrays of a teacher with their headers, and of one array of a codec
_TEACHERS = "teacher-"  # prefix of the names of a teacher's arrays
_MAX_NUMBER = 2.0**53
_SHA256 = re.compile("[0-9a-f]{64}")


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


def check_digests(values: Iterable[Any], path: Path) -> None:
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
        return (type(self.store).column, (self.store, self.name))

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
        check_digests([values["file"], values["column"]], path.with_suffix(".json"))
        if values["column"] != self.digest:
            raise StoreError(f"{path}: belongs to another column: files were swapped; restore this shard's own")
        return values
