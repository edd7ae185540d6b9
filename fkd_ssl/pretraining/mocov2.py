"""MoCo v2 with modules of lightly.

He et al., CVPR 2020 (arXiv 1911.05722), algorithm 1; Chen et al. 2020 (arXiv 2003.04297) for the head, the
augmentation, the cosine and the temperature.

The two views are crops of the recipe `mocov2`, which equals lightly's MoCoV2Transform; they are drawn and replayed like all
crops of this library. MoCo shuffles the batch of keys between GPUs, so that BatchNorm does not reveal the positive. In one
process a shuffled batch has the same statistics, so nothing is shuffled.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from fkd_ssl.crops import RECIPES
from fkd_ssl.data import Batch, Crops, FreshCrops
from fkd_ssl.images import ImageSource
from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.pretraining.method import Method
from fkd_ssl.students import MEAN, STD, Student, make_backbone, make_head


class MoCo(Method):
    """MoCo v2's query and key encoders and its queue."""

    views = 2

    def __init__(self, config: PretrainConfig, count: int) -> None:
        super().__init__(config, count, mean=MEAN, std=STD)
        assert config.temperature is not None  # by PretrainConfig
        self.encoder_q = make_encoder(config)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        deactivate_requires_grad(self.encoder_k)
        self.loss = NTXentLoss(temperature=config.temperature, memory_bank_size=(self.queue, config.dim))
        self.to(memory_format=torch.channels_last)

    def crops(self, images: ImageSource) -> Crops:
        """Two crops of each image, side by side."""
        config = self.config
        return FreshCrops(
            images,
            RECIPES["mocov2"],
            crops_per_image=2,
            pixels=config.pixels,
            seed=config.seed,
            skip_unreadable=config.on_unreadable == "skip",
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """InfoNCE of the first views' queries to the second views' keys and the queue (arXiv 1911.05722, eq. 1)."""
        assert self.config.momentum is not None  # by PretrainConfig
        views = self.normalised(batch["images"])
        queries = self.encoder_q(views[0::2])
        with torch.no_grad():
            update_momentum(self.encoder_q, self.encoder_k, m=self.config.momentum)
            keys = self.encoder_k(views[1::2])
        with torch.autocast(self.device.type, enabled=False):  # 65,537 logits at temperature 0.2 need full precision
            loss: Tensor = self.loss(queries.float(), keys.float())
        self.last_loss = loss.detach()
        return loss

    def configure_optimizers(self) -> Any:
        """Makes the config's optimiser for the query encoder, with a warm-up and a cosine to zero."""
        config = self.config
        assert config.lr is not None and config.weight_decay is not None  # by PretrainConfig  # noqa: PT018
        parameters = self.encoder_q.parameters()
        if config.optimizer == "adamw":
            return self.with_cosine(torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay))
        return self.with_cosine(torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the queue, which lightly's memory bank leaves out of its state."""
        bank = self.loss.memory_bank
        checkpoint["queue"] = {"bank": bank.bank.clone(), "ptr": bank.bank_ptr.clone()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the queue."""
        self.loss.memory_bank.bank.copy_(checkpoint["queue"]["bank"])
        self.loss.memory_bank.bank_ptr.copy_(checkpoint["queue"]["ptr"])

    def student(self) -> Student:
        """A student with the trained backbone, in eval mode; its head is new and untrained."""
        student = Student(self.config.arch, self.config.dim, stem=self.config.stem, width=self.config.width)
        student.backbone.load_state_dict(self.encoder_q.get_submodule("backbone").state_dict())
        return student.eval()

    def teacher_state(self) -> dict[str, Tensor]:
        """The `state_dict` of MoCo's own checkpoints; its queue is [D, K]."""
        bank = self.loss.memory_bank
        encoders = {
            f"module.{name}.{key}": value
            for name, encoder in (("encoder_q", self.encoder_q), ("encoder_k", self.encoder_k))
            for key, value in encoder.state_dict().items()
        }
        state = {**encoders, "module.queue": bank.bank.T, "module.queue_ptr": bank.bank_ptr}
        return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def make_encoder(config: PretrainConfig) -> nn.Module:
    """Makes a backbone with MoCo v2's head. A teacher has the layout of MoCo: a ResNet whose `fc` is Linear, ReLU, Linear."""
    if not config.is_teacher:
        backbone, features = make_backbone(config.arch, stem=config.stem, width=config.width)
        return nn.Sequential(OrderedDict(backbone=backbone, head=make_head("mocov2", features, config.dim)))
    from torchvision import models

    network: Any = models.get_model(config.arch, weights=None)
    features = network.fc.in_features
    network.fc = MoCoProjectionHead(features, features, config.dim).layers
    encoder: nn.Module = network
    return encoder
