"""Locks between processes. The kernel holds them (flock) and drops them when a process ends, however it ends.

On a file system without locks every attempt succeeds.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 5.0
"""Seconds to wait for the lock of a process that was just killed: with gigabytes or a GPU its end takes a while."""
_held: dict[Path, int] = {}


def try_lock(descriptor: int, *, seconds: float = 0.0) -> bool:
    """Locks an open file, which another process may hold for `seconds` more; returns whether this process has it now."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return True
        else:
            return True


@contextmanager
def locked(path: Path, *, seconds: float = 0.0) -> Iterator[bool]:
    """Locks the file `path` until the block ends, and yields whether this process has the lock.

    The file is made if it is missing, and removed by the process that held it.
    """
    end = time.monotonic() + seconds
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        if not try_lock(descriptor, seconds=end - time.monotonic()):
            os.close(descriptor)
            yield False
            return
        if _is_named(descriptor, path):
            break
        os.close(descriptor)  # the last process that held it removed it between our open and our lock
    _held[path] = descriptor
    try:
        yield True
    finally:
        if _held.pop(path, None) is not None:  # a forked process has closed it already
            if _is_named(descriptor, path):
                with suppress(OSError):
                    path.unlink()
            os.close(descriptor)


def is_lost(path: Path) -> bool:
    """Whether the lock file that this process holds as `path` was removed, or replaced by another."""
    return path in _held and not _is_named(_held[path], path)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that stands in the folder under its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """Closes the locks in a forked process, which would otherwise keep them when this one is killed."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
