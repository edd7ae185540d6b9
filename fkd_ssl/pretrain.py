"""Pretraining of a teacher on one's own images: MoCo v2 with lightly's parts, under Lightning.

He et al., CVPR 2020 (arXiv 1911.05722), algorithm 1; Chen et al. 2020 (arXiv 2003.04297) for the head, the
augmentation, the cosine and the temperature.

The two views are crops of the recipe `mocov2`, drawn and replayed as everywhere in this library; lightly's
MoCoV2Transform is the same recipe. MoCo shuffles the keys' batch between GPUs, so that BatchNorm cannot give the
positive away; in one process a shuffled batch has the same statistics, and nothing is shuffled.
"""

import copy
import io
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fkd_ssl import files, images, runs
from fkd_ssl.crops import RECIPES
from fkd_ssl.data import Batch, FreshCrops, start_worker, whole_batch
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.pretrain_config import PretrainConfig
from fkd_ssl.students import MEAN, STD
from fkd_ssl.training.distiller import cosine
from fkd_ssl.training.fit import fit, step_of
from fkd_ssl.training.sampler import PassSampler

CHECKPOINT, LAST, METRICS = "checkpoint.pth.tar", "last.ckpt", "metrics.csv"
FIELDS = ("step", "epoch", "seconds", "loss", "lr")


