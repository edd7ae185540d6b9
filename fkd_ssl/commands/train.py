"""Trains a student from stored targets, a teacher that runs online, the labels of the images, or ReLabel's label maps.

The training is the same for all of them; only the source of the targets differs. The run folder has config.yaml, inputs.json,
metrics.csv, checkpoints/, results.json and README.md. To continue a killed run, repeat the command. For several processes use
--devices or torchrun. --targets online --record STORE also stores the teacher's targets, so that further students can train on
them without the teacher.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fkd_ssl.errors import ImageAccessError, ImageError, RequestError
from fkd_ssl.options import Named
from fkd_ssl.text import format_duration, plural
from fkd_ssl.training.config import TrainConfig as Config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fkd_ssl.commands.training_data import TrainingData
    from fkd_ssl.images import ImageSource
    from fkd_ssl.results import Trained
    from fkd_ssl.students import Student
    from fkd_ssl.students.size import Size

Weights: TypeAlias = "dict[str, Tensor]"
MUCH_WAITING = 0.2  # share of the training time spent waiting for data, above which advice is printed


def run(config: Config) -> int:
    """Prints the result of the training."""
    from fkd_ssl.commands import console

    console.print_result(work(config).line)
    return 0


def work(config: Config) -> "Trained":
    """Trains a student."""
    from fkd_ssl import runs
    from fkd_ssl.commands import console, resolve, training_data
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.commands.initial import initial_weights
    from fkd_ssl.students import check_student, dims_of, measure
    from fkd_ssl.training import defaults
    from fkd_ssl.training.engine import student_options, total_steps, train
    from fkd_ssl.training.loggers import make_logger

    rank, world = _join_processes(config)
    given = _pin_defaults(config)
    images = images_of(config.images)
    data = training_data.open_data(given, images)
    config = data.config
    if isinstance(config.student, Named):
        config = replace(config, student=Named(config.student, config.student.value, config.pixels))
    check_student(config.student, config.pixels, *dims_of(data.targets), **student_options(config))
    init = initial_weights(config)
    inputs = None if rank else _inputs(config, images, data, init)
    state = runs.peek(config.out, config, inputs)
    if state == "done":
        return _done(config)
    data.check()
    student = _check(config, images, data, init, world)
    size = measure(student.backbone, config.pixels)
    score = None if config.val is None else _knn_score(config, images)
    if config.record is not None:
        data = training_data.record(config, images, data, world, resumes=state == "resume")
    crops = data.crops
    assert crops is not None
    training_data.choose_device_crops(config, images, crops)
    if config.compile:
        sides = [config.teacher_pixels or config.pixels] * len(data.teachers)
        resolve.compile_teachers(data.teachers, sides, config.batch_size // config.accumulate // world)
    with ExitStack() as stack:
        for recording in filter(None, data.recordings or []):
            stack.callback(recording.close)
        folder, state = stack.enter_context(runs.open_run(config.out, config, inputs))
        if state == "done":  # another process finished it while this one was starting
            return _done(config)
        shapes = " and ".join(str(teacher.spec) for teacher in data.targets)
        console.log(
            f"{'continuing' if state == 'resume' else 'training'} {config.student} on {len(crops):,} images, {config.targets} "
            f"targets, {shapes}; {config.epochs:g} epochs of one crop per image"
        )
        console.log(f"{config.student} at {config.pixels} px: {size}")
        console.log(resolve.describe_machine(device_crops=crops.decode_only))
        for teacher in data.targets if config.targets != "labels" else []:
            console.log(teacher.description)
        warnings = defaults.warn_of_few(total_steps(config, len(crops))), defaults.warn_of_few_images(config, len(crops))
        for line in (defaults.describe(given, config, len(crops)), *warnings):
            if line is not None:
                console.log(line)
        results = train(
            config,
            crops,
            folder,
            targets=data.targets,
            embeds=data.embeds,
            recordings=data.recordings,
            score=score,
            init=init,
            logger=None if config.logger is None else make_logger(config.logger, folder),
            inputs=inputs,
        )
        training_data.finish_recording(config, data)
        if not rank:
            _finish(config, folder, results, student, size, data)
    return _trained(config, {"config": dict(vars(config)), **results})


def _join_processes(config: Config) -> tuple[int, int]:
    """Returns the rank of this process and the number of processes.

    Raises:
        RequestError: srun started this process as one of several.
    """
    from torch.distributed import is_torchelastic_launched

    from fkd_ssl import processes

    rank, world = processes.rank()
    if "LOCAL_RANK" in os.environ:  # Lightning or torchrun started this process
        processes.end_with_parent()
    if not is_torchelastic_launched():  # torchrun's number of processes overrides --devices
        if processes.number("SLURM_PROCID", 0):
            raise RequestError(
                "srun started several independent tasks: let it start torchrun, one per machine, or one task with --devices"
            )
        world = max(world, config.devices)
    return rank, world


def _pin_defaults(config: Config) -> Config:
    """Resolves the defaults that depend on the machine and on the store.

    These are the name of a store's only column, so that the run can be resumed after a column was added to the store, and the
    precision, since Lightning uses bfloat16 on a CPU, which does not support float16.
    """
    from fkd_ssl import runs
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.store import open_store

    if config.precision == "16-mixed" and resolve.device().type == "cpu":
        console.log("warning: --precision 16-mixed needs a GPU; using bf16-mixed")
        config = replace(config, precision="bf16-mixed")
    if config.targets != "stored" or config.column is not None:
        return config
    begun = runs.read_config(config.out)
    assert config.store is not None  # TrainConfig checks it
    name = begun.get("column") if begun else open_store(config.store).column().name
    return replace(config, column=name if isinstance(name, str) else None)


def _inputs(config: Config, images: "ImageSource", data: "TrainingData", init: "Weights | None") -> dict[str, str]:
    """The digests of what the run reads."""
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.teachers.state_dicts import tensors_digest, weights_digest

    inputs = images.identity(sizes=not config.store) | data.inputs
    if isinstance(config.student, Named):
        inputs["student"] = f"sha256 {weights_digest(config.student.value)}"
    if init is not None:
        inputs["init"] = f"sha256 {tensors_digest(init)}"
    if config.val is not None:
        inputs |= images_of(config.val).identity("val images")
    return inputs


def _check(config: Config, images: "ImageSource", data: "TrainingData", init: "Weights | None", world: int) -> "Student":
    """Makes the initial student; raises RequestError for what would fail later, before the run folder is created."""
    from fkd_ssl.eval.classify import check_classes
    from fkd_ssl.students import Student, dims_of
    from fkd_ssl.training.engine import check_batch, objectives_of, student_options
    from fkd_ssl.training.loggers import check_logger

    check_batch(config, len(images if data.crops is None else data.crops), world=world)
    objectives_of(config, data.targets)
    if config.calibrate_below is not None:
        for teacher in data.targets:
            check_classes(images, teacher.spec.size)
    if config.logger is not None:
        check_logger(config.logger)
    student = Student(config.student, *dims_of(data.targets), **student_options(config))
    if init is not None:
        student.start_from(init)
    return student


def _done(config: Config) -> "Trained":
    from fkd_ssl import runs
    from fkd_ssl.commands import console

    console.log(f"{config.out}: this run is done; its results are in results.json")
    return _trained(config, runs.read_results(Path(config.out)))


def _trained(config: Config, results: dict[str, Any]) -> "Trained":
    """The result of a finished run."""
    from fkd_ssl.results import Trained

    knn = "" if results["knn_top1"] is None else f"; kNN {results['knn_top1']:.2f} %"
    own = f"; top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} %" if "top1" in results else ""
    return Trained(
        line=f"{config.out}: {results['steps']} steps in {format_duration(results['train_seconds'])}{own}{knn}",
        values=results,
        out=Path(config.out),
        steps=results["steps"],
        seconds=results["train_seconds"],
        knn_top1=results["knn_top1"],
        backbone=_backbone(config),
    )


def _backbone(config: Config) -> "nn.Module | None":
    """The module that was given as student."""
    return config.student.value if isinstance(config.student, Named) else None


def _finish(
    config: Config, folder: Path, results: dict[str, Any], student: "Student", size: "Size", data: "TrainingData"
) -> None:
    """Writes the model card and results.json."""
    from fkd_ssl import card, runs
    from fkd_ssl.commands import console, resolve, training_data
    from fkd_ssl.students import CLASSIFIER

    results |= {"student": {**student.spec, **vars(size)}}
    if config.head == CLASSIFIER and config.val is not None:
        results |= _classified(config, folder)
    described = {**student.spec, "size": size, "feature dimension": student.feature_dim}
    if config.init is not None:
        described["started from"] = Path(config.init).name
    card.write(folder, config=vars(config), results=results, student=described, **training_data.describe(config, data))
    runs.finish(folder, {"config": config.__dict__, **results})
    if results["data_wait"] > MUCH_WAITING:
        console.log(
            f"note: {100 * results['data_wait']:.0f} % of the time was spent waiting for data: try more --workers than "
            f"{config.workers} (this process may use {resolve.cpu_threads()} processors), more --crops_per_image, or, for "
            "small crops of large images, a smaller copy of them (fkd-ssl cache)"
        )
    if results["unreadable_images"]:
        console.log(f"warning: skipped {plural(results['unreadable_images'], 'unreadable image')}")


def _classified(config: Config, folder: Path) -> dict[str, float]:
    """`top1` and `top5` of the student's classifier on the test images, if they have as many classes."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.eval import classify
    from fkd_ssl.students import load_student
    from fkd_ssl.training.monitor import last_checkpoint

    assert config.val is not None
    student = load_student(last_checkpoint(folder), backbone=_backbone(config))[0].to(resolve.device())
    try:
        found = classify.evaluate(
            student,
            images_of(config.val),
            pixels=config.pixels,
            classes=student.dim,
            workers=config.workers,
            progress=False,
        )
    except (RequestError, ImageError, ImageAccessError) as error:
        console.log(f"note: cannot measure the classifier's top-1: {error}")
        return {}
    return {key: found[key] for key in ("top1", "top5")}


def _knn_score(config: Config, images: "ImageSource") -> "Callable[[Student], float]":
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.eval import knn
    from fkd_ssl.eval.features import match_classes
    from fkd_ssl.eval.scores import COLLAPSED

    assert config.val is not None
    val = images_of(config.val)
    match_classes(images, val)  # refuses a folder without classes before training, not after it

    def score(student: "Student") -> float:
        result = knn.evaluate(
            model=student.features,
            train=images,
            val=val,
            pixels=config.pixels,
            k=config.knn_k,
            workers=config.workers,
            device=resolve.device(),
            progress=False,
            skipped=set() if config.on_unreadable == "skip" else None,
        )
        if COLLAPSED in result["notes"]:
            console.log(f"warning: {COLLAPSED}")
        return float(result["top1"])

    return score
