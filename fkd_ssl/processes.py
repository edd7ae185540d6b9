"""The rank of this process, and how to end it with its parent."""

import ctypes
import os
import signal
import sys
import threading
import time

from fkd_ssl.errors import RequestError

PARENT = "FKD_SSL_PARENT"
"""Environment variable with the process id of the parent: the command ends when the parent does."""
_PR_SET_PDEATHSIG = 1


def rank() -> tuple[int, int]:
    """Returns the rank and the number of processes, as set by torchrun or Lightning; (0, 1) without them.

    Raises:
        RequestError: RANK, LOCAL_RANK or WORLD_SIZE is not a number.
    """
    key = "RANK" if os.environ.get("RANK") else "LOCAL_RANK"  # Lightning sets only LOCAL_RANK
    return number(key, 0), number("WORLD_SIZE", 1)


def number(key: str, default: int) -> int:
    """Returns the number in an environment variable; raises RequestError if it holds something else."""
    value = os.environ.get(key) or str(default)
    if not value.isdecimal():
        raise RequestError(f"{key}={value!r}: must be a number; torchrun sets it, otherwise unset it")
    return int(value)


def end_with_parent(parent: int | None = None) -> None:
    """Makes the system kill this process when its parent ends, also if the parent is killed.

    Args:
        parent: The parent's process id, for a parent that may already have ended. Default: the current parent.
    """
    parent = os.getppid() if parent is None else parent
    if not (sys.platform == "linux" and ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0):
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    _check(parent)


def _watch(parent: int) -> None:
    while True:
        time.sleep(1)
        _check(parent)


def _check(parent: int) -> None:
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
