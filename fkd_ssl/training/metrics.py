"""metrics.csv, the clock and the progress bar of a run."""

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tqdm.auto import tqdm

from fkd_ssl import files
from fkd_ssl.errors import RequestError
from fkd_ssl.progress import bar_disabled
from fkd_ssl.training.module import TrainingModule

METRICS = "metrics.csv"
_MAX_BYTES = 2**30
FIELDS = ("step", "epoch", "crops", "seconds", "loss", "kl", "lr", "wait", "knn_top1", "crops_per_second")


class MetricsWriter(pl.Callback):
    """Writes a line to metrics.csv and the loggers every `every` steps, and shows progress on standard error.

    With several processes, only the first one writes; losses are means over all processes.

    `loss` is the mean over the steps since the last line; `kl` is `loss` minus the smallest loss that the targets allow.
    `lr` is the learning rate of that step. `seconds` is the training time over all sessions of the run, without scoring and
    saving; it includes the steps that a GPU still runs when scoring or saving begins. `crops_per_second` is the rate since the
    last line; `wait` is the share of `seconds` spent waiting for data.

    Args:
        path: Path of metrics.csv.
        every: Number of steps per line.
        crops_per_step: Number of crops per step.
        crops_per_epoch: Number of crops per epoch.
        title: Title of the progress bar.

    Attributes:
        seconds: Training time so far.
        waited: Time spent waiting for data, in seconds.
        peak: Peak memory in bytes of earlier sessions.
        unreadable: Error message of each image that was skipped because it cannot be read.
    """

    def __init__(self, path: Path, *, every: int, crops_per_step: int, crops_per_epoch: int, title: str = "train") -> None:
        self.path = path
        self.every = every
        self.crops_per_step = crops_per_step
        self.crops_per_epoch = crops_per_epoch
        self.title = title
        self.seconds = self.waited = 0.0
        self.peak = 0
        self.unreadable: set[str] = set()
        self._sums = torch.zeros(2)  # sums of the loss and of its floor
        self._count = 0
        self._mark = self._ended = self._lr = 0.0
        self._line = (0, 0.0)  # step and seconds of the last line
        self._file: Any = None
        self._bar: Any = None
        self._loggers: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        sums, peak = self._sums.tolist(), max(self.peak, peak_memory())
        return {
            "seconds": self.seconds,
            "waited": self.waited,
            "sums": sums,
            "count": self._count,
            "peak": peak,
            "unreadable": sorted(self.unreadable),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state from a checkpoint."""
        self.seconds, self.waited, self.peak = state_dict["seconds"], state_dict["waited"], state_dict["peak"]
        self._sums, self._count = torch.tensor(state_dict["sums"]), state_dict["count"]
        self.unreadable = set(state_dict["unreadable"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes the lines after the checkpoint, since they are written again; starts the clock and the progress bar."""
        self._sums = self._sums.to(pl_module.device)
        first = trainer.is_global_zero
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            desc=self.title,
            smoothing=0.05,
            disable=bar_disabled(show=first),
        )
        self.restart_clock()
        self._line = (trainer.global_step, self.seconds)
        self._loggers = trainer.loggers
        if not first:
            return
        lines = _lines(self.path) if self.path.exists() else []
        kept = [line for line in lines if int(line[0]) <= trainer.global_step]
        text = "".join(f"{','.join(line)}\n" for line in [FIELDS, *kept])
        files.replace(self.path, text.encode())
        self._file = self.path.open("a", buffering=1)  # line-buffered

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the time since the last batch as waiting; reads the learning rate before the schedule changes it."""
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.waited += time.perf_counter() - self._ended
        for message in batch["unreadable"]:
            if message not in self.unreadable:
                self.unreadable.add(message)
                self._bar.write(f"warning: {message}; skipped", file=sys.stderr)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the batch; writes a line if one is due."""
        assert isinstance(pl_module, TrainingModule)
        floor = pl_module.last_floor
        self._sums += torch.stack([pl_module.last_loss, torch.zeros_like(pl_module.last_loss) if floor is None else floor])
        self._count += 1
        self._ended = time.perf_counter()
        if not step_ends(trainer, batch_idx):
            return
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if due:
            pl_module.require_finite(step)
            self._gather(trainer)
            loss, floor_mean = (self._sums.double() / self._count).tolist()  # waits for the device, so before tick
        self.tick()
        self._bar.update(1)
        if due:
            (before, since), self._line = self._line, (step, self.seconds)
            rate = (step - before) * self.crops_per_step / max(self.seconds - since, 1e-9)
            kl = {} if floor is None else {"kl": loss - floor_mean}
            wait = self.waited / self.seconds
            self._append(step, crops_per_second=round(rate, 1), loss=loss, **kl, lr=self._lr, wait=round(wait, 4))
            self._sums.zero_()
            self._count = 0
            name, value = next(iter((kl or {"loss": loss}).items()))
            self._bar.set_postfix({name: f"{value:.4f}", "crops/s": f"{rate:,.0f}", "wait": f"{100 * wait:.0f}%"})

    def add_score(self, trainer: pl.Trainer, top1: float) -> None:
        """Writes a kNN score at this step, on a separate line."""
        self._append(trainer.global_step, knn_top1=top1)

    def sync(self, trainer: pl.Trainer) -> None:
        """Syncs the file to disk, so that it survives a power cut together with the checkpoint saved next."""
        self._gather(trainer)  # a checkpoint has only the first process's sums, which all processes load
        if self._file is not None:
            with files.annotate_oserror(self.path):
                os.fsync(self._file.fileno())

    def finish_steps(self) -> None:
        """Waits for the steps that a GPU has not finished, and counts the wait as training time. Call it before scoring."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.tick()

    def restart_clock(self) -> None:
        """Excludes the time since the end of the last step from the training time."""
        self._mark = self._ended = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the progress bar and the file; gathers the messages about unreadable images from all processes."""
        self._bar.close()
        if self._file is not None:
            with files.annotate_oserror(self.path):
                self._file.close()
        if trainer.world_size > 1:
            messages: list[set[str]] = [set()] * trainer.world_size
            torch.distributed.all_gather_object(messages, self.unreadable)
            self.unreadable = set().union(*messages)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the progress bar, so that the error is printed on a new line."""
        if self._bar is not None:
            self._bar.close()

    def _gather(self, trainer: pl.Trainer) -> None:
        """Replaces the sums of this process by the mean over all processes."""
        if trainer.world_size > 1:
            self._sums = trainer.strategy.reduce(self._sums, reduce_op="mean")

    def tick(self) -> None:
        """Adds the time since the last call to the training time, and ends the step."""
        now = time.perf_counter()
        self.seconds += now - self._mark
        self._mark = self._ended = now

    def _append(self, step: int, **values: float) -> None:
        if self._file is None:  # not the first process
            return
        crops = step * self.crops_per_step
        line = {
            "step": step,
            "epoch": crops / self.crops_per_epoch,
            "crops": crops,
            "seconds": round(self.seconds, 3),
            **values,
        }
        with files.annotate_oserror(self.path):
            self._file.write(",".join(str(line.get(field, "")) for field in FIELDS) + "\n")
        for logger in self._loggers:
            logger.log_metrics({key: float(value) for key, value in line.items() if key != "step"}, step)


def step_ends(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether this batch is the last part of an optimiser step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def _lines(path: Path) -> list[list[str]]:
    """The complete lines of a metrics.csv, without a truncated last line; raises RequestError as `read_metrics`."""
    text = files.read_user_file(path, _MAX_BYTES).decode(errors="replace")
    rows = [line.split(",") for line in text.splitlines()[1:]]
    rows = [row for row in rows if len(row) == len(FIELDS)]
    for row in rows:
        try:
            [int(row[0]), *(float(cell) for cell in row if cell)]
        except ValueError as error:
            raise RequestError(f"{path}: damaged ({error}); restore it, or delete it to continue without its lines") from error
    return rows


def peak_memory() -> int:
    """The peak memory of this process in bytes: GPU memory if a GPU is used, otherwise resident memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the parent's memory at the time of the fork
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Reads the complete lines of a metrics.csv; empty cells are None. Raises RequestError if it is missing or damaged."""
    return [{key: float(cell) if cell else None for key, cell in zip(FIELDS, row, strict=True)} for row in _lines(path)]
