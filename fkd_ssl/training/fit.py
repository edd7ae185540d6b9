"""The training loop of students and teachers: Lightning's Trainer by steps, with our own metrics, checkpoints and resume."""

import io
import logging
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

from fkd_ssl import checkpoints, files, processes, runs
from fkd_ssl.data import Loader
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.errors import CheckpointError, RequestError
from fkd_ssl.targets.precision import uses_tf32
from fkd_ssl.training.metrics import METRICS, MetricsWriter, peak_memory
from fkd_ssl.training.module import TrainingModule
from fkd_ssl.training.monitor import Monitor, Score, checkpoint_message, last_checkpoint

RUN_KEY = "fkd_ssl_run"
"""Key in a checkpoint that identifies its run."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically: after a crash or a power cut the file is complete or still the previous one.

    Lightning itself writes to the system's temporary folder; if the run folder is on another disk, it then copies the file over
    the last good one, which is not atomic.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Reads a checkpoint without executing code from it."""
        loaded: dict[str, Any] = checkpoints.load(path)
        return loaded

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a temporary file and renames it. Raises FkdError if the run folder was removed."""
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
    """Trains a module to its last step, resuming from the run's last checkpoint if any.

    Writes metrics.csv and checkpoints/, with a checkpoint after an epoch, to the run folder.

    Args:
        module: The network to train.
        loader: Its batches. The batch sampler must be a PassSampler; its rank is set here.
        folder: The run folder.
        config: The run's config, with `precision`, `log_every` and `checkpoint_interval`.
        inputs: Inputs of the run; see `runs.Inputs`. If None, they are not compared with the checkpoint's.
        crops_per_step: Number of crops per step.
        crops_per_epoch: Number of crops per epoch.
        callbacks: Further callbacks, called before those of this function.
        score: Returns the kNN accuracy in percent of a student in eval mode.
        score_every: Number of epochs between two scores.
        devices: Number of processes on this machine. Lightning starts them with the same command line. Under torchrun, the
            number that torchrun gives is used instead.
        sync_batchnorm: Whether BatchNorm uses the crops of all processes.
        clip: Maximum norm of the gradient.
        logger: Also receives the lines of metrics.csv.
        title: Title of the progress bar.

    Returns:
        `steps`, `train_seconds`, `crops_per_second`, `tf32`, `data_wait`, `unreadable_images`, `peak_memory_bytes`, `knn_top1`,
        `knn_best`.

    Raises:
        CheckpointError: The last checkpoint is damaged.
        RequestError: The checkpoint belongs to another config or other inputs, or the processes do not divide a batch.
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
        save_interval=config.checkpoint_interval,
    )
    last = last_checkpoint(folder)
    if last.exists():
        assert isinstance(loader.batch_sampler, PassSampler)
        loader.batch_sampler.start = step_of(last, config, inputs)
        module.saved = checkpoint_message(last, loader.batch_sampler.start)
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
        "crops_per_second": round(module.steps * crops_per_step / max(metrics.seconds, 1e-9), 1),
        "tf32": uses_tf32(config.precision),
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
    """Runs Lightning's Trainer by steps, with our own sampler, progress bar, metrics and checkpoints."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    sampler = loader.batch_sampler
    assert isinstance(sampler, PassSampler)
    nodes = 1
    plugins: list[Any] = [AtomicCheckpoints(folder)]
    if not is_torchelastic_launched():  # or Lightning adapts to SLURM and requeues the job
        plugins.append(LightningEnvironment())
    else:
        devices = processes.number("LOCAL_WORLD_SIZE", 1)
        nodes = processes.number("WORLD_SIZE", 1) // devices
    with warnings.catch_warnings():
        # Lightning warns about few workers, even on a small machine, and about the length of our loader
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer = pl.Trainer(
            max_steps=module.steps,
            max_epochs=-1,
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=devices,
            num_nodes=nodes,
            # Long timeout: the other processes wait while the first one scores. Buffers need no broadcast at each step: running
            # means do not affect training and only the first process saves them, and queues are equal in all processes.
            strategy="auto"
            if devices * nodes == 1
            else DDPStrategy(
                timeout=timedelta(hours=2),
                broadcast_buffers=False,
                find_unused_parameters=module.unused_parameters,
            ),
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
            sampler.set_rank(trainer.global_rank, trainer.world_size)
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
    """Writes the identity of the run into each checkpoint."""

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the identity, which `step_of` checks."""
        checkpoint[RUN_KEY] = self.identity


def _end_gloo() -> None:
    """Ends gloo's threads, which abort Python at exit if they still hold a tensor; Lightning itself ends NCCL's.

    Do not call it after a failed training: it waits for running collectives, which another process may never join.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def step_of(checkpoint: Path, config: Any, inputs: runs.Inputs | None) -> int:
    """Returns the step of a checkpoint of this run.

    Raises:
        CheckpointError: The file is damaged.
        RequestError: It belongs to another config, or to other inputs unless `inputs` is None.
    """
    try:
        saved = checkpoints.load(checkpoint, mapped=True)
        step, run = int(saved["global_step"]), saved.get(RUN_KEY)
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: damaged ({type(error).__name__}); delete it to train from the start") from error
    runs.check_identity(checkpoint, run, config, inputs)
    return step
