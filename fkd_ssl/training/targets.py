"""Sources of a batch's targets: a store, the teachers, or the classes of the images."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fkd_ssl.data import Batch

Targets = Callable[[Batch], list[Tensor]]


def stored_targets(batch: Batch) -> list[Tensor]:
    """Each teacher's targets [B M, D], which the batch has from its store."""
    targets: Tensor | dict[str, Tensor] = batch["targets"]
    return list(targets.values()) if isinstance(targets, dict) else [targets]


class OnlineTargets:
    """Each teacher's targets [B M, D], computed for every batch.

    Args:
        embeds: The teachers.

    Attributes:
        forwards: Number of crops that the teachers have computed targets of, all together.
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


class LabelTargets:
    """The class of an image for each of its crops, smoothed: 1 - e + e / K for it and e / K for the others [B M, K].

    Szegedy et al., CVPR 2016 (arXiv 1512.00567), section 7. With e = 0 this is plain training.

    Args:
        classes: K.
        smoothing: e.
    """

    def __init__(self, classes: int, smoothing: float = 0.0) -> None:
        self.classes = classes
        self.smoothing = smoothing

    def __call__(self, batch: Batch) -> list[Tensor]:
        """Targets of a batch's crops, one teacher's."""
        return [self.of(batch)]

    def of(self, batch: Batch) -> Tensor:
        """Float32 [B M, K] of a batch with `labels` [B]."""
        images: Tensor = batch["images"]
        labels = batch["labels"].to(images.device)
        each = F.one_hot(labels, self.classes).float() * (1 - self.smoothing) + self.smoothing / self.classes
        return each.repeat_interleave(len(images) // len(labels), dim=0)


class Calibrated:
    """The teacher's targets; crops of which it is not sure get the smoothed class of their image.

    After FerKD (Shen, ICCV 2023, arXiv 2312.17473), which also has several degrees of doubt, and mixes crops of an image.

    Args:
        targets: Class probabilities.
        below: A row whose greatest probability is less than this is replaced.
        labels: Gives the replacement.
    """

    def __init__(self, targets: Targets, below: float, labels: LabelTargets) -> None:
        self.targets = targets
        self.below = below
        self.labels = labels

    def __call__(self, batch: Batch) -> list[Tensor]:
        """Each teacher's targets [B M, K]."""
        labels = self.labels.of(batch)
        return [torch.where(p.amax(dim=1, keepdim=True) < self.below, labels, p) for p in self.targets(batch)]
