"""Reading a store: crop records and decoded targets by row; nothing that is read is trusted."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE, Records
from fkd_ssl.errors import NotFoundError, StoreError
from fkd_ssl.kinds import Kind
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.codecs import Float32Array, UInt8Array, kind_of, load_codec, parameter_shapes
from fkd_ssl.store.shards import Index, ShardFiles

Precision = Literal["fp32", "bf16", "fp16"]
_MAX_DIM = 65536
_TEACHERS = "teacher-"  # what the arrays that a teacher brings begin with
_MAX_NUMBER = 2.0**53
MAX_ARRAY = 2**28  # bytes of an array that a teacher brings; a codec's have no more
_SHA256, _HEX = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]*")
# a sidecar of crops as it is spelled: to see which of a million rows were skipped, a million checksums are not parsed
_CROPS_SIDECAR = re.compile(
    rb'\{"file":"[0-9a-f]{64}","images":\[(?P<images>[0-9a-f",]*+)\],"sha256":"(?P<sha256>[0-9a-f]{64})",'
    rb'"skipped":\[(?P<skipped>(?:\d{1,10}(?:,\d{1,10})*+)?)\]\}\n'
)


_FIDELITY = ("cosine_mean", "cosine_min", "sample")
_FIDELITY_OF = {"distribution": ("total_variation_mean", "total_variation_max")}


@dataclass(frozen=True, kw_only=True)
class ColumnMeta:
    """meta.json of a column: whose targets these are and how they are encoded."""

    kind: Kind
    """`embedding`: L2-normalised vectors; `distribution`: class probabilities."""
    dim: int
    """D."""
    codec: str
    """faiss factory string, or one of FKD's names for class probabilities."""
    code_size: int
    """Bytes of one code."""
    fidelity: dict[str, Any]
    """Cosine of decoded to original targets on a held-out sample: `cosine_mean`, `cosine_min`, `sample`. A recoded column
    has bounds on them, and says what they are made of: `source_codec`, `source_column` (sha256 of the source's meta.json as
    sidecars have it), `source_cosine_mean`, `recoded_cosine_mean`, ..."""
    teacher: dict[str, Any]
    """name, network, licence, source, checkpoint_sha256."""
    preprocessing: dict[str, list[float]]
    """`mean` and `std` of RGB in 0 to 1."""
    pixels: int
    """Side of the crops that the teacher saw."""
    precision: Precision
    """Arithmetic of the teacher's forward."""
    chunk_size: int
    """Crops in one forward: another size gives other last bits."""
    probe_digest: str
    """Which pixel path made the crops; see fkd_ssl.crops.probe_digest."""
    arrays: dict[str, str]
    """sha256 of each .npy beside it: the codec's parameters, and the teacher's own under `teacher-`."""


def read_meta(path: Path) -> tuple[ColumnMeta, str]:
    """A column's meta.json, and the digest that its sidecars have of it.

    Raises:
        StoreError: It cannot be read, or a value is none that `precompute` writes.
    """
    values = files.read_json(path)
    try:
        meta = ColumnMeta(**values)
    except TypeError as error:
        raise StoreError(f"{path}: {error}; the file is damaged or newer") from error
    _check_meta(meta, path)
    return meta, files.sha256(files.canonical(values))


