"""Recode: re-encodes a column's targets, or the mean of several columns, with another codec. Needs no teacher."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from fkd_ssl import files
from fkd_ssl.arrays import Float32Array, Int64Array, UInt8Array
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.column import COSINES, Column, cosine_to_teacher
from fkd_ssl.store.maintain.subset import Part, atomic_folder
from fkd_ssl.store.maintain.verify import check_files
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write.columns import check_sample, sample_rows, train_codec, warn_of_loss
from fkd_ssl.store.write.creation import write_codes

_BLOCK = 2**23  # values that are decoded at once


def recode(
    store: Store,
    codec: str,
    *,
    column: str | Sequence[str] | None = None,
    to: str | None = None,
    out: str | Path | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> Column:
    """Writes the targets of a column with another codec, as a new column of the store or into a new store.

    The new column appears when it is complete. If the call is killed, call it again to continue. The source is not changed. The
    information that its codec discarded is lost: the recorded fidelity is relative to the source's targets, not the teacher's.

    Args:
        store: The store.
        codec: faiss factory string for embeddings, a label codec for class probabilities.
        column: The column to recode. Default: the only column. A list of columns with class probabilities gives their mean
            (MEAL V2, arXiv 2009.08453, section 3).
        to: Name of the new column. Default: the source's name, followed by the codec's name unless `out` is given.
        out: A new store for the column, with the same crops. Default: the same store.
        log: Called with a warning if the codec loses much.

    Raises:
        RequestError: The codec does not fit the targets, the columns cannot be averaged, or the new column or store already
            exists with other contents.
        StoreError: A source is damaged or incomplete.
    """
    names = [column] if column is None or isinstance(column, str) else [*column]
    if not names:
        raise RequestError("column []: expected the name of a column")
    source = Source([store.column(each) for each in names])
    source.meta.target.check_codec(codec, source.name)
    if to is None:
        to = source.name if out is not None else f"{source.name}-{codec.replace(',', '-')}"
    to = layout.checked_name(to)
    for each in source.columns:
        each.require_complete()
    if out is None:
        store.require_local()
        target = store.folder / layout.TARGETS / to
        if target.exists():
            return _same(store, store.manifest, source, codec, to)
        _check_source(source, codec)
        with atomic_folder(target) as folder:
            _fill(source, codec, store, folder.name, np.arange(store.manifest.count), log)
        return Store(store.folder).column(to)
    out = Path(out).resolve()  # a temporary folder is named after it, and '.' has no name
    part = Part(store, column=[])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _same(Store(out), part.manifest, source, codec, to)
    _check_source(source, codec)
    with atomic_folder(out) as folder:
        part.write(folder, beside=to)
        _fill(source, codec, Store(folder), to, part.rows, log)
    return Store(out).column(to)


class Source:
    """The source of a recoding: a column, or the mean of several.

    Attributes:
        columns: Columns of one store.
        meta: meta.json of the new column, except for its codec, fidelity and arrays.
        name: Name of the column, or the names of all columns.
        digest: Digest that identifies the columns.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        first = columns[0]
        self.store = first.store
        self.meta, self.name, self.digest = first.meta, first.name, first.digest
        if len(columns) > 1:
            self._mean(columns)

    def _mean(self, columns: Sequence[Column]) -> None:
        first, *_ = metas = [column.meta for column in columns]
        names = [column.name for column in columns]
        if len(set(names)) < len(names):
            raise RequestError(f"column {','.join(names)}: a column is named twice")
        for name, meta in zip(names, metas, strict=True):
            if (meta.target.kind, meta.target) != ("distribution", first.target):
                raise RequestError(
                    f"column {','.join(names)}: {name} has {meta.target.definition.display_name}, {meta.target}; "
                    "a mean is taken of class probabilities of the same classes"
                )
        self.name = "-and-".join(names)
        self.digest = hashlib.sha256(" ".join(column.digest for column in columns).encode()).hexdigest()
        teachers = [meta.teacher for meta in metas]
        one = first.teacher
        alike = all((other.mean, other.std) == (one.mean, one.std) for other in teachers)
        teacher = replace(
            one,
            name=self.name,
            network=f"mean probabilities of: {'; '.join(each.network for each in teachers)}",
            licence="; ".join(dict.fromkeys(each.licence for each in teachers)),
            source=" + ".join(each.source or "not stated" for each in teachers),
            checkpoint_sha256=None,
            mean=one.mean if alike else (0, 0, 0),  # no normalisation
            std=one.std if alike else (1, 1, 1),
        )
        self.meta = replace(first, codec=" + ".join(meta.codec for meta in metas), teacher=teacher, arrays={})

    def decode(self, codes: Sequence[UInt8Array]) -> Float32Array:
        """Decodes each column's codes [n, code_size] and returns the mean targets float32 [n, *shape]."""
        decoded = [column.codec.decode(part) for column, part in zip(self.columns, codes, strict=True)]
        return decoded[0] if len(decoded) == 1 else np.mean(decoded, axis=0, dtype=np.float32)


def _check_source(source: Source, codec: str) -> None:
    """Raises RequestError if the source has too few targets to train the codec, StoreError if it is damaged."""
    check_sample(codec, source.meta.target, _sample(source, codec)[2])
    for column in source.columns:
        check_files(source.store, column)


