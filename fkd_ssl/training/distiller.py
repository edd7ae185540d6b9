"""The training step: a student's outputs, the targets of the batch and the objective between them."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lightly.utils.lars import LARS
from torch import Tensor, nn

from fkd_ssl.data import Batch, replay_on_device
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.objectives import Objective
from fkd_ssl.students import STUDENT_KEY, Student
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.mixing import Mixing
from fkd_ssl.training.module import TrainingModule, cosine, dropping, linear
from fkd_ssl.training.targets import Targets


class Distiller(TrainingModule):
    """A student in training.

    Args:
        student: The student.
        objectives: One objective per teacher.
        targets: Returns each teacher's targets of a batch.
        config: Config of the run.
        steps: Number of optimiser steps of the training.

    Attributes:
        student: The student.
        average: Moving average of its weights, which is scored and exported; None without `ema`.
    """

    def __init__(
        self, student: Student, objectives: Sequence[Objective], targets: Targets, config: TrainConfig, steps: int
    ) -> None:
        super().__init__(steps, config.seed)
        self.advice = f"choose a smaller --lr than {config.lr:g} or a --clip (and another --out), or --precision 32-true"
        self.student = student
        self.objectives = objectives
        self.weights = config.weights(len(objectives))
        # registered as submodules, so that their buffers move to the student's device
        self.parts = nn.ModuleList(part for part in objectives if isinstance(part, nn.Module))
        self.targets = targets
        self.mixing = Mixing(config.mixup, config.cutmix) if config.mixup or config.cutmix else None
        self.config = config
        self._seen: list[list[Tensor]] = []  # targets of this step's batches
        self._last: list[Tensor] = []  # targets of the last batch
        self.unused_parameters = all(isinstance(dim, tuple) for dim in student.dims)  # such as a norm after the pooling
        self.average = None if config.ema is None else copy.deepcopy(student).eval().requires_grad_(False)
        if config.compile:
            student.backbone.compile()  # in place, so that the names of the weights do not change

    @property
    def result(self) -> Student:
        """The student to score and export: the moving average if enabled."""
        return self.student if self.average is None else self.average

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Makes the crops on the device if the workers only decoded."""
        return replay_on_device(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Computes the loss of a batch; with several teachers, the weighted sum of their losses (SimReg, arXiv 2201.05131)."""
        images, targets = batch["images"], self.targets(batch)
        if self.mixing is not None:
            images, targets = self.mixing(images, targets)
        heads = list(zip(self.weights, self.objectives, self.student.embeddings(images), targets, strict=True))
        loss = torch.stack([weight * objective(output, target) for weight, objective, output, target in heads]).sum()
        floor = torch.stack([weight * objective.floor(target) for weight, objective, _, target in heads]).sum()
        self._seen.append(targets)
        self._last = targets
        self.last_loss, self.last_floor = loss.detach(), floor.detach()
        return loss

    def require_finite(self, step: int) -> None:
        """Raises FkdError if the last loss is not finite; its message differs if the cause is a teacher's targets."""
        try:
            super().require_finite(step)
        except FkdError as error:
            if all(target.isfinite().all() for target in self._last):
                raise
            raise FkdError(
                f"step {step}: a teacher's targets are NaN or infinity; {self.saved}; try --teacher_precision fp32"
            ) from error

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step, then passes its targets to the objectives and updates the moving average."""
        super().optimizer_step(*args, **kwargs)
        for objective, *parts in zip(self.objectives, *self._seen, strict=True):
            objective.remember(torch.cat(parts))
        self._seen.clear()
        if self.average is not None:
            assert self.config.ema is not None
            # a smaller decay at first, so that the initial weights soon lose their influence (as in TensorFlow and timm)
            update_average(self.average, self.student, min(self.config.ema, (1 + self.global_step) / (10 + self.global_step)))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises RequestError if a checkpoint's targets have other dimensions, for instance of another teacher."""
        saved, now = checkpoint[STUDENT_KEY]["dim"], self._dim
        if saved != now:
            raise RequestError(
                f"{self.trainer.ckpt_path}: was trained on targets of D = {saved}, and now they have D = {now}: give the same "
                "images and teacher, or choose another --out"
            )

    @property
    def _dim(self) -> Any:
        """The sizes of the targets in a checkpoint: D of a single vector, else a list of D and [h, w, D]."""
        dims = [[*dim] if isinstance(dim, tuple) else dim for dim in self.student.dims]
        return dims[0] if len(dims) == 1 and isinstance(dims[0], int) else dims

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is needed to rebuild the student without its run folder."""
        checkpoint[STUDENT_KEY] = {**self.student.spec, "dim": self._dim, "pixels": self.config.pixels}

    def configure_optimizers(self) -> Any:
        """Makes the optimiser and its per-step schedule: a linear warm-up, then the config's `lr_decay`."""
        optimizer = make_optimizer(nn.ModuleList([self.student, self.parts]), self.config, backbone=self.student.backbone)
        warmup, *drops = (
            round(epochs / self.config.epochs * self.steps) for epochs in (self.config.warmup_epochs, *self.config.drops)
        )
        decay = linear if self.config.lr_decay == "linear" else cosine
        return self.by_steps(
            optimizer, lambda step: dropping(step, drops, warmup) if drops else decay(step, self.steps, warmup)
        )


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Updates weights and running statistics: average <- decay average + (1 - decay) network; integers are copied.

    Tarvainen and Valpola, NeurIPS 2017 (arXiv 1703.01780), eq. 1. torch's AveragedModel is not used, since it replaces the
    initial weights at the first update and averages the integers.
    """
    for mean, now in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(now, 1 - decay)
        else:
            mean.copy_(now)


def make_optimizer(network: nn.Module, config: TrainConfig, *, backbone: nn.Module | None = None) -> torch.optim.Optimizer:
    """Makes the config's optimiser for a network.

    Biases, normalisation parameters, position embeddings and class tokens get weight decay only with `decay_all`. With
    `layer_decay`, the learning rates of the layers of `backbone`, a network of timm, decrease from the last to the first.
    """
    free = {p for name, p in network.named_parameters() if not (config.decay_all or _decays(name, p))}
    layers = []
    if config.layer_decay is not None and backbone is not None:
        from timm.optim import param_groups_layer_decay

        names = [name for name, p in backbone.named_parameters() if p in free]
        layers = param_groups_layer_decay(
            backbone, config.weight_decay, names, weight_decay_exclude_1d=False, layer_decay=config.layer_decay
        )
        for group in layers:
            group["lr"] = config.lr * group.pop("lr_scale")
    done = {p for group in layers for p in group["params"]}
    rest = [p for p in network.parameters() if p.requires_grad and p not in done]
    groups = [
        {"params": [p for p in rest if p not in free], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p in free], "weight_decay": 0.0},
        *layers,
    ]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    lars: torch.optim.Optimizer = LARS(groups, lr=config.lr, momentum=config.momentum)
    return lars


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a layer's weight; the names of position embeddings and class tokens do not end in `weight`."""
    return parameter.ndim > 1 and name.endswith("weight")
