"""The crops and targets of `fkd-ssl train`: one function for each value of --targets, and the recording of a store."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fkd_ssl import files, processes
from fkd_ssl.commands import console, resolve
from fkd_ssl.crops import Recipe, replay_digest
from fkd_ssl.crops.choose import choose
from fkd_ssl.crops.device import check_device
from fkd_ssl.data import Crops, FreshCrops, RecordingCrops, RelabelledCrops, StoredCrops
from fkd_ssl.eval.classify import check_classes
from fkd_ssl.eval.features import require_two_classes
from fkd_ssl.images import ImageSource
from fkd_ssl.relabel import LabelMaps
from fkd_ssl.store import Store, open_store
from fkd_ssl.store.column import Column
from fkd_ssl.store.maintain.verify import check_files
from fkd_ssl.store.write.prepare import prepare
from fkd_ssl.store.write.recording import Recording, has_targets
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.teachers import Teacher
from fkd_ssl.text import format_bytes, plural
from fkd_ssl.training import defaults
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.groups import checkpoints_of, split, teacher_precision

_CHECKED_BYTES = 10**9  # targets up to this size are read once before training to find damaged files


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data that a student is trained on."""

    config: TrainConfig
    """The config, with the defaults that follow from the data."""
    crops: Crops | None
    """The crops, with targets if these are stored; None until `record` plans a store."""
    targets: list[TeacherInfo]
    """Information about each teacher's targets."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of the sources of the targets; see `runs.Inputs`."""
    teachers: list[Teacher] = field(default_factory=list)
    """The online teachers."""
    recordings: list[Recording | None] | None = None
    """Recordings of each online teacher's targets; None for a teacher whose targets are already stored."""
    check: Callable[[], None] = lambda: None
    """Checks the files or the online teachers; called before an unfinished training."""

    @property
    def embeds(self) -> list[Callable[[Tensor], Tensor]] | None:
        """The functions that compute each online teacher's targets; None without online teachers."""
        return [teacher.embed for teacher in self.teachers] or None


def open_data(config: TrainConfig, images: ImageSource) -> TrainingData:
    """Opens the training data of a config.

    Raises:
        RequestError: An input is missing or does not match the others.
        StoreError: The store is damaged, or was made from other images.
    """
    store = open_store(config.store) if config.store else None
    if config.scale_boxes:
        what = "ignored: there is no --store" if store is None else "the student's crops are not bit for bit the teacher's"
        console.log(f"warning: --scale_boxes: {what}")
    if store is not None and config.targets != "stored" and config.recipe not in ("mocov2", store.manifest.recipe.name):
        console.log(f"warning: --recipe {config.recipe} is ignored: the crops are those of --store")
    if config.device_crops == "on":
        check_device(resolve.device())
    return _OPEN[config.targets](config, images, store)


def _resolve(config: TrainConfig, images: ImageSource, store: Store | None, *, pixels: int, kinds: list[str]) -> TrainConfig:
    """Returns the config with the defaults that follow from the data."""
    mix = images.mix_groups or (store.mix_groups if store else 0)
    return defaults.resolve(config, images=len(store or images), pixels=pixels, kinds=kinds, mix_groups=mix)


def _stored(config: TrainConfig, images: ImageSource, store: Store | None) -> TrainingData:
    """Crops and targets of the store."""
    assert store is not None  # by TrainConfig
    names = split(config.column)
    columns = [store.column(name) for name in names] or [store.column()]
    kinds = [column.info.spec.kind for column in columns]
    config = _resolve(config, images, store, pixels=columns[0].meta.teacher.pixels, kinds=kinds)
    crops = StoredCrops(store, images, column=names or None, scale_boxes=config.scale_boxes, **_crop_options(config))
    return TrainingData(
        config=config,
        crops=crops,
        targets=[column.info for column in crops.columns],
        inputs=_store_inputs(store) | {f"column {column.name}": f"sha256 {column.digest}" for column in crops.columns},
        check=lambda: _check_store(config, store, crops.columns),
    )


def _labels(config: TrainConfig, images: ImageSource, store: Store | None) -> TrainingData:
    """Stored or fresh crops, with the classes of the images as targets."""
    check_classes(images, len(images.classes))
    require_two_classes(images)
    seen = [store.column(name).meta.teacher.pixels for name in store.column_names] if store else []
    config = _resolve(config, images, store, pixels=(*seen, defaults.PIXELS)[0], kinds=["distribution"])
    return TrainingData(
        config=config,
        crops=_crops_without_targets(config, images, store),
        targets=[TeacherInfo(name="labels", spec=TargetSpec("distribution", (len(images.classes),)))],
        inputs={} if store is None else _store_inputs(store),
    )


