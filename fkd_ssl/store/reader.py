"""Reading a store: crop records and decoded targets by row, memory-mapped; nothing that is read is trusted."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE, Records
from fkd_ssl.errors import StoreError
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.codecs import Codec, Float32Array, UInt8Array

Index = slice | npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ColumnMeta:
    """meta.json of a column: whose targets these are and how they are encoded."""

    kind: str
    """`embedding`: L2-normalised vectors."""
    dim: int
    """D."""
    codec: str
    """faiss factory string."""
    code_size: int
    """Bytes of one code."""
    fidelity: dict[str, float]
    """Cosine of decoded to original targets on a held-out sample: `cosine_mean`, `cosine_min`, `sample`."""
    teacher: dict[str, Any]
    """name, network, licence, source, checkpoint_sha256."""
    preprocessing: dict[str, list[float]]
    """`mean` and `std` of RGB in 0 to 1."""
    pixels: int
    """Side of the crops that the teacher saw."""
    precision: Literal["fp32", "bf16", "fp16"]
    """Arithmetic of the teacher's forward."""
    chunk_size: int
    """Crops in one forward: another size gives other last bits."""
    probe_digest: str
    """Which pixel path made the crops; see fkd_ssl.crops.probe_digest."""
    arrays: dict[str, str]
    """sha256 of each .npy beside it: the codec's parameters, and the teacher's own under `teacher-`."""


