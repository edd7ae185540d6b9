"""The base class of training modules for students and teachers: a Lightning module that keeps its last loss."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from fkd_ssl.data import Batch
from fkd_ssl.errors import FkdError


class TrainingModule(pl.LightningModule):
    """Base class of a network in training.

    Args:
        steps: Number of optimiser steps of the training.
        seed: Seed of the run.

    Attributes:
        last_loss: The loss of the last batch.
        last_floor: The smallest loss that the targets of the last batch allow; None if the method has no such bound.
        saved: Text that names the last checkpoint.
        advice: Advice for the error message if the training diverges.
        unused_parameters: Whether some parameters may get no gradient.
    """

    advice = "choose a smaller --lr and another --out"

    def __init__(self, steps: int, seed: int) -> None:
        super().__init__()
        self.steps = steps
        self.seed = seed
        self.last_loss = torch.zeros(())
        self.last_floor: Tensor | None = None
        self.saved = "there is no earlier checkpoint"
        self.unused_parameters = False

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds torch with seed, step and rank, so that a resumed training draws the same dropout, drop path and mixing."""
        text = f"{self.seed} {batch_idx} {self.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little"))

    def require_finite(self, step: int) -> None:
        """Raises FkdError in all processes if the last loss of any of them is not finite, since the training has diverged."""
        loss = self.last_loss
        if self.trainer.world_size > 1:
            loss = self.trainer.strategy.reduce(loss.clone(), reduce_op="mean")
        if not torch.isfinite(loss):
            raise FkdError(f"step {step}: the loss is {loss.item()}: the training has diverged; {self.saved}; {self.advice}")

    @staticmethod
    def by_steps(optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> Any:
        """Returns, in Lightning's format, the optimiser and a schedule that multiplies its learning rate by `factor(step)`."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cosine(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate at a step: linear up to 1 over `warmup` steps, then a cosine to almost 0.

    Loshchilov and Hutter, ICLR 2017 (arXiv 1608.03983), eq. 5, without restarts. torch's schedulers are not used, since they
    multiply from step to step and so differ in the last bits.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def linear(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate at a step: linear up to 1 over `warmup` steps, then linear down to almost 0.

    The code of S2-BNN (arXiv 2102.08946), under the name --cos. It lowers the rate once per epoch, to 1 - epoch / epochs; here
    it falls at every step.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 1 - min(1.0, (step - warmup) / max(1, steps - warmup))


def dropping(step: int, drops: Sequence[int], warmup: int) -> float:
    """The factor of the learning rate at a step: linear up to 1 over `warmup` steps, divided by 10 at each step in `drops`."""
    if step < warmup:
        return (step + 1) / warmup
    return float(0.1 ** sum(step >= drop for drop in drops))
