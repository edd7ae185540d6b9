"""Pretraining a teacher: the one path for all methods, under Lightning."""

import io
from collections.abc import Callable
from pathlib import Path

import torch

from fkd_ssl import files, images, runs
from fkd_ssl.data import Loader
from fkd_ssl.errors import RequestError
from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.pretraining.method import Method
from fkd_ssl.pretraining.mocov2 import MoCo
from fkd_ssl.pretraining.progress import LAST, Progress
from fkd_ssl.pretraining.swav import SwAV
from fkd_ssl.students import check_student
from fkd_ssl.students.export import export
from fkd_ssl.training.fit import fit, step_of
from fkd_ssl.training.recorder import peak_memory
from fkd_ssl.training.sampler import PassSampler

CHECKPOINT, STUDENT = "checkpoint.pth.tar", "student.safetensors"
_METHODS: dict[str, type[MoCo] | type[SwAV]] = {"mocov2": MoCo, "swav": SwAV}


def pretrain(config: PretrainConfig, *, log: Callable[[str], None] = lambda message: None) -> Path:
    """Trains a teacher, or continues from the last whole epoch of the same config's run.

    Args:
        config: The run.
        log: Takes lines for the user.

    Returns:
        The checkpoint, for `load_teacher(config.method, checkpoint=...)`; or a student's backbone, for `load_student`.

    Raises:
        RequestError: The output folder holds another run, there are fewer images than a batch has, or no such network.
        ImageError: An image cannot be read.
    """
    found = images.scan(config.images)
    check_pretraining(config, found)
    inputs = found.identity()
    with runs.open_run(config.out, config, inputs) as (folder, state):
        if state == "done":
            log(f"{folder}: finished already")
        else:
            _pretrain(config, found, folder, inputs, log)
    return folder / weights_of(config)


def _pretrain(
    config: PretrainConfig, found: images.ImageSet, folder: Path, inputs: runs.Inputs, log: Callable[[str], None]
) -> None:
    """Trains in the run folder, which is locked, and writes the weights and results.json."""
    torch.manual_seed(config.seed)
    module: Method = _METHODS[config.method](config, len(found))
    sampler = PassSampler(len(found), config.batch_size, module.steps, seed=config.seed)
    progress = Progress(folder, every=config.log_every, epoch=len(found) / config.batch_size)
    last: Path | None = folder / LAST
    if last is not None and last.exists():
        sampler.start = step_of(last, config, inputs)
        log(f"{folder}: continues from step {sampler.start} of {module.steps}")
    else:
        last = None
    crops, collate = module.crops(found)
    loader = Loader(crops, sampler, workers=config.workers, collate=collate)
    fit(
        module,
        loader,
        [progress],
        steps=module.steps,
        precision=config.precision,
        folder=folder,
        identity=runs.identity(config, inputs),
        last=last,
    )
    made = weights_of(config)
    if isinstance(module, MoCo) and not config.is_teacher:
        export(module.student(), folder / made, layout=None, pixels=config.pixels)
    else:
        saved = io.BytesIO()
        torch.save({"epoch": config.epochs, "arch": config.arch, "state_dict": module.teacher_state()}, saved)
        files.replace(folder / made, saved.getvalue())
    runs.finish(
        folder,
        {
            "checkpoint": made,
            "epochs": config.epochs,
            "steps": module.steps,
            "images": len(found),
            "queue": module.queue,
            "loss": progress.lines[-1]["loss"],
            "train_seconds": round(progress.seconds, 3),
            "peak_memory_bytes": peak_memory(),
        },
    )


def check_pretraining(config: PretrainConfig, found: images.ImageSet) -> None:
    """Raises RequestError where these images cannot be trained on, or there is no such network."""
    if not config.is_teacher:
        check_student(config.arch, config.pixels, stem=config.stem, width=config.width)
    if config.batch_size > len(found):
        raise RequestError(f"batch_size {config.batch_size}: there are {len(found)} images; choose at most as many")


def weights_of(config: PretrainConfig) -> str:
    """The file in a run's folder that has what was trained."""
    return CHECKPOINT if config.is_teacher else STUDENT
