"""Writes the targets that online teachers compute to a store while the student trains on them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from fkd_ssl.data import Batch
from fkd_ssl.store.write.recording import Recording
from fkd_ssl.training.targets import OnlineTargets


class RecordingTargets(OnlineTargets):
    """Computes targets for every batch; the first process writes those of all processes to a store.

    A batch is written when the next one is computed: by then the GPU has finished it, so that nothing waits.

    Args:
        recordings: One per teacher, None if its targets are already stored; empty in all processes except the first.
        embeds: The teachers.
    """

    def __init__(self, recordings: Sequence[Recording | None], *embeds: Callable[[Tensor], Tensor]) -> None:
        super().__init__(*embeds)
        self.recordings = recordings
        self._given: list[Tensor] = []
        self._ready: Any = None

    def __call__(self, batch: Batch) -> list[Tensor]:
        """Computes the targets of a batch of RecordingCrops."""
        self.write()
        targets = super().__call__(batch)
        given = [all_gather(tensor) for tensor in (batch["places"], *targets)]
        if self.recordings:
            self._given = [to_cpu_async(tensor) for tensor in given]
            self._ready = torch.cuda.Event() if targets[0].is_cuda else None  # type: ignore[no-untyped-call]
            if self._ready is not None:
                self._ready.record()
        return targets

    def write(self) -> None:
        """Writes the targets of the last batch."""
        if not self._given:
            return
        if self._ready is not None:
            self._ready.synchronize()
        places, *targets = (tensor.numpy() for tensor in self._given)
        self._given = []
        for recording, of_teacher in zip(self.recordings, targets, strict=True):
            if recording is not None:
                recording.add(places, np.ascontiguousarray(of_teacher, dtype=np.float32))


class RecordingCallback(pl.Callback):
    """Syncs the recorded targets to disk before each checkpoint that relies on them."""

    def __init__(self, targets: RecordingTargets, crops_per_step: int) -> None:
        self.targets = targets
        self.crops_per_step = crops_per_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises FkdError if the store lacks targets that this run recorded before its checkpoint."""
        for recording in filter(None, self.targets.recordings):
            recording.resume(trainer.global_step * self.crops_per_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes and syncs the targets so far."""
        self.targets.write()
        for recording in filter(None, self.targets.recordings):
            recording.sync()


def all_gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes, concatenated."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def to_cpu_async(tensor: Tensor) -> Tensor:
    """Copies a tensor to CPU memory; a copy from a GPU is complete only after a synchronisation."""
    tensor = tensor.detach()
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
