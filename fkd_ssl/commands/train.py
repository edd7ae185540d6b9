"""Distils a student: from a store's targets, or online from the teacher itself, from the images' labels, or from ReLabel's.

All are one training that differs in where targets come from. The run folder holds config.yaml, inputs.json, metrics.csv,
checkpoints/, results.json and a README.md; the same options and inputs continue a killed run. Several processes: --devices, or
torchrun. With --targets online --record STORE the teacher's targets are kept: the next student trains on them without the
teacher.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fkd_ssl.errors import ImageAccessError, ImageError, RequestError
from fkd_ssl.text import format_bytes, format_duration
from fkd_ssl.training.config import TrainConfig as Config

if TYPE_CHECKING:
    from fkd_ssl.crops import Recipe
    from fkd_ssl.data import Crops
    from fkd_ssl.images import ImageSource
    from fkd_ssl.relabel import LabelMaps
    from fkd_ssl.store import Store
    from fkd_ssl.store.reader import Column
    from fkd_ssl.store.write.recording import Recording
    from fkd_ssl.students import Student
    from fkd_ssl.teachers import Teacher

MUCH_WAITING = 0.2  # share of the training's time spent waiting for data from which on we say what helps


def run(config: Config) -> int:
    """Trains and says how it went."""
    from torch.distributed import is_torchelastic_launched

    from fkd_ssl import card, files, processes, runs
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.crops.device import check_device
    from fkd_ssl.data import Crops, FreshCrops, RelabelledCrops, StoredCrops
    from fkd_ssl.eval.classify import check_classes
    from fkd_ssl.objectives import TargetInfo
    from fkd_ssl.relabel import LabelMaps
    from fkd_ssl.store import open_store
    from fkd_ssl.students import CLASSIFIER, Student, check_student, measure
    from fkd_ssl.training.engine import check_batch, objective_of, train
    from fkd_ssl.training.loggers import check_logger, make_logger

    rank, world = processes.rank()
    if "LOCAL_RANK" in os.environ:  # Lightning or torchrun started this process
        processes.end_with_parent()
    if not is_torchelastic_launched():  # otherwise its numbers are what counts
        if int(os.environ.get("SLURM_PROCID", "0")):
            raise RequestError(
                "srun started this as one of several tasks, which know nothing of one another: have it start torchrun, one on "
                "each machine, or one task with --devices"
            )
        world = max(world, config.devices)
    if rank:  # the first process speaks for all
        console.mute()
    config = _as_meant(config)
    runs.peek(config.out, config)
    shape: dict[str, Any] = {"head": config.head, "stem": config.stem, "width": config.width}
    check_student(config.student, config.pixels, **shape)
    images = images_of(config.images)
    store = open_store(config.store) if config.store else None
    common: dict[str, Any] = {
        "crops_per_image": config.crops_per_image,
        "pixels": config.pixels,
        "seed": config.seed,
        "skip_unreadable": config.on_unreadable == "skip",
        "decode_only": config.device_crops,
    }
    boxes: dict[str, Any] = {"scale_boxes": config.scale_boxes}
    if config.scale_boxes:
        where = "ignored: there is no --store" if store is None else "the student's crops are not bit for bit the teacher's"
        console.say(f"warning: --scale_boxes: {where}")
    if store is not None and config.targets != "stored" and config.recipe not in ("mocov2", store.manifest.recipe.name):
        console.say(f"warning: --recipe {config.recipe} is ignored: the crops are those of --store")
    if config.device_crops:
        check_device(resolve.device())
    data: Crops
    maps: LabelMaps | None = None
    teachers: list[Teacher] = []
    recordings: list[Recording | None] | None = None
    if config.targets == "stored":
        assert store is not None  # by TrainConfig
        for name in ("checkpoint", "teacher_pixels"):
            if getattr(config, name) is not None:
                console.say(f"warning: --{name} is ignored: stored targets need no teacher")
        data = StoredCrops(store, images, teacher=config.teachers or None, **boxes, **common)
        targets = [TargetInfo(name=c.name, dim=c.meta.dim, arrays=c.teacher_arrays(), kind=c.meta.kind) for c in data.columns]
        embeds = None
    elif config.targets == "labels":
        targets = [TargetInfo(name="labels", dim=_classes(images), kind="distribution")]
        embeds = None
    elif config.targets == "relabel":
        assert config.label_maps is not None  # by TrainConfig
        maps = LabelMaps(config.label_maps)
        targets = [TargetInfo(name=maps.manifest.teacher["name"], dim=maps.classes, kind="distribution")]
        data = RelabelledCrops(images, maps, resolve.recipe_of(config.recipe), **common)
        embeds = None
    else:
        assert config.teacher is not None  # by TrainConfig
        teachers = resolve.teachers_of(config.teacher, config.checkpoint)
        targets = [
            TargetInfo(name=teacher.name, dim=teacher.dim, arrays=teacher.arrays, kind=teacher.kind) for teacher in teachers
        ]
        embeds = [teacher.embed for teacher in teachers]
    if config.targets in ("online", "labels"):
        if store is not None:
            data = StoredCrops(store, images, with_targets=False, teacher_pixels=config.teacher_pixels, **boxes, **common)
        elif config.record is None:
            recipe = resolve.recipe_of(config.recipe)
            data = FreshCrops(images, recipe, teacher_pixels=config.teacher_pixels, **common)
    init = None if config.init is None else resolve.student_of(config.init, "--init")[0]
    inputs = None if rank else _inputs(config, images, store, teachers, maps, init)
    state = runs.peek(config.out, config, inputs)
    if state == "done":
        console.say(f"{config.out}: this run is done; its results are in results.json")
        return 0
    if config.targets == "stored":
        assert store is not None  # by TrainConfig
        _check_store(config, store, [store.column(about.name) for about in targets])
    if maps is not None and files.total_bytes(maps.folder) < 10**9:
        maps.verify()
    # before anything is written: another batch size or objective is another config
    check_batch(config, len(images) if config.record else len(data), world=world)
    for about in targets:
        objective_of(config, about)
        if config.calibrate_below is not None:
            check_classes(images, about.dim)
    student = Student(config.student, *(about.dim for about in targets), **shape)
    if config.logger is not None:
        check_logger(config.logger)
    if init is not None:
        student.start_from(init)
    size = measure(student.backbone, config.pixels)
    score = None if config.val is None else _knn_score(config, images)
    if config.record is not None:
        data, recordings = _recorded(config, images, teachers, world, resumes=state == "resume")
    with ExitStack() as opened:
        for recording in filter(None, recordings or []):
            opened.callback(recording.close)
        folder, state = opened.enter_context(runs.open_run(config.out, config, inputs))
        if state == "done":  # another process finished it while this one was starting
            console.say(f"{config.out}: this run is done; its results are in results.json")
            return 0
        logger = None if config.logger is None else make_logger(config.logger, folder)
        console.say(
            f"{'continuing' if state == 'resume' else 'training'} {config.student} on {len(data):,} images, {config.targets} "
            f"targets, D = {' and '.join(str(about.dim) for about in targets)}; {config.epochs:g} epochs of one crop an image"
        )
        console.say(f"{config.student} at {config.pixels} px: {size}")
        results = train(
            config, data, folder, targets=targets, embeds=embeds, recordings=recordings, score=score, init=init, logger=logger,
            inputs=inputs,
        )  # fmt: skip
        _publish(config, recordings or [])
        if rank:
            return 0
        results |= {"student": {**student.made_of, **vars(size)}}
        if config.head == CLASSIFIER and config.val is not None:
            results |= _classified(config, folder)
        described = {**student.made_of, "size": size, "feature dimension": student.feature_dim}
        if config.init is not None:
            described["started from"] = Path(config.init).name
        card.write(folder, config=vars(config), results=results, student=described, **_sources(config, data, teachers))
        runs.finish(folder, {"config": config.__dict__, **results})
        if results["data_wait"] > MUCH_WAITING:
            console.say(
                f"note: {100 * results['data_wait']:.0f} % of the time went into waiting for data: try more --workers than "
                f"{config.workers} (this process may use {resolve.cpu_threads()} processors), more --crops_per_image, or, for "
                "small crops of large images, a smaller copy of them (fkd-ssl cache)"
            )
        if results["unreadable_images"]:
            console.say(f"warning: {results['unreadable_images']} images could not be read and were skipped")
        knn = "" if results["knn_top1"] is None else f"; kNN {results['knn_top1']:.2f} %"
        own = f"; top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} %" if "top1" in results else ""
        console.show(f"{config.out}: {results['steps']} steps in {format_duration(results['train_seconds'])}{own}{knn}")
        return 0


def _as_meant(config: Config) -> Config:
    """With the column's name in it where only one can be meant, so that the run goes on when its store has got another one.

    And with the precision that there is: Lightning takes bfloat16 on a CPU, which has no float16.
    """
    from fkd_ssl import runs
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.store import open_store

    if config.precision == "16-mixed" and resolve.device().type == "cpu":
        console.say("warning: --precision 16-mixed is for GPUs: here it is bf16-mixed")
        config = replace(config, precision="bf16-mixed")
    if config.targets != "stored" or config.teacher is not None:
        return config
    begun = runs.read_config(config.out)
    assert config.store is not None  # by TrainConfig
    name = begun.get("teacher") if begun else open_store(config.store).column().name
    return replace(config, teacher=name if isinstance(name, str) else None)


def _inputs(
    config: Config,
    images: "ImageSource",
    store: "Store | None",
    teachers: "list[Teacher]",
    maps: "LabelMaps | None",
    init: "Student | None",
) -> dict[str, str]:
    """What the run folder keeps of the inputs, to know them again."""
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.teachers.state_dicts import weights_digest

    inputs = images.identity(sizes=store is None)
    if store is not None:
        inputs["store"] = f"{len(store)} images, sha256 {store.manifest.digest}"
        for column in map(store.column, config.teachers if config.targets == "stored" else []):
            inputs[f"column {column.name}"] = f"sha256 {column.digest}"
    if maps is not None:
        inputs["label maps"] = f"sha256 {maps.manifest.digest}"
    inputs |= {f"teacher {teacher.name}": f"{teacher.network}, sha256 {teacher.checkpoint_sha256}" for teacher in teachers}
    if init is not None:
        inputs["init"] = f"sha256 {weights_digest(init)}"
    if config.val is not None:
        inputs |= images_of(config.val).identity("val images")
    return inputs


def _classes(images: "ImageSource") -> int:
    """How many classes the images are of; raises RequestError where one has none, or all have one."""
    from fkd_ssl.eval.classify import check_classes
    from fkd_ssl.eval.features import require_two_classes

    check_classes(images, len(images.classes))
    require_two_classes(images)
    return len(images.classes)


def _recorded(
    config: Config, images: "ImageSource", teachers: "list[Teacher]", world: int, *, resumes: bool
) -> "tuple[Crops, list[Recording | None] | None]":
    """The crops of the store that is recorded, planned now if it is new, and what records each teacher's targets.

    None records what a resumed run has published already, or precompute for it.
    """
    from fkd_ssl import processes
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.data import RecordedCrops
    from fkd_ssl.store.write.precompute import prepare
    from fkd_ssl.store.write.recording import Recording, is_published

    assert config.record is not None
    columns = prepare(
        images,
        config.record,
        teachers,
        crops=config.recorded_crops,
        recipe=resolve.recipe_of(config.recipe),
        codec=config.codec,
        pixels=config.teacher_pixels or config.pixels,
        seed=config.seed,
        chunk_size=config.batch_size // config.accumulate // world,
        skip_unreadable=config.on_unreadable == "skip",
        threads=min(16, resolve.cpu_threads()),
        log=console.say,
    )
    # an image that can be read now and not later is no reason to leave a gap
    data = RecordedCrops(
        columns[0].store, images, with_targets=False, crops_per_image=config.crops_per_image, pixels=config.pixels,
        teacher_pixels=config.teacher_pixels, decode_only=config.device_crops,
    )  # fmt: skip
    there = [column for column in columns if resumes and is_published(column)]
    for column in there:
        console.say(f"note: {column.folder}: its targets are in the store, nothing is left to record")
    if len(there) == len(columns):
        return data, None
    if processes.rank()[0]:
        return data, []
    return data, [None if column in there else Recording(column, config.crops_per_image) for column in columns]


def _publish(config: Config, recordings: "list[Recording | None]") -> None:
    """Puts what was recorded into the store, and says how to compute what was damaged on the disk meanwhile."""
    import shlex

    from fkd_ssl import files
    from fkd_ssl.commands import console
    from fkd_ssl.training.groups import checkpoints_of, split

    teachers = zip(split(config.teacher), checkpoints_of(config.teacher, config.checkpoint), strict=True)
    for recording, (teacher, checkpoint) in zip(recordings, teachers, strict=False):  # only the first process has them
        if recording is None:
            continue
        damaged = recording.publish()
        column, store = recording.column, recording.column.store
        size = format_bytes(files.total_bytes(store.folder))
        console.say(
            f"{config.record}: targets of {column.name}: {len(store):,} images x {store.crops_per_image} crops; {size} on disk"
        )
        if damaged:
            asked = {
                "images": config.images, "store": config.record, "teacher": teacher, "checkpoint": checkpoint,
                "name": column.name, "crops": store.crops_per_image, "recipe": config.recipe, "codec": column.meta.codec,
                "pixels": column.meta.pixels, "seed": config.seed, "chunk_size": column.meta.chunk_size,
                "on_unreadable": "skip" if config.on_unreadable == "skip" else None,
            }  # fmt: skip
            options = [f"--{key} {shlex.quote(str(value))}" for key, value in asked.items() if value is not None]
            console.say(
                f"warning: {len(damaged)} of {store.manifest.shards} shards were damaged on the disk after they were recorded, "
                f"and are left out; to compute them: fkd-ssl precompute {' '.join(options)}"
            )


def _sources(config: Config, data: "Crops", teachers: "list[Teacher]") -> dict[str, Any]:
    """What a run's card says of its teachers, its store and its crops."""
    from fkd_ssl.commands import resolve
    from fkd_ssl.data import RelabelledCrops, StoredCrops

    if not isinstance(data, StoredCrops):
        known = [data.maps.manifest.teacher] if isinstance(data, RelabelledCrops) else [vars(t) for t in teachers]
        return {"teachers": known, "store": None, "recipe": _recipe(resolve.recipe_of(config.recipe))}
    manifest = data.store.manifest
    store = {
        "store": data.store.folder.name,
        "sha256 of its list of images": manifest.images_sha256,
        **{f"sha256 of column {c.name}": c.digest for c in data.columns},
        "stored an image": manifest.crops_per_image,
        "seed of the draw": manifest.seed,
    }
    about = [vars(t) for t in teachers] or [{**c.meta.teacher, "name": c.name} for c in data.columns]
    return {"teachers": about, "store": store, "recipe": _recipe(manifest.recipe)}


