"""Work files: the finished part of a shard or of a codec's sample, with a journal, so that a killed run can continue."""

import hashlib
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fkd_ssl import files, locks
from fkd_ssl.errors import StoreError

SECONDS_BETWEEN_JOURNALS = 15.0
_PIECE = 2**20


class WorkFile:
    """A file of fixed-size records, one per crop, that is being written.

    Attributes:
        crops: Number of crops that are done.
        checksums: sha256 of each row's image. The caller appends it before it adds the last crop of the row.
    """

    def __init__(self, file: BinaryIO, path: Path, owner: str, *, unit: int, crops: int, per_row: int) -> None:
        self._file = file
        self._path = path
        self._journal = _journal(path)
        self._owner = owner
        self._unit = unit
        self._written = time.monotonic()
        self._digest = hashlib.sha256()
        self.crops, self.checksums = 0, list[str]()
        self._resume(crops, per_row)

    def add(self, array: npt.NDArray[Any]) -> None:
        """Appends a chunk, an array with one row per crop. Saves from time to time."""
        data = array.tobytes()
        with files.annotate_oserror(self._path):
            self._file.write(data)
        self._digest.update(data)
        self.crops += len(array)
        if time.monotonic() - self._written > SECONDS_BETWEEN_JOURNALS:
            self.save()

    def save(self) -> None:
        """Saves the records so that they survive a kill: syncs the bytes, then counts them in the journal."""
        with files.annotate_oserror(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        values = {
            "crops": self.crops,
            "codes": self._digest.hexdigest(),
            "images": self.checksums[:],  # another thread may append to it
            "column": self._owner,
        }
        files.replace(self._journal, files.with_checksum(values))
        self._written = time.monotonic()

    def read(self) -> bytes:
        """Returns all records."""
        return b"".join(self._pieces())

    def finish(self, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
        """Writes the records as the .npy array `path`; returns the file's sha256."""
        assert self.crops * self._unit == math.prod(shape) * dtype.itemsize
        header = files.npy_header(dtype, shape)
        digest = hashlib.sha256(header)
        with files.create(path) as out:
            out.write(header)
            for piece in self._pieces():
                digest.update(piece)
                out.write(piece)
        return digest.hexdigest()

    def _pieces(self) -> Iterator[bytes]:
        """Yields the file in pieces. Raises StoreError at its end if its contents are not those that this process wrote."""
        self._file.seek(0)
        digest = hashlib.sha256()
        while piece := self._file.read(_PIECE):
            digest.update(piece)
            yield piece
        if digest.digest() != self._digest.digest():  # happens on a file system without locks, or a failing disk
            raise StoreError(
                f"{self._path}: its content differs from what was written: another process writes it too, or the "
                "disk fails; repeat the command"
            )

    def restart(self) -> None:
        """Discards all crops."""
        self._digest = hashlib.sha256()
        self.crops, self.checksums = 0, []
        self._file.truncate(0)
        self._file.seek(0)

    def _resume(self, most: int, per_row: int) -> None:
        """Continues from the journal if it is valid and matches the file. Otherwise starts from the beginning."""
        try:
            values = files.read_json(self._journal)
            crops, checksums = values["crops"], values["images"]
            if type(crops) is not int or not 0 <= crops <= most:
                raise ValueError("impossible number of crops")
            if not isinstance(checksums, list) or not all(isinstance(checksum, str) for checksum in checksums):
                raise TypeError("not a list of checksums")
            if per_row and len(checksums) < crops // per_row:
                raise ValueError("checksums are missing")
            size = crops * self._unit
            self._file.seek(0)
            left = size
            while left > 0 and (piece := self._file.read(min(_PIECE, left))):
                self._digest.update(piece)
                left -= len(piece)
            fits = values["column"] == self._owner and left == 0 and self._digest.hexdigest() == values["codes"]
        except (StoreError, KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            self.restart()
            return
        self.crops, self.checksums = crops, checksums
        self._file.truncate(size)
        self._file.seek(size)


def shard_file(codes: Path) -> Path:
    """Returns the work file of the shard that becomes `codes`."""
    return codes.with_name(f".work-{codes.stem}")


@contextmanager
def open_work(path: Path, owner: str, *, unit: int, crops: int, per_row: int = 0) -> Iterator[WorkFile | None]:
    """Opens the work file `path` and removes it if the block ends without an error. Yields None if another process has it.

    The file is locked (flock) while it is open, and the kernel releases the lock when the process ends. On a file system
    without locks, two processes may do the same work, and write the same bytes.

    Args:
        path: The work file; its journal is in the same folder.
        owner: Identifies the work. Existing work of another owner is discarded.
        unit: Bytes per crop.
        crops: Total number of crops.
        per_row: Number of crops per row, each row with a checksum; 0 if no checksums are kept.
    """
    file = os.fdopen(files.open_descriptor(path, os.O_RDWR | os.O_CREAT), "r+b")
    try:
        if not locks.try_lock(file.fileno()):
            yield None
            return
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            yield None  # finished and removed by another process between our open and our lock
            return
        progress = WorkFile(file, path, owner, unit=unit, crops=crops, per_row=per_row)
        try:
            yield progress
        except BaseException:
            with suppress(OSError):  # the disk may have failed
                progress.save()
            raise
        path.unlink(missing_ok=True)
        _journal(path).unlink(missing_ok=True)
    finally:
        with files.annotate_oserror(path):  # closing writes the rest of the buffer
            file.close()


def clear(path: Path) -> None:
    """Removes the work file of finished work, left by a killed process. Keeps it if it is locked."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        if locks.try_lock(file.fileno()):
            path.unlink(missing_ok=True)
            _journal(path).unlink(missing_ok=True)


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