def pretrain(config: PretrainConfig, *, log: Callable[[str], None] = lambda message: None) -> Path:
    """Trains a teacher, or continues from the last whole epoch of the same config's run.

    Args:
        config: The run.
        log: Takes lines for the user.

    Returns:
        The checkpoint, for `load_teacher("mocov2", checkpoint=...)`.

    Raises:
        RequestError: The output folder holds another run, or there are fewer images than a batch has.
        ImageError: An image cannot be read.
    """
    found = images.scan(config.images)
    if config.batch_size > len(found):
        raise RequestError(f"batch_size {config.batch_size}: there are {len(found)} images; choose at most as many")
    folder, state = runs.open_run(config.out, config)
    if state == "done":
        log(f"{folder}: finished already")
        return folder / CHECKPOINT
    torch.manual_seed(config.seed)
    steps = math.ceil(config.epochs * len(found) / config.batch_size)
    module = MoCo(config, queue_length(config, len(found)), steps)
    sampler = PassSampler(len(found), config.batch_size, steps, seed=config.seed)
    progress = Progress(folder, every=config.log_every, epoch=len(found) / config.batch_size)
    last: Path | None = folder / LAST
    if last is not None and last.exists():
        sampler.start = step_of(last)
        log(f"{folder}: continues from step {sampler.start} of {steps}")
    else:
        last = None
    loader = DataLoader(
        FreshCrops(found, RECIPES["mocov2"], crops_per_image=2, pixels=config.pixels, seed=config.seed),
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=whole_batch,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    fit(module, loader, [progress], steps=steps, precision=config.precision, folder=folder, last=last)
    saved = io.BytesIO()
    torch.save({"epoch": config.epochs, "arch": config.arch, "state_dict": module.moco_state()}, saved)
    files.replace(folder / CHECKPOINT, saved.getvalue())
    runs.finish(
        folder,
        {
            "checkpoint": CHECKPOINT,
            "epochs": config.epochs,
            "steps": steps,
            "images": len(found),
            "queue": module.queue,
            "loss": progress.lines[-1]["loss"],
            "train_seconds": round(progress.seconds, 3),
        },
    )
    return folder / CHECKPOINT


def queue_length(config: PretrainConfig, count: int) -> int:
    """The queue's length for `count` images: a multiple of the batch, as MoCo's code demands, and at most half of them.

    In a queue of more than half, an image's own earlier key would often be among its negatives.
    """
    length = max(min(config.queue, count // 2) // config.batch_size, 1) * config.batch_size
    if length != config.queue:
        warnings.warn(
            f"queue {config.queue}: {length} are kept, a multiple of batch_size {config.batch_size} and at most half "
            f"of the {count} images",
            stacklevel=2,
        )
    return length


class MoCo(pl.LightningModule):
    """MoCo v2's query and key encoders and its queue."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: PretrainConfig, queue: int, steps: int) -> None:
        super().__init__()
        self.config, self.queue, self.steps = config, queue, steps
        self.encoder_q = make_encoder(config.arch, config.dim)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        deactivate_requires_grad(self.encoder_k)
        self.loss = NTXentLoss(temperature=config.temperature, memory_bank_size=(queue, config.dim))
        self.last_loss = torch.zeros(())
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255, persistent=False)
        self.to(memory_format=torch.channels_last)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """InfoNCE of the first views' queries to the second views' keys and the queue (arXiv 1911.05722, eq. 1)."""
        views = (batch["images"] - self.mean) / self.std
        queries = self.encoder_q(views[0::2])
        with torch.no_grad():
            update_momentum(self.encoder_q, self.encoder_k, m=self.config.momentum)
            keys = self.encoder_k(views[1::2])
        with torch.autocast(self.device.type, enabled=False):  # 65,537 logits at temperature 0.2 need their digits
            loss: Tensor = self.loss(queries.float(), keys.float())
        self.last_loss = loss.detach()
        return loss

    def configure_optimizers(self) -> Any:
        """SGD over the query encoder, and a cosine to zero by steps."""
        optimizer = torch.optim.SGD(
            self.encoder_q.parameters(), lr=self.config.lr, momentum=0.9, weight_decay=self.config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, self.steps, 0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the queue, which lightly's memory bank leaves out of its state."""
        bank = self.loss.memory_bank
        checkpoint["queue"] = {"bank": bank.bank.clone(), "ptr": bank.bank_ptr.clone()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Brings the queue back."""
        self.loss.memory_bank.bank.copy_(checkpoint["queue"]["bank"])
        self.loss.memory_bank.bank_ptr.copy_(checkpoint["queue"]["ptr"])

    def moco_state(self) -> dict[str, Tensor]:
        """The `state_dict` of MoCo's own checkpoints; its queue is [D, K]."""
        bank = self.loss.memory_bank
        encoders = {
            f"module.{name}.{key}": value
            for name, encoder in (("encoder_q", self.encoder_q), ("encoder_k", self.encoder_k))
            for key, value in encoder.state_dict().items()
        }
        state = {**encoders, "module.queue": bank.bank.T, "module.queue_ptr": bank.bank_ptr}
        return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def make_encoder(arch: str, dim: int) -> nn.Module:
    """A torchvision ResNet whose `fc` is MoCo v2's head: Linear, ReLU, Linear under the keys fc.0 and fc.2."""
    from torchvision import models

    network: Any = models.get_model(arch, weights=None)
    features = network.fc.in_features
    assert isinstance(features, int)
    network.fc = MoCoProjectionHead(features, features, dim).layers
    encoder: nn.Module = network
    return encoder


class Progress(pl.Callback):
    """metrics.csv, the bar on standard error, and `last.ckpt` after every epoch.

    Attributes:
        lines: Of metrics.csv.
        seconds: Spent training, over all sessions of the run.
    """

    def __init__(self, folder: Path, *, every: int, epoch: float) -> None:
        self.folder, self.every, self.epoch = folder, every, epoch
        self.save_every = max(1, round(epoch))
        self.lines: list[dict[str, float]] = []
        self.seconds = 0.0
        self._sum, self._count, self._mark = torch.zeros(()), 0, 0.0
        self._bar: Any = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {"lines": self.lines, "seconds": self.seconds, "sum": float(self._sum), "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint: lines after it are forgotten, they will be written again."""
        self.lines, self.seconds = state_dict["lines"], state_dict["seconds"]
        self._sum, self._count = torch.tensor(state_dict["sum"]), state_dict["count"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock and the bar."""
        self._bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", desc="pretrain")
        self._sum = self._sum.to(pl_module.device)
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the step; writes a line and saves when it is time."""
        assert isinstance(pl_module, MoCo)
        step = trainer.global_step
        end = step == trainer.max_steps
        self._sum += pl_module.last_loss
        self._count += 1
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now
        self._bar.update(1)
        if end or step % self.every == 0:
            line = {
                "step": step,
                "epoch": step / self.epoch,
                "seconds": round(self.seconds, 3),
                "loss": float(self._sum) / self._count,
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
            }
            if not math.isfinite(float(line["loss"])):
                raise FkdError(f"step {step}: the loss is {line['loss']}: diverged; choose a smaller --lr and another --out")
            self.lines.append(line)
            self._bar.set_postfix(loss=f"{line['loss']:.4f}")
            self._sum.zero_()
            self._count = 0
            rows = [",".join(str(row[field]) for field in FIELDS) for row in self.lines]
            files.replace(self.folder / METRICS, ("\n".join([",".join(FIELDS), *rows]) + "\n").encode())
        if end or step % self.save_every == 0:
            trainer.save_checkpoint(self.folder / LAST)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error stands on a line of its own."""
        if self._bar is not None:
            self._bar.close()
