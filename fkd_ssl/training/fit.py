"""Lightning's Trainer as every training here uses it: by steps, with our own loader, bar, metrics and checkpoints."""

import io
import logging
import os
import signal
import warnings
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
from fkd_ssl.training.sampler import PassSampler

RUN_KEY = "fkd_ssl_run"
"""Where a checkpoint says which run it is of."""


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or as they were before, also after a power cut.

    Lightning's own way is by the system's temporary folder, from where a file is copied over the last good one if the run
    lies on another disk.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Reads one as every file of weights is read here."""
        loaded: dict[str, Any] = checkpoints.load(path)
        return loaded

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes beside the last one and takes its place; raises FkdError where the run folder was removed."""
        runs.require_held(self.folder)
        data = io.BytesIO()
        torch.save(checkpoint, data)
        Path(path).parent.mkdir(exist_ok=True)
        files.replace(Path(path), data.getbuffer())
        files.sync_folder(Path(path).parent)


def fit(
    module: pl.LightningModule,
    loader: Loader,
    callbacks: list[pl.Callback],
    *,
    steps: int,
    precision: Any,
    folder: Path,
    identity: dict[str, Any],
    last: Path | None,
    devices: int = 1,
    sync_batchnorm: bool = False,
    clip: float | None = None,
    logger: Logger | None = None,
) -> None:
    """Trains `module` for `steps` in all, from the checkpoint `last` on if there is one.

    Args:
        module: What is trained.
        loader: Its batches; its batch sampler is a PassSampler, which is told here which process this is.
        callbacks: Beside it.
        steps: Of the optimiser.
        precision: In Lightning's terms.
        folder: Of the run.
        identity: What its checkpoints keep of the run, see `runs.identity`.
        last: The checkpoint.
        devices: Processes on this machine. Lightning starts them as further calls of this command line, unless torchrun has
            started this process: its numbers are then what counts.
        sync_batchnorm: BatchNorm over all processes.
        clip: Greatest norm of the gradient.
        logger: Takes metrics.

    Raises:
        KeyboardInterrupt: The training was stopped.
        RequestError: The processes do not divide a batch.
    """
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
        # Lightning advises more workers than a small machine has, and counts batches of a loader that we cut ourselves
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=devices,
            num_nodes=nodes,
            # The other processes wait while the first one scores. Nothing is broadcast at each step: running means change no
            # training, the first process's are saved, and queues are the same in all.
            strategy="auto" if devices * nodes == 1 else DDPStrategy(timeout=timedelta(hours=2), broadcast_buffers=False),
            sync_batchnorm=sync_batchnorm,
            accumulate_grad_batches=sampler.parts,
            gradient_clip_val=clip,
            precision=precision,
            callbacks=[*callbacks, _Identity(identity)],
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
        except SystemExit as stop:  # what Lightning makes of Ctrl-C; it also stops listening to further ones
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if ours:
                _end_gloo()
            raise KeyboardInterrupt from stop
        if ours:
            _end_gloo()


class _Identity(pl.Callback):
    """Has each checkpoint say which run it is of."""

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds what `step_of` compares."""
        checkpoint[RUN_KEY] = self.identity


def _end_gloo() -> None:
    """Ends the threads of gloo, which abort a Python that is ending while they hold a tensor; Lightning ends NCCL's.

    Not for a training that failed: a collective that is on its way is waited for, and another process may never join it.
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
