"""Progress within a shard: codes written so far, and a journal that says how many of them count."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fkd_ssl import files
from fkd_ssl.errors import StoreError
from fkd_ssl.store.codecs import UInt8Array

SECONDS_BETWEEN_JOURNALS = 15.0


class Progress:
    """The codes of a shard that is being written.

    Attributes:
        crops: How many crops are done.
        checksums: sha256 of the image of each row that was read, the caller appends; at least those of all whole rows.
    """

    def __init__(self, file: BinaryIO, journal: Path, column: str) -> None:
        self._file = file
        self._journal = journal
        self._column = column
        self._written = time.monotonic()
        self.crops, self.checksums = self._resume()

    def add(self, codes: UInt8Array) -> None:
        """Appends the codes uint8 [n, code_size] of a chunk; now and then all that was added is made safe."""
        self._file.write(codes.tobytes())
        self.crops += len(codes)
        if time.monotonic() - self._written > SECONDS_BETWEEN_JOURNALS:
            self.save()

    def save(self) -> None:
        """Makes what was added survive a kill: the codes are synced before the journal counts them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        values = {
            "bytes": size,
            "crops": self.crops,
            "codes": self._digest(size),
            "images": self.checksums,
            "column": self._column,
        }
        signed = {**values, "sha256": files.sha256(files.canonical(values))}
        files.replace(self._journal, files.canonical(signed))
        self._written = time.monotonic()

    def publish(self, path: Path, header: bytes) -> str:
        """Publishes the codes behind a .npy header as `path`; returns the file's sha256."""
        self._file.seek(0)
        body = self._file.read()
        with files.publish(path) as out:
            out.write(header)
            out.write(body)
        return files.sha256(header + body)

    def _digest(self, size: int) -> str:
        self._file.seek(0)
        digest = files.sha256(self._file.read(size))
        self._file.seek(size)
        return digest

    def _resume(self) -> tuple[int, list[str]]:
        """What the journal counts, if the codes are what it says; otherwise the shard starts anew."""
        try:
            values = files.read_json(self._journal)
            size, crops, checksums = int(values["bytes"]), int(values["crops"]), list(values["images"])
            fits = values["column"] == self._column and self._digest(size) == values["codes"]
        except (StoreError, KeyError, TypeError, ValueError):
            size, crops, checksums, fits = 0, 0, [], False
        if not fits:
            size, crops, checksums = 0, 0, []
        self._file.truncate(size)
        self._file.seek(size)
        return crops, checksums


@contextmanager
def open_shard(codes: Path, column: str) -> Iterator[Progress | None]:
    """The progress of the shard that will be published as `codes`; None if another process is writing it.

    The work file is locked (flock) while it is open, and the lock goes with the process. Where the file system has no
    locks two processes may do the same work; both would publish the same bytes.
    """
    path = codes.with_name(f".work-{codes.stem}")
    journal = codes.with_name(f".work-{codes.stem}.json")
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        except OSError:
            pass
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            yield None  # finished and removed by another process between our open and our lock
            return
        progress = Progress(file, journal, column)
        try:
            yield progress
        except BaseException:
            with suppress(OSError):  # the disk may be what failed
                progress.save()
            raise
        path.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