class Column:
    """One teacher's targets in a store."""

    def __init__(self, store: "Store", name: str) -> None:
        self.store = store
        self.name = name
        self.folder = store.folder / layout.TARGETS / name
        values = files.read_json(self.folder / "meta.json")
        self.digest = files.sha256(files.canonical(values))
        try:
            self.meta = ColumnMeta(**values)
        except TypeError as error:
            raise StoreError(f"{self.folder / 'meta.json'}: {error}; the file is damaged or newer") from error
        meta = self.meta
        if meta.precision not in ("fp32", "bf16", "fp16"):
            raise StoreError(
                f"{self.folder / 'meta.json'}: precision {meta.precision!r} is unknown; the file is damaged or newer"
            )
        if meta.kind != "embedding" or not isinstance(meta.arrays, dict) or not isinstance(meta.codec, str):
            raise StoreError(f"{self.folder / 'meta.json'}: a kind {meta.kind!r} that this version does not read")
        if not isinstance(meta.dim, int) or not 0 < meta.dim <= 65536:
            raise StoreError(f"{self.folder / 'meta.json'}: dimension {meta.dim!r} is impossible")
        parameters = {name: self.array(name) for name in meta.arrays if not name.startswith("teacher-")}
        self.codec = Codec.load(meta.codec, meta.dim, parameters)
        if self.codec.code_size != meta.code_size:
            raise StoreError(f"{self.folder / 'meta.json'}: code size {meta.code_size}, {meta.codec} has another")
        self._maps: dict[int, UInt8Array] = {}

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """An array stored beside the codes, for instance a SwAV teacher's `teacher-prototypes` float32 [K, D]."""
        if name not in self.meta.arrays or not layout.COLUMN_NAME.fullmatch(name):
            raise StoreError(f"{self.folder}: no array {name!r}; there are {sorted(self.meta.arrays)}")
        path = self.folder / f"{name}.npy"
        if files.sha256_file(path) != self.meta.arrays[name]:
            raise StoreError(f"{path}: altered: its sha256 is not that of meta.json; restore it from a copy")
        try:
            array: npt.NDArray[np.float32] = np.load(path, allow_pickle=False, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: {error}") from error
        return np.array(array)

    def teacher_arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """The teacher's own arrays as it named them, for instance `prototypes` float32 [K, D]."""
        prefix = "teacher-"
        return {name.removeprefix(prefix): self.array(name) for name in self.meta.arrays if name.startswith(prefix)}

    @cached_property
    def missing_shards(self) -> list[int]:
        """Shards without codes or without crops, as the folder stood when this was first asked."""
        there = {path.name for path in self.folder.glob("codes-*.json")}
        shards = range(self.store.manifest.shards)
        return [s for s in shards if f"codes-{s:05d}.json" not in there or not self.store.has_crops(s)]

    def require_complete(self) -> None:
        """Raises StoreError where shards are missing, saying how many and what to do."""
        if self.missing_shards:
            total = self.store.manifest.shards
            raise StoreError(
                f"{self.folder}: {len(self.missing_shards)} of {total} shards are missing (the first is "
                f"{self.missing_shards[0]}): run the same fkd-ssl precompute again to finish them"
            )

    def codes(self, row: int, index: Index) -> UInt8Array:
        """Codes uint8 [m, code_size] of the crops `index` of a row."""
        shard, within = divmod(row, self.store.manifest.rows_per_shard)
        return self.shard(shard)[within, index]

    def shard(self, shard: int) -> UInt8Array:
        """Codes of a shard, memory-mapped: uint8 [rows, C, code_size]."""
        if shard not in self._maps:
            m = self.store.manifest
            path = layout.codes_file(self.store.folder, self.name, shard)
            if not path.with_suffix(".json").exists():
                raise StoreError(f"{path}: this shard is not finished; run the same fkd-ssl precompute again")
            shape = (len(m.shard_rows(shard)), m.crops_per_image, self.meta.code_size)
            self._maps[shard] = files.map_npy(path, np.dtype(np.uint8), shape)
        return self._maps[shard]

    def sidecar(self, shard: int) -> dict[str, Any]:
        """The sidecar of a shard's codes."""
        return files.read_json(layout.codes_file(self.store.folder, self.name, shard).with_suffix(".json"))


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
        self._maps: dict[int, Records] = {}
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
        folder = self.folder / layout.TARGETS
        found = [path.parent.name for path in folder.glob("*/meta.json")]
        return sorted(name for name in found if layout.COLUMN_NAME.fullmatch(name))

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Row numbers that can be read, ascending."""
        rows: list[int] = []
        for shard in range(self.manifest.shards):
            if self.has_crops(shard):
                skipped = set(self.skipped(shard))
                rows += [row for row in self.manifest.shard_rows(shard) if row not in skipped]
        return np.array(rows, dtype=np.int64)

    def has_crops(self, shard: int) -> bool:
        """Whether a shard's crops are finished."""
        return layout.crops_file(self.folder, shard).with_suffix(".json").exists()

    def crops_sidecar(self, shard: int) -> dict[str, Any]:
        """The sidecar of a shard's crops: `file`, `images` (sha256 of each), `skipped` (rows)."""
        path = layout.crops_file(self.folder, shard).with_suffix(".json")
        values = files.read_json(path)
        rows = self.manifest.shard_rows(shard)
        layout.string_list(values.get("images"), len(rows), path)
        skipped = values.get("skipped")
        if not isinstance(skipped, list) or not all(isinstance(row, int) and row in rows for row in skipped):
            raise StoreError(f"{path}: impossible list of skipped rows; the file is damaged")
        return values

    def skipped(self, shard: int) -> list[int]:
        """Rows of a shard whose images were skipped as unreadable."""
        skipped: list[int] = self.crops_sidecar(shard)["skipped"]
        return skipped

    def crops(self, row: int, index: Index) -> Records:
        """Crop records [m] of the crops `index` of a row."""
        shard, within = divmod(row, self.manifest.rows_per_shard)
        return self.crop_shard(shard)[within, index]

    def crop_shard(self, shard: int) -> Records:
        """Crop records of a shard, memory-mapped: [rows, C]."""
        if shard not in self._maps:
            path = layout.crops_file(self.folder, shard)
            if not self.has_crops(shard):
                raise StoreError(f"{path}: this shard is not finished; run the same fkd-ssl precompute again")
            shape = (len(self.manifest.shard_rows(shard)), self.crops_per_image)
            self._maps[shard] = files.map_npy(path, CROP_DTYPE, shape)
        return self._maps[shard]

    def column(self, name: str | None = None) -> Column:
        """One teacher's targets; without a name the only one there is.

        Raises:
            StoreError: There is no such column, or several and none was named.
        """
        there = self.teachers
        if name is None:
            if len(there) != 1:
                raise StoreError(
                    f"{self.folder}: holds targets of {there or 'no teacher'}; name one (train: --teacher, "
                    "verify: --name, in Python: teacher=)"
                )
            name = there[0]
        if name not in there:
            raise StoreError(f"{self.folder}: no targets of {name!r}; there are {there or 'none yet'}")
        if name not in self._columns:
            self._columns[name] = Column(self, name)
        return self._columns[name]

    def targets(self, name: str, row: int, index: Index) -> Float32Array:
        """Decoded targets float32 [m, D] of the crops `index` of a row."""
        column = self.column(name)
        return column.codec.decode(column.codes(row, index))


def open_store(folder: str | Path) -> Store:
    """Opens a store for reading; raises StoreError where it is none or is damaged."""
    return Store(folder)