def _relabel(config: TrainConfig, images: ImageSource, store: Store | None) -> TrainingData:
    """Fresh crops, with targets from ReLabel's label maps."""
    assert config.label_maps is not None  # by TrainConfig
    maps = LabelMaps(config.label_maps)
    config = _resolve(config, images, None, pixels=maps.manifest.teacher.pixels, kinds=["distribution"])
    return TrainingData(
        config=config,
        crops=RelabelledCrops(images, maps, resolve.recipe_of(config.recipe), **_crop_options(config)),
        targets=[maps.manifest.teacher],
        inputs={"label maps": f"sha256 {maps.manifest.digest}"},
        check=lambda: maps.verify() if files.total_bytes(maps.folder) < _CHECKED_BYTES else None,
    )


def _online(config: TrainConfig, images: ImageSource, store: Store | None) -> TrainingData:
    """Stored or fresh crops, with targets that the teachers compute for every batch."""
    assert config.teacher is not None  # by TrainConfig
    precision = teacher_precision(config)
    teachers = resolve.teachers_of(config.teacher, config.checkpoint, precision, config.grid)
    config = replace(config, teacher_precision=precision)
    inputs = {f"teacher {t.info.name}": f"{t.info.network}, sha256 {t.info.checkpoint_sha256}" for t in teachers}
    kinds, pixels = [teacher.info.spec.kind for teacher in teachers], config.teacher_pixels or teachers[0].info.pixels
    config = _resolve(config, images, store, pixels=pixels, kinds=kinds)
    return TrainingData(
        config=config,
        crops=None if config.record is not None else _crops_without_targets(config, images, store),
        targets=[teacher.info for teacher in teachers],
        inputs=({} if store is None else _store_inputs(store)) | inputs,
        teachers=teachers,
        check=lambda: _check_teachers(config, teachers),
    )


def _check_teachers(config: TrainConfig, teachers: list[Teacher]) -> None:
    """Raises RequestError or FkdError if a teacher does not support the size of its crops, or its map is too coarse."""
    for teacher in teachers:
        teacher.check_size(config.teacher_pixels or config.pixels)


_OPEN = {"stored": _stored, "labels": _labels, "relabel": _relabel, "online": _online}


def _crops_without_targets(config: TrainConfig, images: ImageSource, store: Store | None) -> Crops:
    options = {"teacher_pixels": config.teacher_pixels, **_crop_options(config)}
    if store is None:
        return FreshCrops(images, resolve.recipe_of(config.recipe), **options)
    return StoredCrops(store, images, with_targets=False, scale_boxes=config.scale_boxes, **options)


def _crop_options(config: TrainConfig) -> dict[str, Any]:
    return {
        "crops_per_image": config.crops_per_image,
        "pixels": config.pixels,
        "seed": config.seed,
        "skip_unreadable": config.on_unreadable == "skip",
        "decode_only": config.device_crops == "on",
    }


def choose_device_crops(config: TrainConfig, images: ImageSource, crops: Crops) -> None:
    """Makes the crops on the GPU if --device_crops is auto and this is faster."""
    if config.device_crops == "auto":
        crops.decode_only = choose(
            images,
            crops.store.manifest.recipe if isinstance(crops, StoredCrops) else resolve.recipe_of(config.recipe),
            crops=config.crops_per_image,
            sides=[*crops.sides.values()],
            workers=config.workers,
            device=resolve.device(),
            log=console.log,
        )


def _store_inputs(store: Store) -> dict[str, str]:
    return {"store": f"{len(store)} images, sha256 {store.manifest.digest}"}


def _check_store(config: TrainConfig, store: Store, columns: list[Column]) -> None:
    """Warns about likely mistakes; reads targets of up to `_CHECKED_BYTES` once to find damaged files."""
    for column in columns:
        if len(store) * store.crops_per_image * column.meta.code_size < _CHECKED_BYTES:
            check_files(store, column)
        else:
            console.log("note: the store's checksums are not checked here; fkd-ssl verify checks them")
        seen = column.meta.teacher.pixels
        if seen != config.pixels:
            console.log(f"note: the teacher saw crops of {seen} px, the student trains on {config.pixels} px")
        on_device = config.device_crops == "on"  # auto uses a device only if its pixels are those of the CPU
        if column.meta.replay_digest != replay_digest(str(resolve.device()) if on_device else None):
            where = f"{resolve.device().type} makes" if on_device else "this machine makes"
            console.log(f"warning: {where} crops whose pixels differ slightly from those that the teacher saw")
    if config.epochs > store.crops_per_image:
        uses = config.epochs / store.crops_per_image
        console.log(f"note: {store.crops_per_image} crops per image are stored, so each is used {uses:.1f} times")


