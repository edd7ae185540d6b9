"""SwAV with modules of lightly.

Caron et al., NeurIPS 2020 (arXiv 2006.09882): swapped prediction of Sinkhorn assignments to prototypes, multi-crop, a
queue that starts after some epochs, LARS. It differs from SwAV's code in two points: the cosine ends at 0, not at a
thousandth of the peak, and BatchNorm is not synchronised, since there is one process.
"""

from typing import Any

import torch
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.utils.lars import LARS
from torch import Tensor, nn
from torch.nn import functional as F

from fkd_ssl.data import Batch, Crops
from fkd_ssl.images import ImageSource
from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.pretraining.method import Method
from fkd_ssl.pretraining.multicrop import MultiCrops
from fkd_ssl.students import MEAN

STD = (0.228, 0.224, 0.225)  # of SwAV's code and its published checkpoints
HIDDEN = 2048  # of the projection head, for every backbone


class SwAV(Method):
    """A backbone, SwAV's projection head with BatchNorm, and its prototypes."""

    def __init__(self, config: PretrainConfig, count: int) -> None:
        from torchvision import models

        super().__init__(config, count, mean=MEAN, std=STD)
        assert config.queue_epoch is not None  # PretrainConfig sets these four
        assert config.prototypes is not None
        assert config.frozen_epochs is not None
        assert config.small_crops is not None
        self.small_crops = config.small_crops
        self.views = 2 + config.small_crops
        epoch = count / config.batch_size
        self.queue_step = round(config.queue_epoch * epoch)
        network: Any = models.get_model(config.arch, weights=None)
        self.projection_head = SwaVProjectionHead(network.fc.in_features, HIDDEN, config.dim)
        network.fc = nn.Identity()
        self.backbone: nn.Module = network
        self.prototypes = SwaVPrototypes(
            config.dim, config.prototypes, n_steps_frozen_prototypes=round(config.frozen_epochs * epoch)
        )
        self.prototypes.heads[0].register_parameter("bias", None)  # lightly's prototypes have a bias, SwAV's do not
        self.loss = SwaVLoss(temperature=config.temperature, sinkhorn_epsilon=config.epsilon)
        self.queues = nn.ModuleList(
            MemoryBankModule((self.queue, config.dim), feature_dim_first=False) for _ in range(2 if self.queue else 0)
        )
        self.to(memory_format=torch.channels_last)

    def crops(self, images: ImageSource) -> Crops:
        """Two large crops and the small crops of each image; crops of the same image are adjacent."""
        config = self.config
        return MultiCrops(
            images,
            pixels=config.pixels,
            small_crops=self.small_crops,
            seed=config.seed,
            skip_unreadable=config.on_unreadable == "skip",
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The swapped prediction of every crop from the assignments of the large crops (arXiv 2006.09882, eq. 2 to 4 and 6)."""
        step = self.global_step
        self.prototypes.normalize()
        features = [self.backbone(self.normalised(batch["images"]))]
        if self.small_crops:
            features.append(self.backbone(self.normalised(batch["small_images"])))
        with torch.autocast(self.device.type, enabled=False):  # Sinkhorn takes exp(score / 0.05)
            embeddings = F.normalize(self.projection_head(torch.cat(features).float()), dim=1)
            large = len(batch["images"])
            scores = self.prototypes(embeddings, step)
            high = [scores[:large][view::2] for view in range(2)]
            low = [scores[large:][view :: self.small_crops] for view in range(self.small_crops)]
            earlier = self._earlier([embeddings[:large][view::2] for view in range(2)], step)
            loss: Tensor = self.loss(high, low, earlier).squeeze()
        self.last_loss = loss.detach()
        return loss

    @torch.no_grad()
    def _earlier(self, embeddings: list[Tensor], step: int) -> list[Tensor] | None:
        """Returns the scores of the large crops in the queue if it is full; then adds this batch to the queue."""
        if not self.queues or step < self.queue_step:
            return None
        full = (step - self.queue_step) * self.config.batch_size >= self.queue
        banks = [queue(view, update=True)[1] for queue, view in zip(self.queues, embeddings, strict=True)]
        return [self.prototypes(bank, step) for bank in banks] if full else None

    def configure_optimizers(self) -> Any:
        """Makes LARS for all parameters, with a warm-up and a cosine to zero."""
        config = self.config
        assert config.lr is not None and config.weight_decay is not None  # by PretrainConfig  # noqa: PT018
        return self.with_cosine(LARS(self.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the queues, which lightly's memory bank leaves out of its state."""
        checkpoint["queues"] = [{"bank": q.bank.clone(), "ptr": q.bank_ptr.clone()} for q in self._banks()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the queues."""
        for queue, saved in zip(self._banks(), checkpoint["queues"], strict=True):
            queue.bank.copy_(saved["bank"])
            queue.bank_ptr.copy_(saved["ptr"])

    def _banks(self) -> list[MemoryBankModule]:
        return [queue for queue in self.queues if isinstance(queue, MemoryBankModule)]

    def teacher_state(self) -> dict[str, Tensor]:
        """The `state_dict` of SwAV's own checkpoints: backbone, `projection_head.0/1/3`, `prototypes.weight` [K, D]."""
        head = self.projection_head.layers.state_dict()
        # lightly omits this bias, since BatchNorm cancels it; SwAV's layout has it
        head.setdefault("0.bias", torch.zeros(HIDDEN))
        state = {
            **self.backbone.state_dict(),
            **{f"projection_head.{key}": value for key, value in head.items()},
            "prototypes.weight": self.prototypes.heads[0].weight,
        }
        return {f"module.{key}": value.detach().cpu().contiguous() for key, value in state.items()}
