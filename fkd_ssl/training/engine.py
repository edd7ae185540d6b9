"""Training of a student, with the same code for stored and online targets."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor
from torch.distributed import is_torchelastic_launched

from fkd_ssl import processes, runs
from fkd_ssl.data import Crops, Loader, StoredCrops, whole_batch
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.errors import RequestError
from fkd_ssl.objectives import Objective, make_objectives
from fkd_ssl.store.write.recording import Recording
from fkd_ssl.students import CLASSIFIER, Student, dims_of
from fkd_ssl.targets import TeacherInfo
from fkd_ssl.targets.precision import uses_tf32
from fkd_ssl.targets.sharing import network_key
from fkd_ssl.text import plural
from fkd_ssl.training import defaults
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.distiller import Distiller
from fkd_ssl.training.fit import fit
from fkd_ssl.training.groups import teacher_precision
from fkd_ssl.training.monitor import Score
from fkd_ssl.training.recording_targets import RecordingCallback, RecordingTargets
from fkd_ssl.training.single_crop import SingleCropPasses
from fkd_ssl.training.targets import CalibratedTargets, LabelTargets, OnlineTargets, Targets, stored_targets


def objectives_of(config: TrainConfig, targets: Sequence[TeacherInfo]) -> list[Objective]:
    """Makes each teacher's objective; raises RequestError as make_objectives, or if the head or an option does not fit."""
    for k, teacher in enumerate(targets):
        kind, what = teacher.spec.kind, teacher.spec.definition.display_name
        # after class probabilities, tokens have a linear head
        if (config.head == CLASSIFIER) != (kind == "distribution") and (kind != "tokens" or k == 0):
            head = CLASSIFIER if kind == "distribution" else "mocov2 or simreg"
            raise RequestError(f"head {config.head}: the targets of {teacher.name!r} are {what}: choose --head {head}")
        for option, value in (
            ("mixup", config.mixup),
            ("cutmix", config.cutmix),
            ("calibrate_below", config.calibrate_below),
        ):
            if value and kind != "distribution":
                raise RequestError(
                    f"{option} {value}: the targets of {teacher.name!r} are {what}; it is for class probabilities"
                )
    return make_objectives(config.objective, targets)


def student_options(config: TrainConfig) -> dict[str, Any]:
    """The options of Student and check_student."""
    return {"head": config.head, "stem": config.stem, "width": config.width, "drop_path": config.drop_path}


def total_steps(config: TrainConfig, images: int) -> int:
    """Number of steps of a training: ceil(epochs x N / batch_size); an epoch is one crop of every image."""
    return math.ceil(config.epochs * images / config.batch_size)


def single_steps(config: TrainConfig, images: int) -> int:
    """Number of steps at the end whose batches have one crop per image."""
    if config.crops_per_image == 1:
        return 0
    return min(total_steps(config, images), math.ceil(config.single_crop_epochs * images / config.batch_size))


def check_batch(config: TrainConfig, images: int, *, world: int = 1) -> None:
    """Raises RequestError if a batch needs more images than the set has, or is not divisible by `world` processes."""
    m = config.crops_per_image
    batch_images = config.batch_size // m
    max_images = config.batch_size if single_steps(config, images) else batch_images
    if max_images > images:
        raise RequestError(
            f"batch_size {config.batch_size}: a batch has {max_images} images, the data set {images}; choose at most "
            f"{images * (m if max_images == batch_images else 1)}"
        )
    if batch_images % (world * config.accumulate):
        raise RequestError(
            f"batch_size {config.batch_size}: {world} processes of {config.accumulate} parts do not divide its {batch_images} "
            f"images; choose a multiple of {world * config.accumulate * m}"
        )
    if config.batch_size < 2 * world * config.accumulate:
        raise RequestError(
            f"batch_size {config.batch_size}: BatchNorm needs at least 2 crops in each of {world * config.accumulate} parts"
        )
    local = processes.number("LOCAL_WORLD_SIZE", 1) if is_torchelastic_launched() else config.devices
    if torch.cuda.is_available() and local > torch.cuda.device_count():
        raise RequestError(
            f"{local} processes on this machine, which has {plural(torch.cuda.device_count(), 'GPU')}: each process needs its "
            "own GPU; give fewer --devices, or fewer processes to torchrun"
        )
    if config.sync_batchnorm and not torch.cuda.is_available():
        raise RequestError("sync_batchnorm: needs GPUs; this machine has none")


