"""Pretraining a teacher: the one path for all methods, under Lightning."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from fkd_ssl import files, images, runs
from fkd_ssl.data import start_worker
from fkd_ssl.errors import RequestError
from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.pretraining.method import Method
from fkd_ssl.pretraining.mocov2 import MoCo
from fkd_ssl.pretraining.progress import LAST, Progress
from fkd_ssl.pretraining.swav import SwAV
from fkd_ssl.training.fit import fit, step_of
from fkd_ssl.training.sampler import PassSampler

CHECKPOINT = "checkpoint.pth.tar"
_METHODS: dict[str, type[MoCo] | type[SwAV]] = {"mocov2": MoCo, "swav": SwAV}


def pretrain(config: PretrainConfig, *, log: Callable[[str], None] = lambda message: None) -> Path:
    """Trains a teacher, or continues from the last whole epoch of the same config's run.

    Args:
        config: The run.
        log: Takes lines for the user.

    Returns:
        The checkpoint, for `load_teacher(config.method, checkpoint=...)`.

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
    module: Method = _METHODS[config.method](config, len(found))
    sampler = PassSampler(len(found), config.batch_size, module.steps, seed=config.seed)
    progress = Progress(folder, every=config.log_every, epoch=len(found) / config.batch_size)
    last: Path | None = folder / LAST
    if last is not None and last.exists():
        sampler.start = step_of(last)
        log(f"{folder}: continues from step {sampler.start} of {module.steps}")
    else:
        last = None
    crops, collate = module.crops(found)
    loader = DataLoader(
        crops,
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    fit(module, loader, [progress], steps=module.steps, precision=config.precision, folder=folder, last=last)
    saved = io.BytesIO()
    torch.save({"epoch": config.epochs, "arch": config.arch, "state_dict": module.teacher_state()}, saved)
    files.replace(folder / CHECKPOINT, saved.getvalue())
    runs.finish(
        folder,
        {
            "checkpoint": CHECKPOINT,
            "epochs": config.epochs,
            "steps": module.steps,
            "images": len(found),
            "queue": module.queue,
            "loss": progress.lines[-1]["loss"],
            "train_seconds": round(progress.seconds, 3),
        },
    )
    return folder / CHECKPOINT
