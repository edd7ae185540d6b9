"""Lightning's Trainer as every training here uses it: by steps, with our own loader, bar, metrics and checkpoints."""

import logging
import signal
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from fkd_ssl.errors import CheckpointError


def fit(
    module: pl.LightningModule,
    loader: Any,
    callbacks: list[pl.Callback],
    *,
    steps: int,
    precision: Any,
    folder: Path,
    last: Path | None,
) -> None:
    """Trains `module` for `steps` in all, from the checkpoint `last` on if there is one.

    Raises:
        KeyboardInterrupt: The training was stopped.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Lightning advises more workers than a small machine has, and counts batches of a loader that we cut ourselves
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="auto",
            devices=1,
            precision=precision,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(folder),
        )
        try:
            trainer.fit(module, loader, ckpt_path=last)
        except SystemExit as stop:  # what Lightning makes of Ctrl-C; it also stops listening to further ones
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from stop


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint of Lightning's was saved at; raises CheckpointError where it is damaged."""
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:  # whatever a damaged file makes torch raise
        raise CheckpointError(f"{checkpoint}: damaged ({type(error).__name__}); delete it to train anew") from error
