"""Recording: stores the targets that a teacher gives during training, as the column that precompute would have written.

During training, codes are written to one work file, in blocks of M crops of one image with their CRC-32. The blocks of one pass
over a shard are contiguous. A journal counts the synced blocks. At the end, the blocks of each shard become its file of codes.
A shard with a missing or altered block is omitted, and precompute computes it.
"""

import errno
import os
import zlib
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from fkd_ssl import files, locks
from fkd_ssl.arrays import Float32Array, Int64Array, UInt8Array
from fkd_ssl.errors import FkdError, RequestError, StoreError
from fkd_ssl.progress import bar_disabled
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.column import Column
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write.creation import write_codes

_WORK, _JOURNAL = ".record", ".record.json"
_CHECKSUM = np.dtype("<u4")


class Recording:
    """A column that is being recorded, by one process at a time.

    Args:
        column: A column without codes, of a store with finished crops.
        block: M, the number of crops per image that are recorded at once; must divide C.

    Attributes:
        crops: Number of crops that the training has recorded so far.

    Raises:
        RequestError: M does not divide C, the column has codes, or another process is recording it.
        StoreError: The journal is damaged, or belongs to another recording.
    """

    def __init__(self, column: Column, block: int) -> None:
        self.column = column
        self._block = block
        m = column.store.manifest
        if block < 1 or m.crops_per_image % block:
            raise RequestError(
                f"--record {column.store.folder}: it stores {m.crops_per_image} crops per image, which is not a multiple of "
                f"crops_per_image {block}"
            )
        if has_targets(column):
            raise RequestError(
                f"--record {column.store.folder}: it holds targets of {column.name} already: train on them with --targets "
                "stored, let fkd-ssl precompute finish them, or choose another store"
            )
        self._blocks = m.crops_per_image // block
        self._unit = block * column.meta.code_size + _CHECKSUM.itemsize
        self._shard_bytes = m.rows_per_shard * self._blocks * self._unit
        self._file = _acquire(column)
        try:
            self.crops = self._read_journal()
        except StoreError:
            os.close(self._file)
            raise

    def add(self, places: Int64Array, targets: Float32Array) -> None:
        """Writes the targets of some blocks, and overwrites blocks that were written before.

        Args:
            places: Row and first crop of each block: [B, 2].
            targets: [B M, D].

        Raises:
            FkdError: Targets are not finite.
        """
        if not np.isfinite(targets).all():
            raise FkdError(f"teacher {self.column.name}: gave targets that are not finite: {self.column.info.if_not_finite}")
        codes = self.column.codec.encode(targets).reshape(len(places), -1)
        for (row, first), code in zip(places.tolist(), codes, strict=True):
            shard, within = self.column.store.locate(row)
            rows = len(self.column.store.manifest.shard_rows(shard))
            number = first // self._block * rows + within
            data = code.tobytes()
            # includes the block's number, so that a misplaced block is detected
            checksum = np.array(zlib.crc32(data, number), dtype=_CHECKSUM).tobytes()
            self._write(data + checksum, shard * self._shard_bytes + number * self._unit)
        self.crops += len(targets)

    def sync(self) -> None:
        """Saves the blocks so that they survive a kill: syncs them, then counts them in the journal."""
        os.fsync(self._file)
        values = {"column": self.column.digest, "block": self._block, "crops": self.crops}
        files.replace(self.column.folder / _JOURNAL, files.with_checksum(values))

    def resume(self, crops: int) -> None:
        """Continues after the first `crops` crops of the training. Raises FkdError if fewer were recorded."""
        if self.crops < crops:
            raise FkdError(
                f"{self.column.folder}: holds {self.crops:,} recorded targets, and this run recorded {crops:,} before its last "
                "checkpoint: restore the store that the run began with, or train anew with another --out and --record"
            )
        self.crops = crops

    def finish(self) -> list[int]:
        """Writes the blocks as codes of the store, last shard first. Call it again after a kill to continue.

        Returns:
            Shards that were omitted, since one of their blocks is missing or altered.
        """
        store, m = self.column.store, self.column.store.manifest
        self.sync()
        shards = range(m.shards - 1, -1, -1)
        left_out = []
        for shard in tqdm(shards, desc="store", unit="shard", disable=bar_disabled(show=m.shards > 50)):
            if not layout.codes_file(store.folder, self.column.name, shard).with_suffix(".json").exists():
                codes = self._codes(shard)
                if codes is None:
                    left_out.append(shard)
                else:
                    write_codes(store.folder, m, shard, codes, column=self.column.name, digest=self.column.digest)
            os.ftruncate(self._file, shard * self._shard_bytes)  # frees the space of each shard at once
        files.remove_leftovers(self.column.folder, seconds=0)  # of killed processes; no other process writes here
        for name in (_WORK, _JOURNAL):
            (self.column.folder / name).unlink(missing_ok=True)
        files.sync_folder(self.column.folder)
        self.column = Store(store.folder).column(self.column.name)
        return left_out

    def close(self) -> None:
        """Releases the lock of the column."""
        os.close(self._file)

    def _write(self, data: bytes, place: int) -> None:
        """Writes a block. Raises OSError, with the file's name, if the disk is full or fails."""
        with files.annotate_oserror(self.column.folder / _WORK):
            if os.pwrite(self._file, data, place) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _codes(self, shard: int) -> UInt8Array | None:
        """Returns the codes of a shard, uint8 [rows, C, code_size]; None if a block is missing or altered."""
        store, m, size = self.column.store, self.column.store.manifest, self.column.meta.code_size
        rows = m.shard_rows(shard)
        units = self._blocks * len(rows)
        length, payload = units * self._unit, self._unit - _CHECKSUM.itemsize
        found = np.zeros(length, dtype=np.uint8)
        with os.fdopen(os.dup(self._file), "rb", buffering=0) as file:
            file.seek(shard * self._shard_bytes)
            view, done = found.data, 0
            while done < length and (count := file.readinto(view[done:])):
                done += count
        starts = range(0, length, self._unit)
        checksums = [zlib.crc32(view[start : start + payload], number) for number, start in enumerate(starts)]
        written = found.reshape(units, self._unit)
        intact = written[:, payload:].copy().view(_CHECKSUM)[:, 0] == np.array(checksums, dtype=_CHECKSUM)
        intact = intact.reshape(self._blocks, len(rows))
        intact[:, np.array(store.skipped(shard), dtype=np.int64) - rows.start] = True  # no batch had these images
        if not intact.all():
            return None
        by_row = written[:, :payload].reshape(self._blocks, len(rows), self._block, size).swapaxes(0, 1)
        return np.ascontiguousarray(by_row).reshape(len(rows), m.crops_per_image, size)

    def _read_journal(self) -> int:
        """Returns the number of crops recorded before. Empties the work file if it has no journal."""
        path = self.column.folder / _JOURNAL
        if not path.exists():
            os.ftruncate(self._file, 0)
            return 0
        values = files.read_json(path)
        expected = {"column": self.column.digest, "block": self._block}
        crops = values.pop("crops", None)
        if values != expected or type(crops) is not int or crops < 0:
            raise StoreError(
                f"{path}: the journal of another recording (of other crops_per_image, or of a column that was replaced): "
                f"continue that run, or delete this file and {_WORK} to discard what it recorded"
            )
        return crops


