"""metrics.csv, the clock and the progress bar of a run."""

import csv
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from fkd_ssl import files
from fkd_ssl.training.distiller import Distiller

FIELDS = ("step", "epoch", "crops", "seconds", "loss", "kl", "lr", "wait", "knn_top1")


class Recorder(pl.Callback):
    """Writes a line of metrics.csv every `every` steps and shows progress on standard error.

    `seconds` is the time spent training, without evaluation, over all sessions of the run; `wait` the share of it that
    the step waited for data; `kl` the loss above the least that the targets allow.

    Attributes:
        seconds: So far.
        waited: Seconds of them spent waiting for data.
    """

    def __init__(self, path: Path, *, every: int, batch_size: int, images: int) -> None:
        self.path = path
        self.every = every
        self.batch_size = batch_size
        self.images = images
        self.seconds = self.waited = 0.0
        self._lines: list[dict[str, Any]] = []
        self._sums = torch.zeros(3)
        self._mark = self._lr = 0.0
        self._bar: Any = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {"seconds": self.seconds, "waited": self.waited, "lines": self._lines, "sums": self._sums.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint: lines after it are forgotten, they will be written again."""
        self.seconds, self.waited = state_dict["seconds"], state_dict["waited"]
        self._lines = state_dict["lines"]
        self._sums = torch.tensor(state_dict["sums"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock and the bar."""
        self._bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", desc="train", smoothing=0.05)
        self._write()
        self._mark = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes the time since the last step's end as waiting for data, and the learning rate before the schedule's step."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.waited += time.perf_counter() - self._mark

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the step; writes a line when one is due."""
        assert isinstance(pl_module, Distiller)
        step = trainer.global_step
        self._sums += torch.stack([pl_module.last_loss, pl_module.last_floor, torch.ones(())]).cpu()
        self._tick()
        self._bar.update(1)
        if step % self.every == 0 or step == trainer.max_steps:
            loss, floor, count = self._sums.double().tolist()
            crops = step * self.batch_size
            self._lines.append(
                {
                    "step": step,
                    "epoch": crops / self.images,
                    "crops": crops,
                    "seconds": round(self.seconds, 3),
                    "loss": loss / count,
                    "kl": (loss - floor) / count,
                    "lr": self._lr,
                    "wait": round(self.waited / self.seconds, 4),
                    "knn_top1": "",
                }
            )
            self._sums.zero_()
            self._bar.set_postfix(kl=f"{(loss - floor) / count:.4f}", wait=f"{100 * self.waited / self.seconds:.0f}%")
            self._write()

    def score(self, trainer: pl.Trainer, top1: float) -> None:
        """Notes a kNN score at this step, in a line of its own; the time it took is not training."""
        crops = trainer.global_step * self.batch_size
        line: dict[str, Any] = dict.fromkeys(FIELDS, "")
        line |= {"step": trainer.global_step, "epoch": crops / self.images, "crops": crops}
        self._lines.append({**line, "seconds": round(self.seconds, 3), "knn_top1": top1})
        self._write()
        self._mark = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error stands on a line of its own."""
        if self._bar is not None:
            self._bar.close()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = now

    def _write(self) -> None:
        out = [",".join(FIELDS)]
        out += [",".join(str(line[field]) for field in FIELDS) for line in self._lines]
        files.replace(self.path, ("\n".join(out) + "\n").encode())


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The lines of a metrics.csv; an empty cell is None."""
    with path.open(newline="") as file:
        return [{key: float(value) if value else None for key, value in line.items()} for line in csv.DictReader(file)]
