"""Memory blocks for batches, which are reused when a batch is freed.

A batch of crops takes tens of megabytes, and allocating new pages for it takes a large part of the time of decoding. So each
process keeps its blocks. A block is free again when the last tensor or array that uses it is freed, also in a process that it
was sent to: the last byte of the block, which both processes share, tells whether it is in use.
"""

import math
import os
import shutil
import threading
import weakref
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from fkd_ssl.errors import FkdError
from fkd_ssl.text import format_bytes

SHARED = Path("/dev/shm")  # noqa: S108
_FREE, _IN_USE = 0, 1
_MAX_BLOCKS = 16  # per process; a DataLoader has fewer in use, unless the user keeps all batches


class _Lease:
    """The use of a block by this process. It ends when the array that views the block is freed."""

    def __init__(self, block: Tensor) -> None:
        self.block = block
        self.sent: _SharedTensor | None = None
        self._process = os.getpid()

    def send(self, tensor: Tensor) -> "_SharedTensor":
        """Returns the same object for a tensor that occurs twice in a batch, so that its receiver has it as one tensor."""
        if self.sent is None or self.sent.layout != (tuple(tensor.shape), tensor.stride()):
            self.sent = _SharedTensor(self.block, tensor)
        return self.sent

    def end(self) -> None:
        if self.sent is None and self._process == os.getpid():  # in a forked process, the blocks belong to the parent
            self.block[-1] = _FREE


class _Pool:
    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.process = os.getpid()
        self.lock = threading.Lock()


_pool = _Pool()
_leases: weakref.WeakValueDictionary[int, _Lease] = weakref.WeakValueDictionary()  # by address


def empty(*shape: int) -> Tensor:
    """Returns an uninitialised uint8 tensor; in a DataLoader worker in shared memory, so that the parent needs no copy.

    Raises:
        FkdError: There is not enough shared memory.
    """
    size = math.prod(shape)
    return _tensor(_acquire(size), size).view(shape)


def share(value: Any) -> Any:
    """Moves all tensors of a batch, or of a part of it, to shared memory before a worker sends them.

    Tensors of `empty` are sent as their blocks. The queue would also share other tensors, but in a thread, which only prints
    an error and sends nothing.

    Raises:
        FkdError: There is not enough shared memory.
    """
    if isinstance(value, Tensor):
        lease = _leases.get(value.data_ptr())
        if lease is not None:
            return lease.send(value)
        try:
            return value.share_memory_()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise _no_room(value.untyped_storage().nbytes(), error) from error
    if isinstance(value, dict):
        return {key: share(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(share, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: share(getattr(value, field.name)) for field in fields(value)})
    return value


class _SharedTensor:
    """A tensor of `empty` that is sent to another process, where it is unpickled as a tensor of the same block."""

    def __init__(self, block: Tensor, tensor: Tensor) -> None:
        self._block = block
        self.layout = tuple(tensor.shape), tensor.stride()

    def __reduce__(self) -> Any:
        return _rebuild, (self._block, *self.layout)


def _rebuild(block: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return _tensor(block, math.prod(shape)).as_strided(shape, stride)


def _tensor(block: Tensor, size: int) -> Tensor:
    """Returns the first bytes of a block. All views of them keep one array alive, and the lease ends when it is freed."""
    array = block.numpy()[:size]
    lease = _Lease(block)
    weakref.finalize(array, lease.end).atexit = False
    tensor = torch.from_numpy(array)
    _leases[tensor.data_ptr()] = lease
    return tensor


def _acquire(size: int) -> Tensor:
    """Returns a block of at least `size` bytes, plus the byte that tells whether it is in use."""
    global _pool
    if _pool.process != os.getpid():  # forked: these blocks belong to the parent
        _pool = _Pool()
    step = 1 << max(0, size.bit_length() - 3)
    length = -(-size // step) * step + 1  # similar sizes share blocks; pages that are never written take no memory
    with _pool.lock:
        for block in _pool.blocks:
            if len(block) == length and block[-1] == _FREE:
                block[-1] = _IN_USE
                return block
        block = _allocate(length)
        block[-1] = _IN_USE
        _pool.blocks = [other for other in _pool.blocks if len(other) == length or other[-1] == _IN_USE]
        if len(_pool.blocks) < _MAX_BLOCKS:
            _pool.blocks.append(block)
        return block


def _allocate(length: int) -> Tensor:
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(length, dtype=np.uint8))  # NumPy asks for huge pages, which torch does not
    try:
        # as torch's default_collate does in a worker; it has no public name
        storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(length)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise _no_room(length, error) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _no_room(size: int, error: RuntimeError) -> FkdError:
    """Returns the error for a tensor of `size` bytes that does not fit into shared memory."""
    reason = str(error).splitlines()[0]
    if SHARED.is_dir():
        total, _, free = shutil.disk_usage(SHARED)
        reason = f"it needs {format_bytes(size)}, and {SHARED} has {format_bytes(free)} of its {format_bytes(total)} free"
    return FkdError(
        f"a batch does not fit into shared memory: {reason}; enlarge it (docker run --shm-size=2g), or use fewer --workers, or "
        "--workers 0"
    )