def train(
    config: TrainConfig,
    data: Crops,
    folder: Path,
    *,
    targets: Sequence[TeacherInfo],
    embeds: Sequence[Callable[[Tensor], Tensor]] | None = None,
    recordings: Sequence[Recording | None] | None = None,
    score: Score | None = None,
    init: Mapping[str, Tensor] | None = None,
    logger: Logger | None = None,
    inputs: runs.Inputs | None = None,
) -> dict[str, Any]:
    """Trains a student, resuming from the run's last checkpoint if any; writes metrics.csv and checkpoints/ to `folder`.

    Args:
        config: Config of the run; `defaults.resolve` fills in what it leaves out.
        data: Crops, including targets if these are stored.
        folder: The run folder.
        targets: Information about each teacher's targets, in the order of the data.
        embeds: Online teachers in the same order, uint8 [B, 3, H, W] to [B, D]. If None, the batches have the targets.
        recordings: Recordings that write each online teacher's targets to a store; `data` must then be RecordingCrops. None for
            a teacher whose targets are already stored; empty in all processes except the first.
        score: Returns the kNN accuracy in percent of a student in eval mode.
        init: The initial weights; see `Student.start_from`.
        logger: Also receives the lines of metrics.csv.
        inputs: Inputs of the run; see `runs.Inputs`. If None, they are not compared with the checkpoint's.

    Returns:
        The entries of results.json about the training.

    Raises:
        RequestError: A batch needs more images than the set has, the targets lack what the objective needs, or the last
            checkpoint belongs to another config, other inputs or targets of other dimensions.
        ImageError: An image cannot be read; the message names it.
        KeyboardInterrupt: The training was stopped. Call it again to continue.
    """
    kinds = [teacher.spec.kind for teacher in targets]
    config = defaults.resolve(config, images=len(data), pixels=data.pixels, kinds=kinds, mix_groups=data.mix_groups)
    check_batch(config, len(data))
    batch_images = config.batch_size // config.crops_per_image
    steps = total_steps(config, len(data))
    torch.manual_seed(config.seed)
    objectives = objectives_of(config, targets)
    student = Student(config.student, *dims_of(targets), **student_options(config))
    if init is not None:
        student.start_from(init)
    source: Targets = stored_targets if embeds is None else OnlineTargets(*embeds)
    callbacks = []
    if embeds is not None and recordings is not None:
        source = RecordingTargets(recordings, *embeds)
        callbacks = [RecordingCallback(source, config.batch_size)]
    if config.targets == "labels":
        source = LabelTargets(targets[0].spec.size, config.label_smoothing)
    elif config.calibrate_below:
        source = CalibratedTargets(source, config.calibrate_below, LabelTargets(targets[0].spec.size, config.label_smoothing))
    module = Distiller(student, objectives, source, config, steps)
    single = single_steps(config, len(data))
    sampler = PassSampler(
        len(data),
        batch_images,
        steps,
        seed=config.seed,
        parts=config.accumulate,
        single=single,
        crops_per_image=config.crops_per_image,
        groups=data.groups if config.mix_groups else None,
        mix=config.mix_groups,
        expect=data.expect if data.mix_groups else None,
    )
    source_of_crops = SingleCropPasses(data, sampler) if single else data
    loader = Loader(source_of_crops, sampler, workers=config.workers, collate=whole_batch, prefetch=4)
    found = fit(
        module,
        loader,
        folder,
        config=config,
        inputs=inputs,
        crops_per_step=config.batch_size,
        crops_per_epoch=len(data),
        callbacks=callbacks,
        score=score,
        score_every=config.knn_every,
        devices=config.devices,
        sync_batchnorm=config.sync_batchnorm,
        clip=config.clip,
        logger=logger,
    )
    return {
        "epochs": config.epochs,
        "images": len(data),
        "crops_seen": steps * config.batch_size,
        "device_crops": data.decode_only,
        "stored_crops_per_image": data.store.crops_per_image if isinstance(data, StoredCrops) else None,
        "teacher_forwards": steps * config.batch_size * len({network_key(embed) for embed in embeds or ()}),
        **found,
        "tf32": found["tf32"] or (embeds is not None and uses_tf32(teacher_precision(config))),
    }