def recorded_bytes(folder: Path) -> int:
    """Returns the bytes that the recording of a column takes on disk. Its file is sparse."""
    path = folder / _WORK
    return 512 * path.stat().st_blocks if path.exists() else 0


def has_targets(column: Column) -> bool:
    """Whether a column has targets, or precompute has begun them, and no training is recording it."""
    some = any(column.folder.glob(".work-codes-*")) or len(column.missing_shards) < column.store.manifest.shards
    return some and not (column.folder / _JOURNAL).exists()


def require_not_recording(column: Column) -> None:
    """Raises RequestError if a training is recording the column, or was stopped before it finished."""
    work, journal = column.folder / _WORK, column.folder / _JOURNAL
    if not os.path.lexists(work) and not os.path.lexists(journal):
        return
    os.close(_acquire(column))
    if os.path.lexists(journal):
        raise RequestError(
            f"{column.folder}: a training that records this column was stopped: run the same fkd-ssl train command again to "
            f"finish it, precompute another --column, or delete {_WORK} and {_JOURNAL} there to discard what it recorded"
        )
    work.unlink()  # left by a training that was killed before its first checkpoint


def _acquire(column: Column) -> int:
    """Opens and locks the work file of a column's recording. Raises RequestError if another process has locked it."""
    path = column.folder / _WORK
    while True:
        file = files.open_descriptor(path, os.O_RDWR | os.O_CREAT)
        ours = locks.try_lock(file, seconds=locks.PATIENCE)
        if ours and path.exists() and os.path.samestat(path.stat(), os.fstat(file)):
            return file
        os.close(file)
        if not ours:
            raise RequestError(f"{column.folder}: another process is recording this column; wait for it, or stop it")
