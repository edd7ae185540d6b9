"""Checkpoints of a run and kNN scores of the student during training."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from fkd_ssl.students import Student
from fkd_ssl.training.distiller import Distiller
from fkd_ssl.training.metrics import MetricsWriter, step_ends
from fkd_ssl.training.module import TrainingModule

BEST = "best.ckpt"
AGREE = 8
"""Number of steps after which several processes agree on stopping; each time, they wait for their GPUs."""
Score = Callable[[Student], float]


def last_checkpoint(run: Path) -> Path:
    """The path of the last checkpoint of a run folder."""
    return run / "checkpoints" / "last.ckpt"


class Monitor(pl.Callback):
    """Saves `last.ckpt` every `save_every` steps, and scores the student every `score_every` steps and saves the best one.

    On SIGTERM, which a cluster sends before it preempts a machine, it saves a checkpoint after the current step and stops.
    Several processes stop together, up to AGREE steps later.

    Args:
        run: The run folder.
        metrics: Writes the scores to metrics.csv.
        score: Returns the kNN accuracy in percent of a student in eval mode; None disables scoring.
        score_every: Number of steps between two scores; the last step is always scored.
        save_every: Number of steps between two checkpoints; the last step is always saved.
        save_interval: Minimum number of seconds between two checkpoints; one that comes too soon is left out.

    Attributes:
        best: Highest score so far and its step.
        last: The latest score.
    """

    def __init__(
        self,
        run: Path,
        metrics: MetricsWriter,
        score: Score | None,
        *,
        score_every: int,
        save_every: int,
        save_interval: float,
    ) -> None:
        self.checkpoint = last_checkpoint(run)
        self.metrics = metrics
        self.score = score
        self.score_every = score_every
        self.save_every = save_every
        self.save_interval = save_interval
        self.best: tuple[float, int] | None = None
        self.last: float | None = None
        self._stopping = False
        self._saved = 0.0  # time of the last checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replaces Lightning's SIGTERM handler, which stops without saving; Lightning restores the handler at the end."""
        self._saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"best": self.best, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state from a checkpoint."""
        self.best, self.last = state_dict["best"], state_dict["last"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Scores and saves if due.

        Raises:
            KeyboardInterrupt: SIGTERM was received.
        """
        if not step_ends(trainer, batch_idx):
            return
        step, end, stop = trainer.global_step, trainer.global_step == trainer.max_steps, self._stopping
        if trainer.world_size > 1:  # they may receive SIGTERM at different steps
            stop = step % AGREE == 0 and trainer.strategy.reduce_boolean_decision(self._stopping, all=False)
        self.metrics.tick()  # the agreement waits for the step
        # not shortly before the last step, which is always scored
        due = step % self.score_every == 0 and trainer.max_steps - step >= self.score_every / 2
        save = end or stop or (step % self.save_every == 0 and self._interval_is_over(trainer))
        assert isinstance(pl_module, TrainingModule)
        if save or due:
            self.metrics.finish_steps()
            pl_module.require_finite(step)  # a diverged training is not saved
        if self.score is not None and (end or due):
            try:
                self._score(trainer, pl_module, self.score)
            except BaseException:
                if not end and trainer.world_size == 1:  # saves the progress; the last step is scored again
                    self._save(trainer, pl_module)
                raise
        if save:
            self._save(trainer, pl_module)
        self.metrics.restart_clock()  # scoring and saving are not training
        if stop and not end:
            raise KeyboardInterrupt

    def _interval_is_over(self, trainer: pl.Trainer) -> bool:
        """Whether the last checkpoint is old enough; the same in all processes, since each of them takes part in saving."""
        over = time.monotonic() - self._saved >= self.save_interval
        return over if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(over, all=False)

    def _save(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        self.metrics.sync(trainer)
        trainer.save_checkpoint(self.checkpoint)
        self._saved = time.monotonic()
        module.saved = checkpoint_message(self.checkpoint, trainer.global_step)

    def _score(self, trainer: pl.Trainer, module: TrainingModule, score: Score) -> None:
        assert isinstance(module, Distiller)
        student, top1 = module.result, 0.0
        training = student.training
        if trainer.is_global_zero:
            student.eval()
            with torch.no_grad():
                top1 = score(student)
            student.train(training)
        self.last = trainer.strategy.broadcast(top1)
        self.metrics.add_score(trainer, self.last)
        if self.best is None or self.last > self.best[0]:
            self.best = (self.last, trainer.global_step)
            trainer.save_checkpoint(self.checkpoint.with_name(BEST))


def checkpoint_message(checkpoint: Path, step: int) -> str:
    """The sentence of an error message about the last checkpoint."""
    return f"the last good checkpoint is {checkpoint}, of step {step}"