def _check_meta(meta: ColumnMeta, path: Path) -> None:
    """Raises StoreError where a value is none that `precompute` writes."""
    if meta.kind not in get_args(Kind) or (isinstance(meta.codec, str) and kind_of(meta.codec) != meta.kind):
        raise StoreError(f"{path}: a kind {meta.kind!r} that this version does not read in codec {meta.codec!r}")
    if meta.precision not in get_args(Precision):
        raise StoreError(f"{path}: precision {meta.precision!r} is unknown; the file is damaged or newer")
    if type(meta.dim) is not int or not 0 < meta.dim <= _MAX_DIM:
        raise StoreError(f"{path}: dimension {meta.dim!r} is impossible")
    about, colours, fidelity = meta.teacher, meta.preprocessing, meta.fidelity
    right = {
        "codec": isinstance(meta.codec, str),
        "code_size": type(meta.code_size) is int,
        "pixels": type(meta.pixels) is int and 0 < meta.pixels <= 4096,
        "chunk_size": type(meta.chunk_size) is int and 0 < meta.chunk_size <= 2**16,
        "probe_digest": isinstance(meta.probe_digest, str),
        "fidelity": isinstance(fidelity, dict)
        and all(isinstance(fidelity.get(key), (int, float)) for key in (*_FIDELITY, *_FIDELITY_OF.get(meta.kind, ())))
        and all(abs(value) <= _MAX_NUMBER for value in fidelity.values() if isinstance(value, (int, float))),
        "teacher": isinstance(about, dict)
        and all(isinstance(about.get(key), str) for key in ("name", "network", "licence"))
        and all(isinstance(about.get(key, 0), (str, type(None))) for key in ("source", "checkpoint_sha256")),
        "preprocessing": isinstance(colours, dict) and all(_is_colour(colours.get(key)) for key in ("mean", "std")),
        "arrays": isinstance(meta.arrays, dict)
        and all(layout.COLUMN_NAME.fullmatch(name) for name in meta.arrays)  # each is a file's name
        and all(isinstance(value, str) and _SHA256.fullmatch(value) for value in meta.arrays.values()),
    }
    wrong = [key for key, fits in right.items() if not fits]
    if wrong:
        raise StoreError(f"{path}: a {wrong[0]} that this version does not read; the file is damaged or newer")


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) and abs(v) < 256 for v in value)


def _check_digests(values: Iterable[Any], path: Path) -> None:
    """Raises StoreError where a value of the sidecar `path` is not a hexadecimal sha256."""
    if not all(isinstance(value, str) and _SHA256.fullmatch(value) for value in values):
        raise StoreError(f"{path}: a checksum is missing or is not a hexadecimal sha256; the file is damaged")


