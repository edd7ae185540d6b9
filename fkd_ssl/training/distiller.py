"""The training step: crops through the student, targets from the batch or from the teacher, one objective between."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from lightly.utils.lars import LARS
from torch import Tensor, nn

from fkd_ssl.data import Batch, made_here
from fkd_ssl.errors import FkdError
from fkd_ssl.objectives import Objective
from fkd_ssl.students import Student
from fkd_ssl.training.config import TrainConfig

STUDENT_KEY = "fkd_ssl_student"

Targets = Callable[[Batch], list[Tensor]]


def stored_targets(batch: Batch) -> list[Tensor]:
    """Each teacher's targets [B M, D] that the batch brought from its store."""
    targets: Tensor | dict[str, Tensor] = batch["targets"]
    return list(targets.values()) if isinstance(targets, dict) else [targets]


class OnlineTargets:
    """Each teacher's targets [B M, D], given now.

    Attributes:
        forwards: Crops that the teachers have seen, all together.
    """

    def __init__(self, *embeds: Callable[[Tensor], Tensor]) -> None:
        self.embeds = embeds
        self.forwards = 0

    def __call__(self, batch: Batch) -> list[Tensor]:
        """Targets of a batch's crops."""
        images: Tensor = batch["teacher_images"] if "teacher_images" in batch else batch["images"]
        self.forwards += len(images) * len(self.embeds)
        # cloned out of inference mode, so that autograd may keep it
        return [embed(images).to(batch["images"].device).clone() for embed in self.embeds]


class Distiller(pl.LightningModule):
    """A student in training. `last_loss` and `last_floor` are the last step's loss and its least possible value."""

    def __init__(
        self, student: Student, objectives: Sequence[Objective], targets: Targets, config: TrainConfig, steps: int
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = objectives
        self.weights = config.weights(len(objectives))
        # registered, so that what an objective holds moves to the student's device
        self.parts = nn.ModuleList(part for part in objectives if isinstance(part, nn.Module))
        self.targets = targets
        self.config = config
        self.steps = steps
        self.last_loss = self.last_floor = torch.zeros(())

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Makes the crops on the device, where that was left to it."""
        return made_here(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective's value on a batch; with several teachers the weighted sum (SimReg, arXiv 2201.05131)."""
        targets = self.targets(batch)
        heads = list(zip(self.weights, self.objectives, self.student.embeddings(batch["images"]), targets, strict=True))
        loss = torch.stack([weight * objective(output, target) for weight, objective, output, target in heads]).sum()
        floor = torch.stack([weight * objective.floor(target) for weight, objective, _, target in heads]).sum()
        self.last_loss, self.last_floor = loss.detach(), floor.detach()
        return loss

    def require_finite(self, step: int) -> None:
        """Raises FkdError where the last step's loss is not a finite number: the training has diverged."""
        if not torch.isfinite(self.last_loss):
            raise FkdError(
                f"step {step}: the loss is {self.last_loss.item()}: the training has diverged; the last checkpoint is from "
                f"before; choose a smaller --lr than {self.config.lr:g} (and another --out), or --precision 32-true"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what rebuilds the student without its run folder."""
        dims = self.student.dims
        checkpoint[STUDENT_KEY] = {
            "name": self.config.student,
            "dim": dims[0] if len(dims) == 1 else dims,
            "pixels": self.config.pixels,
        }

    def configure_optimizers(self) -> Any:
        """The optimiser, and a linear warm-up with a cosine to zero after it, by steps."""
        optimizer = make_optimizer(self.student, self.config)
        warmup = round(self.config.warmup_epochs / self.config.epochs * self.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, self.steps, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cosine(step: int, steps: int, warmup: int) -> float:
    """The learning rate's factor at a step: linear up to 1 over `warmup` steps, then a cosine that ends near 0.

    Loshchilov and Hutter, ICLR 2017 (arXiv 1608.03983), eq. 5, without restarts.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The config's optimiser over a network's parameters; biases and norms have no weight decay."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    lars: torch.optim.Optimizer = LARS(groups, lr=config.lr, momentum=config.momentum)
    return lars
