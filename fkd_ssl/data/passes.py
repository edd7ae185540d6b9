"""Counts how often each image was read, so that a plain DataLoader reads different crops in each epoch."""

import mmap

import torch
from torch import Tensor, distributed

from fkd_ssl.errors import RequestError


class PassCounter:
    """The next pass of each image, in memory that a DataLoader shares with its workers.

    Anonymous memory stays shared with forked workers and needs no room in /dev/shm. If workers are spawned, torch moves the
    tensor to shared memory when it sends it.

    Args:
        length: Number of images.
    """

    def __init__(self, length: int) -> None:
        self._state = _shared(torch.zeros(length + 1, dtype=torch.int32))  # passes, and whether `set` was called
        self._parent_distributed = False

    def next(self, i: int) -> int:
        """Returns the next pass of image `i`, and counts it.

        Raises:
            RequestError: A process of distributed training reads an image again without `set`, although other processes may
                have read it in between.
        """
        pass_ = int(self._state[i])
        if pass_ and not self._state[-1] and (self._parent_distributed or _distributed()):
            raise RequestError(
                "several processes train, and each would read the same crops: call data.set_epoch(epoch) at the start of each "
                "epoch"
            )
        self._state[i] += 1
        return pass_

    def set(self, pass_: int) -> None:
        """Sets the next pass of all images."""
        self._state[:-1] = pass_
        self._state[-1] = 1

    def __getstate__(self) -> tuple[Tensor, bool]:
        return self._state, self._parent_distributed or _distributed()

    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self._state, self._parent_distributed = state
        if not self._state.is_shared():  # type: ignore[no-untyped-call]  # a copy in this process, not in a worker
            self._state = _shared(self._state)


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _shared(values: Tensor) -> Tensor:
    """Returns a copy of an int32 tensor in memory that forked processes share."""
    return torch.frombuffer(mmap.mmap(-1, values.nbytes), dtype=torch.int32).copy_(values)
