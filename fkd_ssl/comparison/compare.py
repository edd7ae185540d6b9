"""Trains and scores the arms of a comparison. Finished steps are not repeated."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fkd_ssl import files, runs
from fkd_ssl.comparison.arms import MAPS, Arm, arms_of, pretraining, run_name, store_folder, training
from fkd_ssl.comparison.config import CompareConfig
from fkd_ssl.comparison.existing import use_store
from fkd_ssl.comparison.results import summarise
from fkd_ssl.comparison.scorer import Scorer
from fkd_ssl.crops import Recipe
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval.classify import check_classes
from fkd_ssl.eval.features import match_classes
from fkd_ssl.images import ImageSource, open_images
from fkd_ssl.objectives import only
from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.pretraining.engine import check_pretraining, weights_file
from fkd_ssl.relabel import generate
from fkd_ssl.store.maintain.recode import recode
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.store.reader import open_store
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.students import CLASSIFIER, Dim, check_student, dims_of
from fkd_ssl.targets import TeacherInfo
from fkd_ssl.teachers import Teacher
from fkd_ssl.teachers.dense import DenseTeacher
from fkd_ssl.training import defaults
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.engine import check_batch, objectives_of

# keys of trained arms only
_TRAINED = ("train_seconds", "teacher_forwards", "peak_memory_bytes", "epochs", "data_wait")
_UNTRAINED: dict[str, Any] = dict.fromkeys(_TRAINED)


class Model(Protocol):
    """A trained network."""

    @property
    def features(self) -> Callable[[Tensor], Tensor]:
        """Function from uint8 [B, 3, P, P] to backbone features [B, F]."""

    @property
    def network(self) -> nn.Module:
        """The network, in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the caller provides, so that this module does not depend on the commands."""

    recipe: Recipe
    """Augmentation that crops are drawn from."""
    load_teachers: Callable[[], list[Teacher]]
    """Loads the teachers."""
    load_model: Callable[[str, str | None], Model]
    """Loads a trained network: from a run folder, or from a family and a checkpoint."""
    train: Callable[[TrainConfig | PretrainConfig], dict[str, Any]]
    """Trains in a separate process unless the run is done, so that time and memory are its own; returns its results.json."""
    device: torch.device
    """Device that scores untrained students."""
    threads: int
    """Number of threads that read and resize images for a teacher."""
    log: Callable[[str], None] = lambda message: None
    """Shows a line to the user."""


def compare(config: CompareConfig, tools: Tools) -> dict[str, Any]:
    """Runs the missing steps of a comparison.

    Args:
        config: The comparison; `out` may hold the same comparison with other seeds or further arms.
        tools: What the caller provides.

    Returns:
        The comparison's results.json.

    Raises:
        RequestError: The request is invalid; it is checked before anything is written.
        FkdError: The training of an arm failed. The same call continues the comparison.
    """
    images, val = open_images(config.images), open_images(config.val)
    match_classes(images, val)
    teachers = tools.load_teachers()
    given, store = config, None
    if config.store is not None:
        store = open_store(config.store)
        config = use_store(config, store, images, teachers, tools.recipe)
    infos = [teacher.info for teacher in teachers]
    config = defaults.resolve(config, images=len(images), pixels=infos[0].pixels, kinds=[info.spec.kind for info in infos])
    check_student(config.student, config.pixels, *dims_of(infos), head=config.head, stem=config.stem, width=config.width)
    arms = arms_of(config, [info.name for info in infos])
    _check(config, images, val, teachers, arms)
    # before anything is written, because some networks cannot make label maps
    dense = DenseTeacher(teachers[0], pixels=config.pixels) if any(arm.kind == "relabel" for arm in arms) else None
    inputs = {**images.identity(), **val.identity("val images")}
    inputs |= {f"teacher {t.info.name}": f"{t.info.network}, sha256 {t.info.checkpoint_sha256}" for t in teachers}
    if store is not None:
        inputs |= {"store": f"{len(store)} images, sha256 {store.manifest.digest}"}
    with runs.open_run(config.out, config, inputs) as (folder, state):
        if state == "done" and all(
            runs.read_config(folder).get(key) == getattr(config, key) for key in ("further_arms", "seeds")
        ):
            tools.log(f"{folder}: this comparison is done")
            return runs.read_results(folder)
        if line := defaults.describe(given, config, len(images)):
            tools.log(line)
        files.replace(folder / runs.CONFIG, runs.to_yaml(config).encode())  # it may have new seeds and further arms
        work = _Comparison(config, tools, folder, images, val, arms, infos)
        for teacher in teachers:
            work.use_teacher(teacher)
        if dense is not None:
            work.make_label_maps(dense)
        dims = dims_of(infos[:1])
        del teachers, teacher, dense  # the processes of the trainings need the memory
        work.make_stores()
        for seed in range(config.seeds):
            work.score_untrained(seed, dims)
            for arm in sorted(arms, key=lambda arm: arm.kind == "alone"):  # last, because it trains for as long as stored
                work.train_arm(arm, seed)
        runs.finish(folder, work.results())
    return runs.read_results(folder)


def _check(config: CompareConfig, images: ImageSource, val: ImageSource, teachers: list[Teacher], arms: list[Arm]) -> None:
    """Checks codecs, classes, objective and batch before any work. Raises RequestError."""
    plain = training(arms[0], config, 0, [teacher.info for teacher in teachers])
    for teacher in teachers:
        objectives_of(replace(plain, objective=only(config.objective, [teacher.info.spec.kind])), [teacher.info])
        teacher.check_size(config.pixels)
        own = config.codec or teacher.info.spec.definition.default_codec(teacher.info.spec.shape)
        for codec in (own, *(arm.codec for arm in arms if arm.codec is not None)):
            teacher.info.spec.check_codec(codec, teacher.info.name)
        if own in [arm.codec for arm in arms]:
            raise RequestError(f"further_arms 'stored:{own}': the store already has this codec; remove this arm")
        if config.head == CLASSIFIER:
            check_classes(val, teacher.info.spec.size)
    for arm in arms:
        if arm.kind == "alone":
            check_pretraining(pretraining(config, "alone", seed=0, epochs=1), images)
        if arm.kind == "labels":  # it trains on the classes of `images` and is scored by those of `val`
            check_classes(images, len(val.classes))
    check_batch(plain, len(images))


class _Comparison:
    """A running comparison, in its locked folder."""

    def __init__(
        self,
        config: CompareConfig,
        tools: Tools,
        folder: Path,
        images: ImageSource,
        val: ImageSource,
        arms: list[Arm],
        teachers: list[TeacherInfo],
    ) -> None:
        self.config, self.tools, self.folder, self.images, self.val = config, tools, folder, images, val
        self.arms, self.teachers = arms, teachers
        self.columns = [info.name for info in teachers]
        self.scorer = Scorer(config, folder / "scores", images, val, tools.device)
        self.lines: list[dict[str, Any]] = []  # one per model of the table
        self.stores: dict[str, dict[str, Any]] = {}  # of each stored arm
        self.maps: dict[str, Any] | None = None
        self.seconds: list[float | None] = []  # time to make each teacher's column

    @property
    def precompute_seconds(self) -> float | None:
        """Time to make all columns.

        None if it is unknown: for an existing store, or if a call was killed between finishing a column and saving its time.
        """
        known = [seconds for seconds in self.seconds if seconds is not None]
        return sum(known) if len(known) == len(self.seconds) else None

    def use_teacher(self, teacher: Teacher) -> None:
        """Scores a teacher and writes its column of the store, unless there is an existing store."""
        single = len(self.columns) == 1
        name = "teacher" if single else f"teacher:{teacher.info.name}"
        scores = self.scorer.score(name.replace(":", "-"), teacher.features, classify=teacher.embed)
        self.lines.append({"name": name, "seed": None, **scores, **_UNTRAINED})
        if self.config.store is not None:
            self.seconds.append(None)
            return
        summary = precompute(
            self.images,
            self.folder / "store",
            teacher,
            crops=self.config.stored_crops,
            recipe=self.tools.recipe,
            codec=self.config.codec,
            pixels=self.config.pixels,
            threads=self.tools.threads,
            log=self.tools.log,
        )
        self._require_free(summary.busy, self.folder / "store")
        seconds = None
        if summary.crops:  # this call may have computed only a part
            seconds = summary.seconds * len(self.images) * self.config.stored_crops / summary.crops
        self.seconds.append(self._noted("precompute.json" if single else f"precompute-{teacher.info.name}.json", seconds))

    def make_label_maps(self, dense: DenseTeacher) -> None:
        """Makes the label maps of the arm `relabel`."""
        made = generate(
            self.images,
            self.folder / MAPS,
            dense,
            k=min(5, dense.teacher.info.spec.size),
            threads=self.tools.threads,
            log=self.tools.log,
        )
        self._require_free(made.busy, self.folder / MAPS)
        seconds = self._noted("label-maps.json", made.seconds * made.images / made.made if made.made else None)
        self.maps = {"bytes": made.bytes, "crops": None, "seconds": seconds}  # maps are not per crop

    def make_stores(self) -> None:
        """Makes the stores of the stored arms: all of the store, some of its crops, or a recoded copy."""
        whole = open_store(store_folder(self.config, self.arms[0]))
        for arm in self.arms:
            if arm.kind != "stored":
                continue
            out, store = store_folder(self.config, arm), whole
            if arm.crops is not None:
                self.tools.log(f"{out}: the first {arm.crops} crops of {whole.folder}")
                store = subset(whole, out, crops=arm.crops)
            elif arm.codec is not None:
                self.tools.log(f"{out}: {whole.folder} in {arm.codec}")
                store = recode(whole, arm.codec, column=self.columns[0], out=out).store
            crops, seconds = store.crops_per_image, self.precompute_seconds
            used = [column for k, column in enumerate(self.columns) if k in arm.chosen]
            unused = sum(files.total_bytes(store.column(name).folder) for name in store.column_names if name not in used)
            self.stores[arm.name] = {
                "bytes": store.total_bytes - unused,
                "crops": crops,
                "seconds": None if seconds is None else seconds * crops / whole.crops_per_image,
            }

    def score_untrained(self, seed: int, dims: Sequence[Dim]) -> None:
        """Scores the student with its initial weights."""
        scores = self.scorer.score_untrained(run_name("untrained", seed), seed, dims)
        self.lines.append({"name": "untrained", "seed": seed, **scores, **_UNTRAINED})

    def train_arm(self, arm: Arm, seed: int) -> None:
        """Trains and scores an arm."""
        name = run_name(arm.name, seed)
        run = self.folder / "runs" / name
        self.tools.log(f"== {arm.name}, seed {seed}: {run}")
        if arm.kind == "alone":
            trained, model = self._train_alone(name, seed)
        else:
            config = training(arm, self.config, seed, self.teachers)
            results = self.tools.train(replace(config, mix_groups=self.images.mix_groups))  # as the run itself resolves it
            trained, model = {key: results[key] for key in _TRAINED}, self.tools.load_model(str(run), None)
        scores = self.scorer.score(name, model.features, classify=None if arm.kind == "alone" else model.network)
        self.lines.append({"name": arm.name, "seed": seed, **scores, **trained})

    def _train_alone(self, name: str, seed: int) -> tuple[dict[str, Any], Model]:
        """Trains the student without a teacher for as long as precomputing plus the first stored training took."""
        note = self.folder / "alone.json"
        if not note.exists():
            timed = self.tools.train(pretraining(self.config, "alone-timed", seed=0, epochs=1))
            stored = next(line["train_seconds"] for line in self.lines if line["name"].startswith("stored"))
            seconds = stored + (self.precompute_seconds or 0.0)
            epochs = max(1, round(seconds / timed["train_seconds"]))
            files.write_json(note, {"seconds": seconds, "epoch_seconds": timed["train_seconds"], "epochs": epochs})
        epochs = int(files.read_json(note)["epochs"])
        config = pretraining(self.config, name, seed=seed, epochs=epochs)
        results = self.tools.train(config)
        trained = {**_UNTRAINED, **{key: results[key] for key in ("train_seconds", "peak_memory_bytes")}}
        weights = str(Path(config.out) / weights_file(config))
        network = ("teacher:mocov2", weights) if config.is_teacher else (weights, None)
        return {**trained, "teacher_forwards": 0, "epochs": epochs}, self.tools.load_model(*network)

    def results(self) -> dict[str, Any]:
        """Returns the content of results.json."""
        found = summarise(self.config, self.arms, self.lines, self.scorer, precompute_seconds=self.precompute_seconds)
        stores = self.stores if self.maps is None else {**self.stores, "relabel": self.maps}
        return {
            **found,
            "images": len(self.images),
            "val_images": len(self.val),
            "stores": stores,
            "baselines": self.scorer.score_baselines(),
        }

    def _noted(self, name: str, seconds: float | None) -> float | None:
        """Saves `seconds` in a file unless the file exists, and returns the saved value, or None if nothing was saved."""
        path = self.folder / name
        if seconds is not None and not path.exists():
            files.write_json(path, {"seconds": seconds})
        return float(files.read_json(path)["seconds"]) if path.exists() else None

    def _require_free(self, busy: list[int], place: Path) -> None:
        if busy:
            raise FkdError(f"{place}: another process is writing it; wait until it ends, then repeat the command")
