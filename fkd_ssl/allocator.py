"""Makes glibc keep freed memory, since each batch allocates blocks of the same sizes again.

By default, glibc returns large blocks to the system as soon as they are freed. The system then has to clear every page again,
which can take more than half of the processor time of a network on a CPU.
"""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_LARGE = 1 << 30  # bytes; such blocks are large tables, which are allocated once


def keep_freed_memory() -> None:
    """Makes this process, and those that it forks, keep freed blocks of less than 1 GiB for later allocations.

    Does nothing without glibc, or if the user has chosen settings of glibc: a variable MALLOC_..., or GLIBC_TUNABLES. It has
    no effect if another allocator is preloaded.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, -1)
        if not mallopt(_M_MMAP_THRESHOLD, _LARGE):  # glibc before 2.35 allows 32 MiB at most
            mallopt(_M_MMAP_MAX, 0)
