"""Memory of batches, used again once a batch is gone.

A batch of crops is tens of megabytes. To get them from the system anew, page by page, costs a worker process a good part
of what decoding costs. So each process keeps its blocks, and a block is free again when the last tensor or array that shows
it is gone, also in a process that it was sent to. A block's last byte says whether it is taken: both processes see it.
"""

import math
import os
import threading
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from fkd_ssl.crops.device import CropPlan

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
    """What a worker gives its DataLoader for a value of a batch: a tensor of `new` goes as its block, all else as it is."""
    if isinstance(value, CropPlan):
        return replace(value, sources=to_send(value.sources))
    if get_worker_info() is None or not isinstance(value, Tensor):
        return value
    loan = _loans.get(value.data_ptr())
    return value if loan is None else _Sent(loan, value)


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
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(length)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage)
