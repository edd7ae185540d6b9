"""Unfinished work: what a teacher has said so far of a shard (or of the codec's sample), and a journal of what counts."""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from fkd_ssl import files, locks
from fkd_ssl.errors import StoreError

SECONDS_BETWEEN_JOURNALS = 15.0
_PIECE = 2**20


class Progress:
    """Rows of bytes, one a crop, that are being written.

    Attributes:
        crops: How many crops are done.
        checksums: sha256 of the image of each row that was read, the caller appends; at least those of all whole rows.
    """

    def __init__(self, file: BinaryIO, path: Path, owner: str) -> None:
        self._file = file
        self._path = path
        self._journal = _journal(path)
        self._owner = owner
        self._written = time.monotonic()
        self.crops, self.checksums = self._resume()

    def add(self, array: npt.NDArray[Any]) -> None:
        """Appends a chunk, an array of one row a crop; now and then all that was added is made safe."""
        data = array.tobytes()
        with files.naming(self._path):
            self._file.write(data)
        self._digest.update(data)
        self.crops += len(array)
        if time.monotonic() - self._written > SECONDS_BETWEEN_JOURNALS:
            self.save()

    def save(self) -> None:
        """Makes what was added survive a kill: the bytes are synced before the journal counts them."""
        with files.naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        values = {
            "bytes": self._file.tell(),
            "crops": self.crops,
            "codes": self._digest.hexdigest(),
            "images": self.checksums,
            "column": self._owner,
        }
        files.replace(self._journal, files.signed(values))
        self._written = time.monotonic()

    def read(self) -> bytes:
        """All that was added."""
        return b"".join(self._pieces())

    def publish(self, path: Path, header: bytes) -> str:
        """Publishes what was added behind a .npy header as `path`; returns the file's sha256."""
        digest = hashlib.sha256(header)
        with files.publish(path) as out:
            out.write(header)
            for piece in self._pieces():
                digest.update(piece)
                out.write(piece)
        return digest.hexdigest()

    def _pieces(self) -> Iterator[bytes]:
        """The file from its start; raises StoreError at its end if it does not hold what this process wrote."""
        self._file.seek(0)
        digest = hashlib.sha256()
        while piece := self._file.read(_PIECE):
            digest.update(piece)
            yield piece
        if digest.digest() != self._digest.digest():  # on a file system without locks, or a failing disk
            raise StoreError(
                f"{self._path}: holds other bytes than were written to it: another process writes it "
                "too, or the disk fails; run the same command again"
            )

    def _resume(self) -> tuple[int, list[str]]:
        """What the journal counts, if the bytes are what it says; otherwise all starts anew."""
        self._digest = hashlib.sha256()
        try:
            values = files.read_json(self._journal)
            size, crops, checksums = int(values["bytes"]), int(values["crops"]), list(values["images"])
            self._file.seek(0)
            left = size
            while left > 0 and (piece := self._file.read(min(_PIECE, left))):
                self._digest.update(piece)
                left -= len(piece)
            fits = values["column"] == self._owner and left == 0 and self._digest.hexdigest() == values["codes"]
        except (StoreError, KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            size, crops, checksums = 0, 0, []
            self._digest = hashlib.sha256()
        self._file.truncate(size)
        self._file.seek(size)
        return crops, checksums


def shard_file(codes: Path) -> Path:
    """The work file of the shard that will be published as `codes`."""
    return codes.with_name(f".work-{codes.stem}")


@contextmanager
def open_work(path: Path, owner: str) -> Iterator[Progress | None]:
    """The progress kept in `path`, which goes when the block ends well; None if another process is writing it.

    The work file is locked (flock) while it is open, and the lock goes with the process. Where the file system has no
    locks two processes may do the same work; both would publish the same bytes.

    Args:
        path: The work file; its journal lies beside it.
        owner: What the work belongs to: progress of another owner does not count.
    """
    file = os.fdopen(files.plain_descriptor(path, os.O_RDWR | os.O_CREAT), "r+b")
    try:
        if not locks.try_lock(file.fileno()):
            yield None
            return
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            yield None  # finished and removed by another process between our open and our lock
            return
        progress = Progress(file, path, owner)
        try:
            yield progress
        except BaseException:
            with suppress(OSError):  # the disk may be what failed
                progress.save()
            raise
        path.unlink(missing_ok=True)
        _journal(path).unlink(missing_ok=True)
    finally:
        with files.naming(path):  # it may have to write what is left in its buffer
            file.close()


def clear(path: Path) -> None:
    """Removes a work file whose work is published, if no process holds it: one was killed before it could."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        if locks.try_lock(file.fileno()):
            path.unlink(missing_ok=True)
            _journal(path).unlink(missing_ok=True)


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
