"""Memory of batches, used again once a batch is gone.

A batch of crops is tens of megabytes. To get them from the system anew, page by page, costs a worker process a good part
of what decoding costs. So each process keeps its blocks, and a block is free again when the last tensor or array that shows
it is gone, also in a process that it was sent to. A block's last byte says whether it is taken: both processes see it.
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
_FREE, _TAKEN = 0, 1
_MOST = 16  # blocks that a process keeps; more than a DataLoader has on the way only where the batches are all kept


class _Loan:
    """A block in the hands of this process, until the array that shows it is gone."""

    def __init__(self, block: Tensor) -> None:
        self.block = block
        self.sent = False
        self._process = os.getpid()

    def end(self) -> None:
        if not self.sent and self._process == os.getpid():  # a forked process has copies of our objects and owns no block
            self.block[-1] = _FREE


class _Pool:
    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.process = os.getpid()
        self.lock = threading.Lock()


_pool = _Pool()
_loans: weakref.WeakValueDictionary[int, _Loan] = weakref.WeakValueDictionary()  # by address


def new(*shape: int) -> Tensor:
    """An uninitialised uint8 tensor; in a DataLoader's worker in shared memory, where its parent reads it without a copy."""
    return _lent(_taken(math.prod(shape)), math.prod(shape)).view(shape)


def to_send(value: Any) -> Any:
    """What a worker sends for a batch or a part of it: all its tensors in shared memory, those of `new` as their blocks.

    The queue would share the other tensors too, but in a thread of its own, which prints an error and sends nothing.

    Raises:
        FkdError: A tensor does not fit into shared memory.
    """
    if isinstance(value, Tensor):
        loan = _loans.get(value.data_ptr())
        if loan is not None:
            return _Sent(loan, value)
        try:
            return value.share_memory_()
        except RuntimeError as error:
            raise too_small(value.untyped_storage().nbytes(), error) from error
    if isinstance(value, dict):
        return {key: to_send(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_send, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: to_send(getattr(value, field.name)) for field in fields(value)})
    return value


class _Sent:
    """A tensor on its way to another process, where it is unpickled as the tensor that it was."""

    def __init__(self, loan: _Loan, tensor: Tensor) -> None:
        loan.sent = True
        self._parts = loan.block, tuple(tensor.shape), tensor.stride()

    def __reduce__(self) -> Any:
        return _received, self._parts


def _received(block: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return _lent(block, math.prod(shape)).as_strided(shape, stride)


def _lent(block: Tensor, size: int) -> Tensor:
    """The first bytes of a block. Whatever shows them keeps one array alive, and the block is free when that is gone."""
    array = block.numpy()[:size]
    loan = _Loan(block)
    weakref.finalize(array, loan.end).atexit = False
    tensor = torch.from_numpy(array)
    _loans[tensor.data_ptr()] = loan
    return tensor


def _taken(size: int) -> Tensor:
    """A block of so many bytes or some more, and one."""
    global _pool
    if _pool.process != os.getpid():  # forked: these blocks are the parent's
        _pool = _Pool()
    step = 1 << max(0, size.bit_length() - 3)
    length = -(-size // step) * step + 1  # sizes that differ little share blocks; what is never written takes no memory
    with _pool.lock:
        for block in _pool.blocks:
            if len(block) == length and block[-1] == _FREE:
                block[-1] = _TAKEN
                return block
        block = _allocated(length)
        block[-1] = _TAKEN
        _pool.blocks = [other for other in _pool.blocks if len(other) == length or other[-1] == _TAKEN]
        if len(_pool.blocks) < _MOST:
            _pool.blocks.append(block)
        return block


def _allocated(length: int) -> Tensor:
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(length, dtype=np.uint8))  # NumPy asks for huge pages, which torch does not
    # what torch's own default_collate does in a worker; there is no public name for it
    try:
        storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(length)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise too_small(length, error) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def too_small(size: int, error: RuntimeError) -> FkdError:
    """The error for `size` bytes that shared memory has no room for."""
    reason = str(error).splitlines()[0]
    if SHARED.is_dir():
        total, _, free = shutil.disk_usage(SHARED)
        reason = f"{SHARED} has {format_bytes(free)} of its {format_bytes(total)} free"
    return FkdError(
        f"a batch of {format_bytes(size)} does not fit into shared memory: {reason}; enlarge it (docker run --shm-size=2g), or "
        "use fewer --workers, or --workers 0"
    )
