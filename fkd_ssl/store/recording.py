"""Recording: targets that a training's teacher gives, kept as the column that precompute would have written.

While it trains, codes go where they belong in one sparse file, block by block: M crops of an image lie together, and those
that one pass gives of a shard lie side by side. A journal counts what survives a kill. At the end each shard becomes a
file of codes, or, where not all C crops of its images were used, of the first ones, whose sidecar says of how many.
"""

import base64
import errno
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from fkd_ssl import files, locks
from fkd_ssl.errors import FkdError, RequestError, StoreError
from fkd_ssl.progress import hidden
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.codecs import Float32Array, UInt8Array
from fkd_ssl.store.reader import Column, Store

_WORK, _JOURNAL = ".record", ".record.json"


class Recording:
    """One column that is being recorded; at most one process has it.

    Args:
        column: Of a store whose crops are there; it has no codes yet.
        block: M, crops of an image that are recorded at once; divides C.

    Attributes:
        counts: Of how many first crops each row's targets were added: int64 [N].

    Raises:
        RequestError: M does not divide C, the column holds codes, or another process records it.
    """

    def __init__(self, column: Column, block: int) -> None:
        self.column = column
        self._block = block
        m = column.store.manifest
        if block < 1 or m.crops_per_image % block:
            raise RequestError(
                f"--record {column.store.folder}: it plans {m.crops_per_image} crops an image, which is no multiple of "
                f"crops_per_image {block}"
            )
        if is_published(column):
            raise RequestError(
                f"--record {column.store.folder}: it holds targets of {column.name} already: train on them with --targets "
                "stored, have them finished by fkd-ssl precompute, or choose another store"
            )
        self._file = _taken(column)
        try:
            self.counts = _read_journal(column, block)
        except StoreError:
            os.close(self._file)
            raise
        self._row_bytes = m.crops_per_image * column.meta.code_size

    def add(self, places: npt.NDArray[np.int64], targets: Float32Array) -> None:
        """Writes what a teacher said of some blocks; crops that were written before are written again.

        Args:
            places: Row, and first of its M crops, of each block: [B, 2].
            targets: [B M, D].

        Raises:
            FkdError: Targets are not finite, or blocks before these were never added.
        """
        if not np.isfinite(targets).all():
            raise FkdError(f"teacher {self.column.name}: gave targets that are not finite")
        m, unit = self.column.store.manifest, self._block * self.column.meta.code_size
        codes = self.column.codec.encode(targets).reshape(len(places), unit)
        for (row, first), code in zip(places.tolist(), codes, strict=True):
            if first > self.counts[row]:
                raise FkdError(
                    f"{self.column.folder}: row {row}: crops before {first} were used and are not here: this is not the "
                    "store that the run began to record; give it back, or train anew with another --out and --record"
                )
            shard, within = self.column.store.locate(row)
            blocks_before = first // self._block * len(m.shard_rows(shard)) + within
            self._write(code, shard * m.rows_per_shard * self._row_bytes + blocks_before * unit)
            self.counts[row] = max(self.counts[row], first + self._block)

    def sync(self) -> None:
        """Makes what was added survive a kill: the bytes are synced before the journal counts them."""
        os.fsync(self._file)
        counts = zlib.compress(self.counts.astype("<u4").tobytes(), 1)
        values = {"column": self.column.digest, "block": self._block, "counts": base64.b64encode(counts).decode()}
        files.replace(self.column.folder / _JOURNAL, files.signed(values))

    def require(self, crops: int) -> None:
        """Raises FkdError where fewer than `crops` crops in all were added: a run goes on that recorded them elsewhere."""
        store = self.column.store
        if self.counts.sum() < min(crops, len(store) * store.crops_per_image):
            raise FkdError(
                f"{self.column.folder}: holds {self.counts.sum():,} recorded targets, and this run recorded {crops:,} before "
                "its last checkpoint: give back the store that it began with, or train anew with another --out and --record"
            )

    def publish(self) -> None:
        """Turns what was added into codes of the store, the last shard first; started again it continues."""
        store, m = self.column.store, self.column.store.manifest
        self.sync()
        shards = range(m.shards - 1, -1, -1)
        for shard in tqdm(shards, desc="store", unit="shard", disable=hidden(show=m.shards > 50)):
            self._publish(shard)
            os.ftruncate(self._file, shard * m.rows_per_shard * self._row_bytes)  # so a disk never holds both copies of all
        files.sweep(self.column.folder, seconds=0)  # of this process's forerunners, which were killed: nobody else writes here
        for name in (_WORK, _JOURNAL):
            (self.column.folder / name).unlink(missing_ok=True)
        files.sync_folder(self.column.folder)
        self.column = Store(store.folder).column(self.column.name)

    def close(self) -> None:
        """Lets another process have the column."""
        os.close(self._file)

    def _write(self, code: UInt8Array, place: int) -> None:
        """Writes a block; raises OSError, with the file's name, where the disk is full or fails."""
        with files.naming(self.column.folder / _WORK):
            if os.pwrite(self._file, code.data, place) < code.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _publish(self, shard: int) -> None:
        store, m = self.column.store, self.column.store.manifest
        rows = m.shard_rows(shard)
        counts = self.counts[rows.start : rows.stop].copy()
        skipped = np.array(store.skipped(shard), dtype=np.int64) - rows.start
        counts[skipped] = counts.max() if len(skipped) < len(rows) else m.crops_per_image  # nobody reads them
        whole = layout.codes_file(store.folder, self.column.name, shard)
        prefix = layout.prefix_file(store.folder, self.column.name, shard)
        most = int(counts.max(initial=0))
        if not most or any(path.with_suffix(".json").exists() for path in (whole, prefix)):
            return
        codes = self._codes(shard, most)
        codes[np.arange(most) >= counts[:, None]] = 0
        path = whole if counts.min() == m.crops_per_image else prefix
        values = {"file": files.write_npy(path, codes), "column": self.column.digest}
        files.write_json(path.with_suffix(".json"), values if path == whole else {**values, "crops": counts.tolist()})

    def _codes(self, shard: int, crops: int) -> UInt8Array:
        """The first codes of each row of a shard: uint8 [rows, crops, code size]; StoreError where some are gone."""
        m, size = self.column.store.manifest, self.column.meta.code_size
        rows, blocks = len(m.shard_rows(shard)), -(-crops // self._block)
        length, begin = blocks * rows * self._block * size, shard * m.rows_per_shard * self._row_bytes
        codes = np.zeros(length, dtype=np.uint8)
        with os.fdopen(os.dup(self._file), "rb", buffering=0) as file:
            file.seek(begin)
            view, done = memoryview(codes.data), 0
            while done < length and (count := file.readinto(view[done:])):
                done += count
        last = -(-self.counts[m.shard_rows(shard)] // self._block) - 1  # block of each row
        if done < np.where(last < 0, 0, last * rows + np.arange(rows) + 1).max() * self._block * size:
            raise StoreError(
                f"{self.column.folder / _WORK}: shorter than {_JOURNAL} counts: restore it from a copy, or delete both, and "
                "what was recorded is lost"
            )
        by_row = codes.reshape(blocks, rows, self._block, size).transpose(1, 0, 2, 3)
        return by_row.reshape(rows, blocks * self._block, size)[:, :crops].copy()


def is_recorded(column: Column) -> bool:
    """Whether a training has begun to record a column and has not ended."""
    return (column.folder / _JOURNAL).exists()


def recorded_bytes(folder: Path) -> int:
    """What the recording of a column takes on the disk now; its file is sparse."""
    path = folder / _WORK
    return 512 * path.stat().st_blocks if path.exists() else 0


def is_published(column: Column) -> bool:
    """Whether a column holds targets, or precompute has begun them, and no training is recording it."""
    begun = column.prefixes or any(column.folder.glob(".work-codes-*"))
    some = bool(begun) or len(column.missing_shards) < column.store.manifest.shards
    return some and not is_recorded(column)


def publish_left(column: Column) -> bool:
    """Publishes what a training recorded that was stopped and not gone on with; returns whether there was such a recording.

    Raises:
        RequestError: The training is still running.
    """
    journal, work = column.folder / _JOURNAL, column.folder / _WORK
    if not journal.exists() and not work.exists():
        return False
    with _alone(column.folder):
        if not journal.exists():  # another process did it meanwhile, or a training is before its first checkpoint
            if work.exists():
                os.close(_taken(column))
                work.unlink()
            return False
        try:
            block = int(files.read_json(journal)["block"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{journal}: keys are missing or unknown; delete it, and what was recorded is lost") from error
        recording = Recording(column, block)
        try:
            recording.publish()
        finally:
            recording.close()
    return True


def _taken(column: Column) -> int:
    """A descriptor of the file of a column's recording, which no other process has; raises RequestError where one has it."""
    path = column.folder / _WORK
    while True:
        file = files.plain_descriptor(path, os.O_RDWR | os.O_CREAT)
        ours = locks.try_lock(file, seconds=locks.PATIENCE)
        if ours and path.exists() and os.path.samestat(path.stat(), os.fstat(file)):
            return file
        os.close(file)
        if not ours:
            raise RequestError(f"{column.folder}: another process records this column now; wait for it, or stop it")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process publishes a recording in this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        locks.try_lock(handle, seconds=math.inf)
        yield
    finally:
        os.close(handle)


def _read_journal(column: Column, block: int) -> npt.NDArray[np.int64]:
    """Counts of a recording that goes on; zeros for a new one."""
    path, rows = column.folder / _JOURNAL, column.store.manifest.count
    if not path.exists():
        return np.zeros(rows, dtype=np.int64)
    values = files.read_json(path)
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(values["counts"], validate=True), 4 * rows)
        counts = np.frombuffer(data, dtype="<u4").astype(np.int64)
        fits = values["column"] == column.digest and values["block"] == block and len(counts) == rows
        fits = fits and counts.max(initial=0) <= column.store.crops_per_image
    except (KeyError, TypeError, ValueError, zlib.error):
        fits = False
    if not fits:
        raise StoreError(
            f"{path}: the journal of another recording (of other crops_per_image, or of a column that was replaced); continue "
            "that run, or delete this file, and what it recorded is lost"
        )
    return counts