def _same(store: Store, manifest: layout.Manifest, source: Source, codec: str, to: str) -> Column:
    """Returns the existing column, if it is the requested one in a store with this manifest."""
    try:
        there = store.column(to)
        if _is_of(there, source, codec) and store.manifest == manifest and not there.missing_shards:
            return there
    except StoreError:
        pass
    raise RequestError(f"{store.folder}: its column {to!r} is not {source.name} in {codec}; choose another --to or --out")


def _is_of(column: Column, source: Source, codec: str) -> bool:
    """Whether a column was recoded from this source with this codec."""
    meta, f = column.meta, column.meta.fidelity
    same = meta == replace(source.meta, codec=codec, code_size=meta.code_size, fidelity=f, arrays=meta.arrays)
    return same and (f.get("source_codec"), f.get("source_column")) == (source.meta.codec, source.digest)


def _fill(source: Source, codec: str, store: Store, to: str, rows: Int64Array, log: Callable[[str], None]) -> None:
    """Writes the column `to` of a store that has the source's crops. `rows` has the source's row of each of its rows."""
    folder = store.folder / layout.TARGETS / to
    if not (folder / "meta.json").exists():
        meta, arrays = _train(source, codec, log)
        folder.mkdir(exist_ok=True)
        digests = {array: files.write_npy(folder / f"{array}.npy", values) for array, values in arrays.items()}
        files.write_json(folder / "meta.json", {**meta, "arrays": digests})
    column = Column(store, to)
    if not _is_of(column, source, codec):
        raise RequestError(
            f"{folder}: holds an unfinished recoding of {column.meta.teacher.name} to {column.meta.codec}, "
            f"not of {source.name} to {codec}; delete that folder, or choose another --to or --out"
        )
    codes_of = functools.partial(layout.codes_file, store.folder, to)
    missing = [shard for shard in range(store.manifest.shards) if not codes_of(shard).with_suffix(".json").exists()]
    total, done = store.manifest.shards, store.manifest.shards - len(missing)
    for shard in tqdm(missing, total=total, initial=done, desc=f"recode {source.name}", unit="shard"):
        of_shard = store.manifest.shard_rows(shard)
        read = np.ones(len(of_shard), dtype=bool)  # the codes of skipped images have no meaning
        read[np.array(store.skipped(shard), dtype=np.int64) - of_shard.start] = False
        parts = _recoded(source, column, rows[of_shard.start : of_shard.stop], read)
        shape = len(of_shard), store.crops_per_image, column.meta.code_size
        write = functools.partial(files.write_npy_parts, dtype=np.dtype(np.uint8), shape=shape, parts=parts)
        write_codes(store.folder, store.manifest, shard, write, column=to, digest=column.digest)


def _recoded(source: Source, column: Column, rows: Int64Array, read: npt.NDArray[np.bool_]) -> Iterator[UInt8Array]:
    """Yields the new codes [n, C, code_size] of some of the source's rows, a few at a time; zeros where `read` is False."""
    block = max(1, _BLOCK // source.meta.target.size)
    step = max(1, block // column.store.crops_per_image)
    for first in range(0, len(rows), step):
        some = read[first : first + step]
        codes = [_codes(one, rows[first : first + step][some]) for one in source.columns]
        flat = [of_one.reshape(-1, of_one.shape[-1]) for of_one in codes]
        made = np.zeros((len(some), column.store.crops_per_image, column.meta.code_size), dtype=np.uint8)
        new = [
            column.codec.encode(source.decode([of_one[k : k + block] for of_one in flat]))
            for k in range(0, len(flat[0]), block)
        ]
        if new:
            made[some] = np.concatenate(new).reshape(-1, *made.shape[1:])
        yield made


def _codes(column: Column, rows: Int64Array) -> UInt8Array:
    """Returns the codes [n, C, code_size] of some rows."""
    codes = np.empty((len(rows), column.store.crops_per_image, column.meta.code_size), dtype=np.uint8)
    for shard, here, within in column.store.by_shard(rows):
        codes[here] = column.shard(shard)[within]
    return codes


def _sample(source: Source, codec: str) -> tuple[list[int], int, int]:
    """Returns `sample_rows` without images that were skipped."""
    order, per_image, size = sample_rows(source.store, codec, source.meta.target)
    readable = set(source.store.rows.tolist())
    rows = [row for row in order if row in readable]
    return rows, per_image, min(size, len(rows) * per_image)


def _train(source: Source, codec: str, log: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Float32Array]]:
    """Returns meta.json of the recoded column, without the checksums of its arrays, and the arrays."""
    rows, per_image, size = _sample(source, codec)
    codes = [np.concatenate([one.codes(row, slice(per_image)) for row in rows])[:size] for one in source.columns]
    block = max(1, _BLOCK // source.meta.target.size)
    parts = [
        source.meta.target.definition.sample(source.decode([of_one[k : k + block] for of_one in codes]))
        for k in range(0, size, block)
    ]
    sample = np.concatenate(parts)
    trained, fidelity = train_codec(codec, source.meta.target, sample)
    warn_of_loss(source.name, codec, source.meta.target, fidelity, sample, log)
    fidelity |= {
        "source_codec": source.meta.codec,
        "source_column": source.digest,
        **{f"source_{key}": min(cosine_to_teacher(one.meta, key) for one in source.columns) for key in COSINES},
    }
    size_of_code = source.meta.target.check_codec(codec, source.name)
    meta = {**source.meta.to_json(), "codec": codec, "code_size": size_of_code, "fidelity": fidelity}
    del meta["arrays"]
    extra = {array: source.columns[0].array(array) for array in source.meta.arrays if array.startswith("teacher-")}
    return meta, {**trained.arrays(), **extra}