class Column:
    """One teacher's targets in a store."""

    def __init__(self, store: "Store", name: str) -> None:
        self.store = store
        self.name = name
        self.folder = files.own_folder(store.folder / layout.TARGETS / name)
        path = self.folder / "meta.json"
        self.meta, self.digest = read_meta(path)
        meta = self.meta
        try:
            shapes = parameter_shapes(meta.codec, meta.dim)
        except StoreError as error:
            raise StoreError(f"{path}: {error}") from error
        own = {name for name in meta.arrays if not name.startswith(_TEACHERS)}
        if own != set(shapes):
            raise StoreError(f"{path}: codec {meta.codec}: has arrays {sorted(own)}, expected {sorted(shapes)}")
        self.codec = load_codec(meta.codec, meta.dim, {name: self._array(name, shape) for name, shape in shapes.items()})
        if self.codec.code_size != meta.code_size:
            raise StoreError(f"{path}: code size {meta.code_size}, {meta.codec} has another")
        self._files = ShardFiles(self._finished, np.dtype(np.uint8), (meta.code_size,))
        self._counts: dict[int, npt.NDArray[np.int64]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Store.column, (self.store, self.name))

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """An array stored beside the codes, for instance a SwAV teacher's `teacher-prototypes` float32 [K, D]."""
        if name not in self.meta.arrays or not layout.COLUMN_NAME.fullmatch(name):
            raise StoreError(f"{self.folder}: no array {name!r}; there are {sorted(self.meta.arrays)}")
        shapes = parameter_shapes(self.meta.codec, self.meta.dim)
        return self._array(name, shapes.get(name))

    def _array(self, name: str, shape: tuple[int, ...] | None) -> npt.NDArray[np.float32]:
        """An array of `shape`, or of any that is not too large."""
        path = self.folder / f"{name}.npy"
        mapped = files.map_npy(path, np.dtype(np.float32), shape)
        if shape is None and mapped.nbytes > MAX_ARRAY:
            raise StoreError(f"{path}: {mapped.nbytes} bytes; no array of a teacher is over {MAX_ARRAY}")
        if files.sha256_file(path) != self.meta.arrays[name]:
            raise StoreError(f"{path}: altered: its sha256 is not that of meta.json; restore it from a copy")
        return np.array(mapped)

    def teacher_arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """The teacher's own arrays as it named them, for instance `prototypes` float32 [K, D]."""
        prefix = "teacher-"
        return {name.removeprefix(prefix): self.array(name) for name in self.meta.arrays if name.startswith(prefix)}

    @cached_property
    def missing_shards(self) -> list[int]:
        """Shards without all their codes or without crops, as the folder stood when this was first asked."""
        there, crops = files.names(self.folder), self.store.shards_with_crops()
        return [s for s in range(self.store.manifest.shards) if f"codes-{s:05d}.json" not in there or s not in crops]

    @cached_property
    def prefixes(self) -> set[int]:
        """Missing shards that were recorded in part; `counts` says how much of each."""
        there = files.names(self.folder)
        return {s for s in self.missing_shards if f"prefix-{s:05d}.json" in there and self.store.has_crops(s)}

    def counts(self, shard: int) -> npt.NDArray[np.int64]:
        """Of how many first crops each row of a shard that was recorded in part has codes: int64 [rows]."""
        if shard not in self._counts:
            path = layout.prefix_file(self.store.folder, self.name, shard).with_suffix(".json")
            rows, crops = len(self.store.manifest.shard_rows(shard)), files.read_json(path).get("crops")
            most = self.store.crops_per_image
            if not isinstance(crops, list) or len(crops) != rows or not all(type(n) is int and 0 <= n <= most for n in crops):
                raise StoreError(f"{path}: expected {rows} numbers of crops from 0 to {most}; the file is damaged")
            self._counts[shard] = np.array(crops, dtype=np.int64)
        return self._counts[shard]

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Row numbers that have targets, ascending, without those skipped as unreadable."""
        return self.store.rows[self.lengths(self.store.rows) > 0]

    def lengths(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Of how many first crops these rows have targets: C in finished shards, 0 in missing ones: int64 [len(rows)]."""
        m = self.store.manifest
        of_all = np.full(m.count, m.crops_per_image)
        for shard in self.missing_shards:
            place = m.shard_rows(shard)
            of_all[place.start : place.stop] = self.counts(shard) if shard in self.prefixes else 0
        return of_all[rows]

    def require_complete(self) -> None:
        """Raises StoreError where a shard is missing or was recorded in part, saying what to do."""
        if self.prefixes:
            raise StoreError(f"{self.folder}: {self.in_part}")
        self.require_readable()

    def require_readable(self) -> None:
        """Raises StoreError where shards are missing, saying how many and what to do; one recorded in part is there."""
        absent = [shard for shard in self.missing_shards if shard not in self.prefixes]
        if absent:
            total = self.store.manifest.shards
            raise StoreError(
                f"{self.folder}: {len(absent)} of {total} shards are missing (the first is {absent[0]}): run the same fkd-ssl "
                "precompute again, or the training that recorded it, to finish them"
            )

    @property
    def in_part(self) -> str:
        """How much of it a training recorded, where that is not all, in words."""
        lengths = self.lengths(self.store.rows)
        total, none = self.store.crops_per_image, int((lengths == 0).sum())
        least, most = int(lengths[lengths > 0].min(initial=total)), int(lengths.max(initial=0))
        some = f"{least}" if least == most else f"{least} to {most}"
        without = f", and none of {none:,} images" if none else ""
        copied = "" if none else ", subset --crops copies what all images have"
        return (
            f"a training recorded {some} of {total} crops of an image{without}: students can train on them; precompute into "
            f"this store finishes it{copied}"
        )

    def codes(self, row: int, index: Index) -> UInt8Array:
        """Codes uint8 [m, code_size] of the crops `index` of a row, read-only."""
        shard, within = self.store.locate(row)
        if shard in self.prefixes:  # rows of its file are as long as the longest one's
            index = np.arange(self.counts(shard)[within])[index]
        return self._files.read(shard, within, index)

    def shard(self, shard: int) -> UInt8Array:
        """Codes of a shard, memory-mapped: uint8 [rows, C, code_size], of fewer crops if it was recorded in part."""
        return self._files.map(shard)

    def file(self, shard: int) -> Path:
        """Where a shard's codes lie; raises StoreError where there are none."""
        path = layout.codes_file(self.store.folder, self.name, shard)
        prefix = layout.prefix_file(self.store.folder, self.name, shard)
        if files.exists(path.with_suffix(".json")):
            return path
        if files.exists(prefix.with_suffix(".json")):
            return prefix
        raise StoreError(f"{path}: this shard is not finished; run the same fkd-ssl precompute again")

    def _finished(self, shard: int) -> tuple[Path, int, int]:
        path, m = self.file(shard), self.store.manifest
        if self.sidecar(shard).get("column") != self.digest:
            raise StoreError(f"{path}: written for another meta.json than this column's; run fkd-ssl verify")
        whole = path == layout.codes_file(self.store.folder, self.name, shard)
        return path, len(m.shard_rows(shard)), m.crops_per_image if whole else int(self.counts(shard).max())

    def sidecar(self, shard: int) -> dict[str, Any]:
        """The sidecar of a shard's codes: `file` and `column` (sha256 each), and `crops` if it was recorded in part."""
        path = self.file(shard).with_suffix(".json")
        values = files.read_json(path)
        _check_digests([values.get("file"), values.get("column")], path)
        return values


