"""The one loop of all trainings: Lightning's Trainer by steps, with our own metrics.csv, checkpoints and resume."""

import io
import logging
import os
import signal
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed import is_torchelastic_launched

from fkd_ssl import checkpoints, files, runs
from fkd_ssl.data import Loader
from fkd_ssl.errors import CheckpointError, RequestError
from fkd_ssl.training.metrics import METRICS, MetricsWriter, peak_memory
from fkd_ssl.training.module import TrainingModule
from fkd_ssl.training.monitor import Monitor, Score, last_checkpoint, saved_words
from fkd_ssl.training.sampler import PassSampler

RUN_KEY = "fkd_ssl_run"
"""The key in a checkpoint of the run that it belongs to."""


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically: after a crash or a power cut the file is complete, or the one before it.

    Lightning writes to the system's temporary folder, from where a file is copied over the last good one if the run folder is
    on another disk.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Reads one as every file of weights is read here."""
        loaded: dict[str, Any] = checkpoints.load(path)
        return loaded

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a temporary file and renames it; raises FkdError if the run folder was removed."""
        runs.require_held(self.folder)
        data = io.BytesIO()
        torch.save(checkpoint, data)
        Path(path).parent.mkdir(exist_ok=True)
        files.replace(Path(path), data.getbuffer())
        files.sync_folder(Path(path).parent)


def fit(
    module: TrainingModule,
    loader: Loader,
    folder: Path,
    *,
    config: Any,
    inputs: runs.Inputs | None,
    crops_per_step: int,
    crops_per_epoch: int,
    callbacks: Sequence[pl.Callback] = (),
    score: Score | None = None,
    score_every: float = 1,
    devices: int = 1,
    sync_batchnorm: bool = False,
    clip: float | None = None,
    logger: Logger | None = None,
    title: str = "train",
) -> dict[str, Any]:
    """Trains a module to its last step, from the run's last checkpoint on if there is one.

    Leaves metrics.csv, and checkpoints/ with a checkpoint of every epoch, in the run folder.

    Args:
        module: The network in training.
        loader: Its batches; the batch sampler is a PassSampler, which is told here which process this is.
        folder: The run folder.
        config: The run's config, with `precision` and `log_every`.
        inputs: What the run reads; see `runs.Inputs`. None does not compare them with the checkpoint's.
        crops_per_step: Crops in a step.
        crops_per_epoch: Crops in an epoch.
        callbacks: Further callbacks, called before those of this function.
        score: kNN accuracy in percent of a student in eval mode.
        score_every: Epochs between two scores.
        devices: Processes on this machine. Lightning starts them as further calls of this command line, unless torchrun has
            started this process, and says how many there are.
        sync_batchnorm: Whether BatchNorm is over the crops of all processes.
        clip: Greatest norm of the gradient.
        logger: Takes the lines of metrics.csv too.
        title: Of the progress bar.

    Returns:
        `steps`, `train_seconds`, `data_wait`, `unreadable_images`, `peak_memory_bytes`, `knn_top1`, `knn_best`.

    Raises:
        CheckpointError: The last checkpoint is damaged.
        RequestError: It is of another config or other inputs, or the processes do not divide a batch.
        FkdError: The training diverged.
        KeyboardInterrupt: The training was stopped.
    """
    steps_per_epoch = crops_per_epoch / crops_per_step
    metrics = MetricsWriter(
        folder / METRICS, every=config.log_every, crops_per_step=crops_per_step, crops_per_epoch=crops_per_epoch, title=title
    )
    monitor = Monitor(
        folder,
        metrics,
        score,
        score_every=max(1, round(score_every * steps_per_epoch)),
        save_every=max(1, round(steps_per_epoch)),
    )
    last = last_checkpoint(folder)
    if last.exists():
        assert isinstance(loader.batch_sampler, PassSampler)
        loader.batch_sampler.start = step_of(last, config, inputs)
        module.saved = saved_words(last, loader.batch_sampler.start)
    _run_trainer(
        module,
        loader,
        [*callbacks, metrics, monitor, _Identity(runs.identity(config, inputs or {}))],
        folder,
        precision=config.precision,
        devices=devices,
        sync_batchnorm=sync_batchnorm,
        clip=clip,
        logger=logger,
        last=last if last.exists() else None,
    )
    return {
        "steps": module.steps,
        "train_seconds": round(metrics.seconds, 3),
        "data_wait": round(metrics.waited / max(metrics.seconds, 1e-9), 4),
        "unreadable_images": len(metrics.unreadable),
        "peak_memory_bytes": max(metrics.peak, peak_memory()),
        "knn_top1": monitor.last,
        "knn_best": None if monitor.best is None else {"top1": monitor.best[0], "step": monitor.best[1]},
    }


