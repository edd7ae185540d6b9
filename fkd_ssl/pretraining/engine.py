"""Pretraining of a teacher, with the same Lightning code for all methods."""

import io
from collections.abc import Callable
from pathlib import Path

import torch

from fkd_ssl import files, images, runs
from fkd_ssl.data import Loader, whole_batch
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.errors import RequestError
from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.pretraining.method import Method
from fkd_ssl.pretraining.mocov2 import MoCo
from fkd_ssl.pretraining.swav import SwAV
from fkd_ssl.students import check_student
from fkd_ssl.students.export import export
from fkd_ssl.text import plural
from fkd_ssl.training.fit import fit
from fkd_ssl.training.metrics import METRICS, read_metrics

CHECKPOINT, STUDENT = "checkpoint.pth.tar", "student.safetensors"
_METHODS: dict[str, type[MoCo] | type[SwAV]] = {"mocov2": MoCo, "swav": SwAV}


def pretrain(config: PretrainConfig, *, log: Callable[[str], None] = lambda message: None) -> Path:
    """Pretrains a teacher, or a student without a teacher; continues an interrupted run of the same config from its last epoch.

    Args:
        config: Config of the run.
        log: Called with each line for the user.

    Returns:
        The path of the checkpoint, for `load_teacher(config.method, checkpoint=...)`, or of a student's backbone, for
        `load_student`.

    Raises:
        RequestError: The output folder has another run, the set has fewer images than a batch, or the network is unknown.
        ImageError: An image cannot be read.
    """
    image_set = images.open_images(config.images)
    check_pretraining(config, image_set)
    inputs = image_set.identity()
    with runs.open_run(config.out, config, inputs) as (folder, state):
        if state == "done":
            log(f"{folder}: already finished")
        else:
            log(f"{folder}: {'continuing' if state == 'resume' else 'training'} {config.arch} on {len(image_set):,} images")
            skipped = _pretrain(config, image_set, folder, inputs)
            if skipped:
                log(f"warning: skipped {plural(skipped, 'unreadable image')}")
    return folder / weights_file(config)


def _pretrain(config: PretrainConfig, image_set: images.ImageSource, folder: Path, inputs: runs.Inputs) -> int:
    """Trains in the locked run folder and writes weights and results.json; returns the number of skipped images."""
    torch.manual_seed(config.seed)
    module: Method = _METHODS[config.method](config, len(image_set))
    sampler = PassSampler(len(image_set), config.batch_size, module.steps, seed=config.seed)
    found = fit(
        module,
        Loader(module.crops(image_set), sampler, workers=config.workers, collate=whole_batch),
        folder,
        config=config,
        inputs=inputs,
        crops_per_step=module.views * config.batch_size,
        crops_per_epoch=module.views * len(image_set),
        title="pretrain",
    )
    path = folder / weights_file(config)
    if isinstance(module, MoCo) and not config.is_teacher:
        export(module.student(), path, layout=None, pixels=config.pixels)
    else:
        buffer = io.BytesIO()
        torch.save({"epoch": config.epochs, "arch": config.arch, "state_dict": module.teacher_state()}, buffer)
        files.replace(path, buffer.getvalue())
    results = {
        "checkpoint": path.name,
        "epochs": config.epochs,
        "images": len(image_set),
        "queue": module.queue,
        "loss": next((line["loss"] for line in reversed(read_metrics(folder / METRICS))), None),
        **{key: found[key] for key in ("steps", "train_seconds", "data_wait", "peak_memory_bytes", "unreadable_images")},
    }
    runs.finish(folder, results)
    return int(found["unreadable_images"])


def check_pretraining(config: PretrainConfig, image_set: images.ImageSource) -> None:
    """Raises RequestError if the set has too few images or the network is unknown."""
    if not config.is_teacher:
        check_student(config.arch, config.pixels, stem=config.stem, width=config.width)
    if config.batch_size > len(image_set):
        raise RequestError(f"batch_size {config.batch_size}: there are {len(image_set)} images; choose at most that many")


def weights_file(config: PretrainConfig) -> str:
    """The name of the file with the trained weights in the run folder."""
    return CHECKPOINT if config.is_teacher else STUDENT