def _recipe(recipe: "Recipe") -> dict[str, Any]:
    values = dict(vars(recipe))
    return {"recipe": values.pop("name"), **values}


def _check_store(config: Config, store: "Store", columns: "list[Column]") -> None:
    """Says what a user may not have meant; a store of up to a gigabyte is read once to see that it is whole."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.crops import probe_digest
    from fkd_ssl.store.maintain.verify import check_files

    for column in columns:
        if len(store) * store.crops_per_image * column.meta.code_size < 10**9:
            check_files(store, column)
        else:
            console.say("note: the store's checksums are not read here; fkd-ssl verify does that")
        if column.meta.pixels != config.pixels:
            console.say(f"note: the teacher saw crops of {column.meta.pixels} px, the student trains on {config.pixels} px")
        if column.meta.probe_digest != probe_digest(str(resolve.device()) if config.device_crops else None):
            where = f"{resolve.device().type} makes" if config.device_crops else "this machine makes"
            console.say(f"warning: {where} slightly other pixels of a crop than the one that ran the teacher")
    if config.epochs > store.crops_per_image:
        uses = config.epochs / store.crops_per_image
        console.say(f"note: {store.crops_per_image} crops an image are stored, so each is used {uses:.1f} times")


def _classified(config: Config, folder: Path) -> dict[str, float]:
    """`top1` and `top5` of the student's own classes on the test images, where these are as many as the folders."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.eval import classify

    assert config.val is not None
    student = resolve.student_of(str(folder))[0].to(resolve.device())
    try:
        found = classify.evaluate(
            student,
            images_of(config.val),
            pixels=config.pixels,
            classes=student.dims[0],
            workers=config.workers,
            progress=False,
        )
    except (RequestError, ImageError, ImageAccessError) as error:
        console.say(f"note: no top-1 of the student's own classes: {error}")
        return {}
    return {key: found[key] for key in ("top1", "top5")}


def _knn_score(config: Config, images: "ImageSource") -> "Callable[[Student], float]":
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.eval import knn
    from fkd_ssl.eval.features import match_classes

    assert config.val is not None
    val = images_of(config.val)
    match_classes(images, val)  # a folder without classes is refused before training, not after

    def score(student: "Student") -> float:
        result = knn.evaluate(
            model=student.features, train=images, val=val, pixels=config.pixels, k=config.knn_k, workers=config.workers,
            progress=False, skipped=set() if config.on_unreadable == "skip" else None,
        )  # fmt: skip
        return float(result["top1"])

    return score