def _run_trainer(
    module: TrainingModule,
    loader: Loader,
    callbacks: list[pl.Callback],
    folder: Path,
    *,
    precision: Any,
    devices: int,
    sync_batchnorm: bool,
    clip: float | None,
    logger: Logger | None,
    last: Path | None,
) -> None:
    """Lightning's Trainer as `fit` uses it: by steps, with our own sampler, progress bar, metrics and checkpoints."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    sampler = loader.batch_sampler
    assert isinstance(sampler, PassSampler)
    nodes = 1
    plugins: list[Any] = [WholeCheckpoints(folder)]
    if not is_torchelastic_launched():  # nor does SLURM start the processes, or Lightning save and queue the job again
        plugins.append(LightningEnvironment())
    else:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    with warnings.catch_warnings():
        # Lightning recommends more workers than a small machine has, and warns about the length of our loader
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer = pl.Trainer(
            max_steps=module.steps,
            max_epochs=-1,
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=devices,
            num_nodes=nodes,
            # The other processes wait while the first one scores. Buffers are not broadcast at each step: running means do not
            # change the training, the first process's are saved, and queues are the same in all processes.
            strategy="auto" if devices * nodes == 1 else DDPStrategy(timeout=timedelta(hours=2), broadcast_buffers=False),
            sync_batchnorm=sync_batchnorm,
            accumulate_grad_batches=sampler.parts,
            gradient_clip_val=clip,
            precision=precision,
            callbacks=callbacks,
            plugins=plugins,
            logger=False if logger is None else logger,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(folder),
        )
        try:
            sampler.share(trainer.global_rank, trainer.world_size)
        except ValueError as error:
            raise RequestError(f"batch_size: {error}; choose another --batch_size or number of processes") from error
        ours = not torch.distributed.is_initialized()
        try:
            trainer.fit(module, loader, ckpt_path=last)
        except SystemExit as stop:  # Lightning raises it on Ctrl-C, and ignores further ones
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if ours:
                _end_gloo()
            raise KeyboardInterrupt from stop
        if ours:
            _end_gloo()


class _Identity(pl.Callback):
    """Writes into each checkpoint which run it belongs to."""

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds what `step_of` checks."""
        checkpoint[RUN_KEY] = self.identity


def _end_gloo() -> None:
    """Ends gloo's threads, which abort Python at exit if they still hold a tensor; Lightning ends NCCL's.

    Not for a training that failed: this waits for a running collective, which another process may never join.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def step_of(checkpoint: Path, config: Any, inputs: runs.Inputs | None) -> int:
    """The step that a checkpoint of this run was saved at.

    Raises:
        CheckpointError: The file is damaged.
        RequestError: It is of another config, or of other inputs unless `inputs` is None.
    """
    try:
        saved = checkpoints.load(checkpoint, mapped=True)
        step, run = int(saved["global_step"]), saved.get(RUN_KEY)
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: damaged ({type(error).__name__}); delete it to train from the start") from error
    runs.check_identity(checkpoint, run, config, inputs)
    return step
