"""The base class of the pretraining methods: a training module with its crops and its checkpoint layout."""

import math
import warnings
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fkd_ssl.data import Crops
from fkd_ssl.images import ImageSource
from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.training.module import TrainingModule, cosine


class Method(TrainingModule):
    """A teacher in training, for ceil(epochs x count / batch_size) steps.

    Args:
        config: Config of the run.
        count: Number of images.
        mean: Per-channel mean of the network's input normalisation, for pixels in 0 to 1.
        std: Per-channel standard deviation of the normalisation.

    Attributes:
        queue: Number of earlier embeddings kept.
        views: Number of crops per image in a batch.
    """

    views: int

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: PretrainConfig, count: int, *, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> None:
        super().__init__(math.ceil(config.epochs * count / config.batch_size), config.seed)
        self.config = config
        self.queue = queue_length(config, count)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def normalised(self, images: Tensor) -> Tensor:
        """Normalises images uint8 [B, 3, H, W] for the network."""
        return (images - self.mean) / self.std

    def with_cosine(self, optimizer: torch.optim.Optimizer) -> Any:
        """Returns the optimiser and a per-step schedule: a linear warm-up, then a cosine to zero."""
        warmup = round(self.steps * self.config.warmup_epochs / self.config.epochs)
        return self.by_steps(optimizer, lambda step: cosine(step, self.steps, warmup))

    @abstractmethod
    def crops(self, images: ImageSource) -> Crops:
        """Makes the data set of this method's crops."""

    @abstractmethod
    def teacher_state(self) -> dict[str, Tensor]:
        """The `state_dict` of the method's own checkpoints."""


def queue_length(config: PretrainConfig, count: int) -> int:
    """The queue length for `count` images: a multiple of the batch size, as both methods require, and at most half of `count`.

    A longer queue would often have an earlier embedding of the same image. Returns 0 if the config has no queue.
    """
    assert config.queue is not None  # by PretrainConfig
    if config.queue == 0:
        return 0
    length = max(min(config.queue, count // 2) // config.batch_size, 1) * config.batch_size
    if length != config.queue:
        warnings.warn(
            f"queue {config.queue}: shortened to {length}, a multiple of batch_size {config.batch_size} and at most half "
            f"of the {count} images",
            stacklevel=2,
        )
    return length