class Store:
    """The crops and targets of one image set, opened for reading.

    Attributes:
        folder: Where it lies.
        manifest: What it is made of.
        paths: Relative path of each row.
        sizes: Byte size, width and height of each row's image.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = layout.read_manifest(self.folder)
        self.paths, self.sizes = layout.read_images(self.folder, self.manifest)
        for part in (layout.CROPS, layout.TARGETS):
            files.own_folder(self.folder / part)
        self._files = ShardFiles(self._finished, CROP_DTYPE)
        self._columns: dict[str, Column] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Store, (self.folder,))  # a worker process maps the files itself

    def __len__(self) -> int:
        """Images whose crops are stored: finished shards, without the rows skipped as unreadable."""
        return len(self.rows)

    @property
    def crops_per_image(self) -> int:
        """C."""
        return self.manifest.crops_per_image

    @property
    def teachers(self) -> list[str]:
        """Names of the columns."""
        targets = self.folder / layout.TARGETS
        named = [name for name in files.names(targets) if layout.COLUMN_NAME.fullmatch(name)]
        folders = [targets / name for name in named if (targets / name).is_dir() and not (targets / name).is_symlink()]
        return sorted(folder.name for folder in folders if files.exists(folder / "meta.json"))

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Row numbers that can be read, ascending."""
        found = self.shards_with_crops()
        readable = np.zeros(self.manifest.count, dtype=bool)
        for shard in range(self.manifest.shards):
            if shard in found:
                rows = self.manifest.shard_rows(shard)
                readable[rows.start : rows.stop] = True
                readable[self.skipped(shard)] = False
        return np.flatnonzero(readable)

    def shards_with_crops(self) -> set[int]:
        """Shards whose crops are finished, as the folder stands now: one listing, however many there are."""
        there = files.names(self.folder / layout.CROPS)
        return {shard for shard in range(self.manifest.shards) if f"{shard:05d}.json" in there}

    def has_crops(self, shard: int) -> bool:
        """Whether a shard's crops are finished."""
        return files.exists(layout.crops_file(self.folder, shard).with_suffix(".json"))

    def crops_sidecar(self, shard: int) -> dict[str, Any]:
        """The sidecar of a shard's crops: `file`, `images` (sha256 of each), `skipped` (rows)."""
        path = layout.crops_file(self.folder, shard).with_suffix(".json")
        values = files.read_json(path)
        rows = self.manifest.shard_rows(shard)
        checksums = layout.string_list(values.get("images"), len(rows), path)
        _check_digests([values.get("file"), *filter(None, checksums)], path)  # "" is an image that was skipped
        skipped = values.get("skipped")
        if not isinstance(skipped, list) or not all(type(row) is int and row in rows for row in skipped):
            raise StoreError(f"{path}: impossible list of skipped rows; the file is damaged")
        return values

    def skipped(self, shard: int) -> list[int]:
        """Rows of a shard whose images were skipped as unreadable."""
        path, rows = layout.crops_file(self.folder, shard).with_suffix(".json"), self.manifest.shard_rows(shard)
        match = files.match_signed(path, _CROPS_SIDECAR)
        if match is not None and match["images"].count(b'"') == 2 * len(rows):
            skipped = [int(row) for row in match["skipped"].split(b",") if row]
            if all(row in rows for row in skipped):
                return skipped
        whole: list[int] = self.crops_sidecar(shard)["skipped"]  # or what is wrong with it
        return whole

    def image_checksums(self, shard: int) -> UInt8Array:
        """sha256 of a shard's images as uint8 [rows, 32], zeros for those skipped as unreadable."""
        path, rows = layout.crops_file(self.folder, shard).with_suffix(".json"), self.manifest.shard_rows(shard)
        match = files.match_signed(path, _CROPS_SIDECAR)
        listed = match["images"].decode().replace('"', "").split(",") if match else self.crops_sidecar(shard)["images"]
        digits = "".join(checksum or "0" * 64 for checksum in listed)
        if len(listed) != len(rows) or not all(len(checksum) in (0, 64) for checksum in listed) or not _HEX.fullmatch(digits):
            raise StoreError(f"{path}: expected {len(rows)} sha256 of images; the file is damaged")
        return np.frombuffer(bytes.fromhex(digits), dtype=np.uint8).reshape(-1, 32)

    def crops(self, row: int, index: Index) -> Records:
        """Crop records [m] of the crops `index` of a row, read-only."""
        return self._files.read(*self.locate(row), index)

    def crop_shard(self, shard: int) -> Records:
        """Crop records of a shard, memory-mapped: [rows, C]."""
        return self._files.map(shard)

    def locate(self, row: int) -> tuple[int, int]:
        """A row's shard, and its place there; raises IndexError where there is no such row."""
        if not 0 <= row < self.manifest.count:
            raise IndexError(f"row {row} of {self.manifest.count}")
        return divmod(row, self.manifest.rows_per_shard)

    def _finished(self, shard: int) -> tuple[Path, int, int]:
        path, m = layout.crops_file(self.folder, shard), self.manifest
        if not self.has_crops(shard):
            raise StoreError(f"{path}: this shard is not finished; run the same fkd-ssl precompute again")
        return path, len(m.shard_rows(shard)), m.crops_per_image

    def column(self, name: str | None = None) -> Column:
        """One teacher's targets; without a name the only one there is.

        Raises:
            NotFoundError: There is no such column, or several and none was named.
        """
        if name in self._columns:
            return self._columns[name]
        there = self.teachers
        if name is None:
            if len(there) != 1:
                raise NotFoundError(
                    f"{self.folder}: holds targets of {there or 'no teacher'}; name one (train and show: --teacher, "
                    "verify and recode: --name, in Python: teacher=)"
                )
            name = there[0]
        if name not in there:
            raise NotFoundError(f"{self.folder}: no targets of {name!r}; there are {there or 'none yet'}")
        return self._columns.setdefault(name, Column(self, name))

    def targets(self, name: str, row: int, index: Index) -> Float32Array:
        """Decoded targets float32 [m, D] of the crops `index` of a row."""
        column = self.column(name)
        return column.codec.decode(column.codes(row, index))


def open_store(folder: str | Path) -> Store:
    """Opens a store for reading; raises NotFoundError where there is none, StoreError where it is damaged."""
    return Store(folder)
