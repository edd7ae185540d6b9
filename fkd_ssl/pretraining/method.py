"""What the methods of pretraining share: a Lightning module that knows its crops and its checkpoint's layout."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fkd_ssl.data import Batch
from fkd_ssl.images import ImageSet
from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.training.distiller import cosine


class Method(pl.LightningModule):
    """A teacher in training, over `count` images. `last_loss` is the last step's loss.

    Attributes:
        steps: Of the whole training, ceil(epochs x count / batch_size).
        queue: Earlier embeddings kept.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, config: PretrainConfig, count: int, *, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> None:
        super().__init__()
        self.config = config
        self.steps = math.ceil(config.epochs * count / config.batch_size)
        self.queue = queue_length(config, count)
        self.last_loss = torch.zeros(())
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def normalised(self, images: Tensor) -> Tensor:
        """What the network takes of uint8 [B, 3, H, W]."""
        return (images - self.mean) / self.std

    def with_cosine(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimiser and a cosine to zero by steps, as Lightning takes them."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, self.steps, 0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @abstractmethod
    def crops(self, images: ImageSet) -> tuple[Dataset[Batch], Callable[[Any], Batch]]:
        """The data set of this method's crops, read by lists of (pass, image), and its collate function."""

    @abstractmethod
    def teacher_state(self) -> dict[str, Tensor]:
        """The `state_dict` of the method's own checkpoints."""


def queue_length(config: PretrainConfig, count: int) -> int:
    """The queue's length for `count` images: a multiple of the batch, as both codes demand, and at most half of them.

    In a queue of more than half, an image's own earlier embedding would often be met again. 0 if none was asked for.
    """
    assert config.queue is not None  # by PretrainConfig
    if config.queue == 0:
        return 0
    length = max(min(config.queue, count // 2) // config.batch_size, 1) * config.batch_size
    if length != config.queue:
        warnings.warn(
            f"queue {config.queue}: {length} are kept, a multiple of batch_size {config.batch_size} and at most half "
            f"of the {count} images",
            stacklevel=2,
        )
    return length