def record(config: TrainConfig, images: ImageSource, data: TrainingData, world: int, *, resumes: bool) -> TrainingData:
    """Plans the store of --record if it is new, and opens a recording of each teacher's targets.

    Args:
        config: The run.
        images: The image set.
        data: The data, with online teachers.
        world: Number of training processes.
        resumes: Whether the run is resumed, so that targets already in the store are its own.

    Raises:
        RequestError: The store was planned with other options, or another process records it.
    """
    assert config.record is not None
    columns = prepare(
        images,
        config.record,
        data.teachers,
        crops=config.recorded_crops,
        recipe=resolve.recipe_of(config.recipe),
        codec=config.codec,
        pixels=config.teacher_pixels or config.pixels,
        seed=config.seed,
        chunk_size=config.batch_size // config.accumulate // world,
        skip_unreadable=config.on_unreadable == "skip",
        threads=min(16, resolve.cpu_threads()),
        log=console.log,
    )
    # skips no images: a temporary read error must not leave a gap in the store
    crops = RecordingCrops(
        columns[0].store,
        images,
        with_targets=False,
        crops_per_image=config.crops_per_image,
        pixels=config.pixels,
        teacher_pixels=config.teacher_pixels,
        decode_only=config.device_crops == "on",
    )
    written = [column for column in columns if resumes and has_targets(column)]
    for column in written:
        console.log(f"note: {column.folder}: its targets are already stored; nothing to record")
    recordings: list[Recording | None] | None = None
    if len(written) < len(columns):
        recordings = []
        if not processes.rank()[0]:  # the first process writes for all
            recordings = [None if c in written else Recording(c, config.crops_per_image) for c in columns]
    return replace(data, crops=crops, recordings=recordings)


def finish_recording(config: TrainConfig, data: TrainingData) -> None:
    """Writes the recorded columns into the store; for targets damaged on disk, logs the command that computes them again."""
    teachers = zip(split(config.teacher), checkpoints_of(config.teacher, config.checkpoint), strict=True)
    for recording, (teacher, checkpoint) in zip(data.recordings or [], teachers, strict=False):  # only in the first process
        if recording is None:
            continue
        damaged = recording.finish()
        column, store = recording.column, recording.column.store
        size = format_bytes(files.total_bytes(store.folder))
        console.log(
            f"{config.record}: targets of {column.name}: {len(store):,} images x {store.crops_per_image} crops; {size} on disk"
        )
        if damaged:
            asked = {
                "images": config.images,
                "store": config.record,
                "teacher": teacher,
                "checkpoint": checkpoint,
                "column": column.name,
                "crops": store.crops_per_image,
                "recipe": config.recipe,
                "codec": column.meta.codec,
                "pixels": column.meta.teacher.pixels,
                "seed": config.seed,
                "chunk_size": column.meta.chunk_size,
                "precision": column.meta.teacher.precision,
                "on_unreadable": "skip" if config.on_unreadable == "skip" else None,
            }
            options = [f"--{key} {shlex.quote(str(value))}" for key, value in asked.items() if value is not None]
            console.log(
                f"warning: left out {len(damaged)} of {plural(store.manifest.shards, 'shard')}, damaged on the disk after "
                f"recording; to compute them: fkd-ssl precompute {' '.join(options)}"
            )


def describe(config: TrainConfig, data: TrainingData) -> dict[str, Any]:
    """The model card's entries about teachers, store and crops."""
    known = [teacher.info for teacher in data.teachers]
    crops = data.crops
    if not isinstance(crops, StoredCrops):
        maps = [crops.maps.manifest.teacher] if isinstance(crops, RelabelledCrops) else []
        return {"teachers": known + maps, "store": None, "recipe": _describe_recipe(resolve.recipe_of(config.recipe))}
    manifest = crops.store.manifest
    store = {
        "store": crops.store.folder.name if crops.store.remote is None else crops.store.name,
        "sha256 of its list of images": files.sha256(crops.store.paths.lines),
        **{f"sha256 of column {c.name}": c.digest for c in crops.columns},
        "crops per image": manifest.crops_per_image,
        "seed of the crops": manifest.seed,
    }
    infos = known or [column.info for column in crops.columns]
    return {"teachers": infos, "store": store, "recipe": _describe_recipe(manifest.recipe)}


def _describe_recipe(recipe: Recipe) -> dict[str, Any]:
    values = dict(vars(recipe))
    return {"recipe": values.pop("name"), **values}
