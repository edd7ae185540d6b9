"""kNN during training, and the checkpoints of a run."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from fkd_ssl.students import Student
from fkd_ssl.training.distiller import Distiller
from fkd_ssl.training.recorder import Recorder, step_ends

LAST, BEST = "last.ckpt", "best.ckpt"
Score = Callable[[Student], float]


class Monitor(pl.Callback):
    """Saves `last.ckpt` every `save_every` steps; scores the student every `score_every` and keeps the best.

    A SIGTERM, which a cluster sends before it takes a machine away, saves one after the step that it falls in, and stops.

    Attributes:
        best: Highest score so far and its step.
        last: The latest score.
    """

    def __init__(self, folder: Path, recorder: Recorder, score: Score | None, *, score_every: int, save_every: int) -> None:
        self.folder = folder
        self.recorder = recorder
        self.score = score
        self.score_every = score_every
        self.save_every = save_every
        self.best: tuple[float, int] | None = None
        self.last: float | None = None
        self._stopping = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listens to SIGTERM in the place of Lightning, which stops without saving; Lightning puts back what was before."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {"best": self.best, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        self.best, self.last = state_dict["best"], state_dict["last"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Scores and saves when it is time.

        Raises:
            KeyboardInterrupt: There was a SIGTERM.
        """
        if not step_ends(trainer, batch_idx):
            return
        # of several processes each may hear it in another step
        stop = (
            self._stopping if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(self._stopping, all=False)
        )
        step, end = trainer.global_step, trainer.global_step == trainer.max_steps
        due = step % self.score_every == 0 and trainer.max_steps - step >= self.score_every / 2  # the last step is near
        save = end or stop or step % self.save_every == 0
        assert isinstance(pl_module, Distiller)
        if save or due:
            pl_module.require_finite(step)  # no checkpoint of a diverged student
        if self.score is not None and (end or due):
            try:
                self._score(trainer, pl_module)
            except BaseException:
                if not end and trainer.world_size == 1:  # what was trained is not lost; the last step is scored anew
                    self._save(trainer, pl_module)
                raise
        if save:
            self._save(trainer, pl_module)
        self.recorder.restart_clock()  # neither scoring nor saving is training
        if stop and not end:
            raise KeyboardInterrupt

    def _save(self, trainer: pl.Trainer, pl_module: Distiller) -> None:
        self.recorder.sync(trainer)
        trainer.save_checkpoint(self.folder / LAST)
        pl_module.saved = f"the last good checkpoint is {self.folder / LAST}, of step {trainer.global_step}"

    def _score(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        assert self.score is not None
        student, score = pl_module.result, 0.0
        training = student.training
        if trainer.is_global_zero:
            student.eval()
            with torch.no_grad():
                score = self.score(student)
            student.train(training)
        self.last = trainer.strategy.broadcast(score)
        self.recorder.score(trainer, self.last)
        if self.best is None or self.last > self.best[0]:
            self.best = (self.last, trainer.global_step)
            trainer.save_checkpoint(self.folder / BEST)
