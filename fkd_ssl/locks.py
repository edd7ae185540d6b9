"""Locks between processes (flock). The kernel releases them when a process ends, also if it is killed.

On a file system without locks, every attempt to lock succeeds.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 5.0
"""Seconds to wait for the lock of a process that was just killed: one with much memory or a GPU takes a while to end."""
_held: dict[Path, int] = {}


def share(descriptor: int) -> None:
    """Waits until no process has locked an open file; no process can lock it until the descriptor and its copies are closed."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def try_lock(descriptor: int, *, seconds: float = 0.0) -> bool:
    """Tries for up to `seconds` to lock an open file; returns whether this process has the lock."""
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
    """Tries to lock the file `path` until the block ends; yields whether this process has the lock.

    Creates the file if it is missing, and removes it at the end of the block.
    """
    end = time.monotonic() + seconds
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        if not try_lock(descriptor, seconds=end - time.monotonic()):
            os.close(descriptor)
            yield False
            return
        if is_named(descriptor, path):
            break
        os.close(descriptor)  # the previous holder removed the file between our open and our lock
    _held[path] = descriptor
    try:
        yield True
    finally:
        if _held.pop(path, None) is not None:  # a forked process has already closed it
            if is_named(descriptor, path):
                with suppress(OSError):
                    path.unlink()
            os.close(descriptor)


def is_lost(path: Path) -> bool:
    """Whether the lock file `path`, which this process holds, was removed or replaced."""
    return path in _held and not is_named(_held[path], path)


def is_named(descriptor: int, path: Path) -> bool:
    """Whether `path` still names this open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """Closes the lock files in a forked process, which would otherwise hold the locks after its parent is killed."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
