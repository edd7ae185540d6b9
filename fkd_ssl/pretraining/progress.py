"""metrics.csv, the progress bar and the checkpoints of a pretraining."""

import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from fkd_ssl import files
from fkd_ssl.errors import FkdError
from fkd_ssl.pretraining.method import Method

LAST, METRICS = "last.ckpt", "metrics.csv"
FIELDS = ("step", "epoch", "seconds", "loss", "lr")


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
        assert isinstance(pl_module, Method)
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
