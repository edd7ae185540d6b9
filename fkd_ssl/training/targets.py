"""Sources of the targets of a batch: a store, the teachers, or the classes of the images."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fkd_ssl.data import Batch
from fkd_ssl.targets.sharing import embed_all

Targets = Callable[[Batch], list[Tensor]]


def stored_targets(batch: Batch) -> list[Tensor]:
    """Each teacher's targets [B M, D], from the batch, which read them from the store."""
    targets: Tensor | dict[str, Tensor] = batch["targets"]
    return list(targets.values()) if isinstance(targets, dict) else [targets]


class OnlineTargets:
    """Computes each teacher's targets [B M, D] for every batch. Teachers that share a network run it once.

    Args:
        embeds: The teachers' methods `embed`, or functions.
    """

    def __init__(self, *embeds: Callable[[Tensor], Tensor]) -> None:
        self.embeds = embeds

    def __call__(self, batch: Batch) -> list[Tensor]:
        """Computes the targets of a batch."""
        images: Tensor = batch["teacher_images"] if "teacher_images" in batch else batch["images"]
        # cloned, since autograd cannot save inference tensors
        return [targets.to(batch["images"].device).clone() for targets in embed_all(self.embeds, images)]


class LabelTargets:
    """Targets [B M, K] from class labels with label smoothing: 1 - e + e / K for the true class and e / K for the others.

    Szegedy et al., CVPR 2016 (arXiv 1512.00567), section 7. With e = 0 this is ordinary supervised training.

    Args:
        classes: K.
        smoothing: e.
    """

    def __init__(self, classes: int, smoothing: float = 0.0) -> None:
        self.classes = classes
        self.smoothing = smoothing

    def __call__(self, batch: Batch) -> list[Tensor]:
        """Returns the targets of a batch, in a list of one."""
        return [self.of(batch)]

    def of(self, batch: Batch) -> Tensor:
        """The targets float32 [B M, K] of a batch with `labels` [B]."""
        images: Tensor = batch["images"]
        labels = batch["labels"].to(images.device)
        each = F.one_hot(labels, self.classes).float() * (1 - self.smoothing) + self.smoothing / self.classes
        return each.repeat_interleave(len(images) // len(labels), dim=0)


class CalibratedTargets:
    """The teacher's targets, replaced by the smoothed label of the image where the teacher is not confident.

    After FerKD (Shen, ICCV 2023, arXiv 2312.17473), which also has several levels of confidence and mixes crops of an image.

    Args:
        targets: Source of class probabilities.
        below: A row is replaced if its largest probability is below this.
        labels: Source of the replacement.
    """

    def __init__(self, targets: Targets, below: float, labels: LabelTargets) -> None:
        self.targets = targets
        self.below = below
        self.labels = labels

    def __call__(self, batch: Batch) -> list[Tensor]:
        """Each teacher's targets [B M, K]."""
        labels = self.labels.of(batch)
        return [torch.where(p.amax(dim=1, keepdim=True) < self.below, labels, p) for p in self.targets(batch)]
