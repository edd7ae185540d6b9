"""Stored against online, over several seeds: table, curves, and the break-even.

The same student, initial weights, order of images, schedule and epochs, with targets from a
store or from the teacher itself, over several seeds. Scores teacher, trained and untrained students by kNN and a linear
probe, and says after how many students the store has paid for itself. Arms that are done are not run again. Of two
teachers A,B it compares three trainings in each way: from A, from B, and from both (arms stored:A, stored:B, stored:A+B, ...).
"""

import io
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.training.config import TrainConfig, checkpoints_of, split

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from fkd_ssl.images import ImageSet
    from fkd_ssl.teachers import Teacher

ARMS = ("stored", "online")
PROBES = ("knn_top1", "linear_top1")
# what only a trained arm has
_UNTRAINED = dict.fromkeys(("train_seconds", "teacher_forwards", "peak_memory_bytes", "epochs", "data_wait"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of compare."""

    images: str
    """Folder of training images in class folders; the labels are used by the probes alone."""
    val: str
    """Folder of test images in class folders."""
    teacher: str
    """A family, a preset, torchvision/NAME, timm/NAME, or module:function of your own (fkd-ssl teachers explains them); A,B
    for two."""
    teacher_weights: str | None = None
    """With two teachers: each one's share of the loss of both, as 2,1; equal by default."""
    checkpoint: str | None = None
    """The teacher's weights; of two teachers F,G in their order."""
    out: str
    """Folder of the comparison: store, runs, report.md, results.json, plots."""
    student: str = "resnet18"
    """As train takes it."""
    head: str = "mocov2"
    """Projection head: mocov2 or simreg."""
    stem: Literal["standard", "small"] = "standard"
    """small for images of 32 or 64 px."""
    width: float = 1.0
    """Factor of the student's channels, as train takes it."""
    epochs: float = 100
    """Of every arm; one epoch is one crop of every image."""
    seeds: int = 1
    """Repetitions, with seeds 0, 1, ..."""
    crops: int | None = None
    """C, stored crops per image; as many as epochs by default, since more are never read."""
    codec: str = "SQ8"
    """Of the store."""
    recipe: str = "mocov2"
    """What crops are drawn from, in both arms."""
    pixels: int = 224
    """Side of all crops."""
    crops_per_image: int = 4
    """M, in both arms."""
    batch_size: int = 256
    """Crops in a batch."""
    objective: str = "feature_kl"
    """As train takes it, with the papers' temperatures; prototype_ce where every teacher has prototypes."""
    queue: int | None = None
    """Targets in queue_kl's queue."""
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    """Of both arms."""
    lr: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Of weights."""
    warmup_epochs: float = 0.0
    """Linear warm-up."""
    workers: int = 2
    """Processes that read images."""
    knn_every: float = 5
    """Epochs between the kNN scores that the curves are drawn from."""
    knn_k: int = 20
    """Neighbours."""
    json: bool = False
    """Print results.json on standard output."""

    FREE: ClassVar = ("workers", "json")

    def __post_init__(self) -> None:
        if len(split(self.teacher)) > 2:
            raise RequestError(f"teacher {self.teacher}: compare takes one or two teachers; train takes more")
        if self.teacher_weights is not None and len(split(self.teacher)) < 2:
            raise RequestError(f"teacher_weights {self.teacher_weights!r}: there is one teacher; name two as --teacher A,B")
        checkpoints_of(self.teacher, self.checkpoint)
        if self.seeds < 1 or self.epochs <= 0:
            raise RequestError(f"seeds {self.seeds} and epochs {self.epochs}: must be positive")
        crops = math.ceil(self.epochs) if self.crops is None else self.crops
        if crops < self.crops_per_image:
            raise RequestError(f"crops {crops} stored an image: fewer than the {self.crops_per_image} of --crops_per_image")


def run(config: Config) -> int:
    """Compares and prints the table."""
    from fkd_ssl import report, runs
    from fkd_ssl.commands import console

    asked = replace(config, json=False)  # printing is no part of what is compared
    if runs.peek(config.out, asked) == "done":
        console.say(f"{config.out}: this comparison is done")
        results = runs.read_results(Path(config.out))
    else:
        results = compare(asked)
    text = report.write(results, Path(config.out))
    if config.json:
        console.show_json(results)
    else:
        console.show(text)
    console.say(f"report: {Path(config.out) / 'report.md'}")
    return 0


def compare(config: Config) -> dict[str, Any]:
    """Runs what is missing of a comparison; returns what its results.json says."""
    from fkd_ssl import runs
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.eval import stats
    from fkd_ssl.eval.features import match_classes
    from fkd_ssl.images import scan
    from fkd_ssl.objectives import TargetInfo, make_objective
    from fkd_ssl.report import run_name
    from fkd_ssl.store.codecs import code_size
    from fkd_ssl.students import check_student
    from fkd_ssl.training.engine import check_batch

    images, val = scan(config.images), scan(config.val)
    match_classes(images, val)
    resolve.recipe_of(config.recipe)
    shape: dict[str, Any] = {"head": config.head, "stem": config.stem, "width": config.width}
    check_student(config.student, config.pixels, **shape)
    files = checkpoints_of(config.teacher, config.checkpoint)
    teachers = [resolve.teacher_of(name, file) for name, file in zip(split(config.teacher), files, strict=True)]
    columns = [teacher.name for teacher in teachers]
    if len(set(columns)) != len(columns):
        raise RequestError(f"teacher {config.teacher}: two of one name; give one of them as module:function of another name")
    for teacher in teachers:
        about = TargetInfo(name=teacher.name, dim=teacher.dim, arrays=teacher.arrays)
        make_objective(config.objective, about=about, queue=config.queue)
        code_size(config.codec, teacher.dim)
    sets = [[0]] if len(teachers) == 1 else [[0], [1], [0, 1]]
    check_batch(_arm(config, Path(config.out), "stored", 0, columns, sets[-1]), len(images))
    folder, _ = runs.open_run(config.out, config)  # all that can be wrong has been found before anything is written
    scorer = _Scorer(config, folder / "scores", images, val)

    arms: list[dict[str, Any]] = []
    seconds: list[float | None] = []
    for k, teacher in enumerate(teachers):
        name = _name("teacher", columns, [k])
        scores = scorer.score(name.replace(":", "-"), teacher.features)
        arms.append({"name": name, "seed": None, **scores, **_UNTRAINED})
        took = "precompute.json" if len(teachers) == 1 else f"precompute-{teacher.name}.json"
        seconds.append(_precompute(config, folder, images, teacher, folder / took))
    precompute_seconds = None if None in seconds else sum(part for part in seconds if part is not None)
    dim = teachers[0].dim
    del teachers, teacher
    for seed in range(config.seeds):
        untrained = f"untrained-seed{seed}"
        arms.append({"name": "untrained", "seed": seed, **scorer.score_untrained(untrained, seed, dim), **_UNTRAINED})
        for kind in ARMS:
            for chosen in sets:
                name = _name(kind, columns, chosen)
                run = folder / "runs" / run_name(name, seed)
                console.say(f"== {name}, seed {seed}: {run}")
                trained = _train(_arm(config, folder, kind, seed, columns, chosen), run)
                student = resolve.model_of(str(run))
                arms.append({"name": name, "seed": seed, **scorer.score(run.name, student.features), **trained})

    def difference(one: str, other: str) -> dict[str, Any]:
        """Of two arms in each probe, with its interval."""
        found = {}
        for row, probe in enumerate(PROBES):
            a, b = (np.stack([scorer.correct(run_name(x, s))[row] for s in range(config.seeds)]) for x in (one, other))
            value, low, high = stats.paired_bootstrap(a, b)
            found[probe] = {"difference": value, "low": low, "high": high, "equal": stats.equal(low, high)}
        return found

    all_stored, all_online = (_name(kind, columns, sets[-1]) for kind in ARMS)
    stored = [arm for arm in arms if arm["name"] == all_stored]
    online = [arm for arm in arms if arm["name"] == all_online]
    singles = [_name("stored", columns, chosen) for chosen in sets[:-1]]
    saved = statistics.mean(arm["train_seconds"] for arm in online) - statistics.mean(arm["train_seconds"] for arm in stored)
    results = {
        "config": config.__dict__,
        "images": len(images),
        "val_images": len(val),
        "crops": _crops(config),
        "arms": arms,
        "differences": difference(all_stored, all_online),
        **({"gains": {name: difference(all_stored, name) for name in singles}} if singles else {}),
        "precompute_seconds": precompute_seconds,
        "store_bytes": sum(f.stat().st_size for f in (folder / "store").rglob("*") if f.is_file()),
        "break_even_students": math.ceil(precompute_seconds / saved) if saved > 0 and precompute_seconds else None,
    }
    runs.finish(folder, results)
    return runs.read_results(folder)


class _Scorer:
    """kNN and linear probe of a model; what has been scored is kept with the correctness of every test image."""

    def __init__(self, config: Config, folder: Path, images: "ImageSet", val: "ImageSet") -> None:
        self.config = config
        self.folder = folder
        self.images = images
        self.val = val
        folder.mkdir(exist_ok=True)

    def score(self, name: str, features: "Callable[[Tensor], Tensor]") -> dict[str, Any]:
        """`knn_top1` and `linear_top1` in percent of backbone features."""
        from fkd_ssl import files
        from fkd_ssl.eval import knn, logreg
        from fkd_ssl.eval.features import extract_split

        path = self.folder / f"{name}.json"
        if path.exists():
            return files.read_json(path)
        split = extract_split(
            features, self.images, self.val, pixels=self.config.pixels, workers=self.config.workers, progress=False
        )
        common: dict[str, Any] = {
            "train_features": split.train_features,
            "train_labels": split.train_labels,
            "features": split.features,
            "labels": split.labels,
            "num_classes": len(split.classes),
        }
        neighbours = knn.evaluate_features(k=self.config.knn_k, **common)
        probe = logreg.evaluate(progress=False, **common)
        scores = {"knn_top1": neighbours["top1"], "linear_top1": probe["top1"]}
        buffer = io.BytesIO()
        np.save(buffer, np.stack([neighbours["correct"], probe["correct"]]))
        files.replace(self.folder / f"{name}.npy", buffer.getvalue())
        files.write_json(path, scores)
        return scores

    def score_untrained(self, name: str, seed: int, dim: int) -> dict[str, Any]:
        """The scores of the student as training starts from it."""
        import torch

        from fkd_ssl.commands import resolve
        from fkd_ssl.students import Student

        torch.manual_seed(seed)
        shape: dict[str, Any] = {"head": self.config.head, "stem": self.config.stem, "width": self.config.width}
        return self.score(name, Student(self.config.student, dim, **shape).eval().to(resolve.device()).features)

    def correct(self, name: str) -> "npt.NDArray[np.bool_]":
        """Correctness of every test image: bool [probes, n]."""
        array: npt.NDArray[np.bool_] = np.load(self.folder / f"{name}.npy", allow_pickle=False)
        return array


def _crops(config: Config) -> int:
    return math.ceil(config.epochs) if config.crops is None else config.crops


def _precompute(config: Config, folder: Path, images: "ImageSet", teacher: "Teacher", took: Path) -> float | None:
    """Makes a column of the comparison's store; returns the seconds it takes, all of it, also when this call made but a part.

    They are kept in `took`. None where the column was finished by a call that was killed before it could note its time.
    """
    from fkd_ssl import files
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.store.precompute import precompute

    summary = precompute(
        images,
        folder / "store",
        teacher,
        crops=_crops(config),
        recipe=resolve.recipe_of(config.recipe),
        codec=config.codec,
        pixels=config.pixels,
        threads=min(16, resolve.cpu_threads()),
        log=console.say,
    )
    if summary.busy:
        raise FkdError(f"{folder / 'store'}: another process is writing it; run the same compare again when that has ended")
    if not took.exists() and summary.crops:
        total = len(images) * _crops(config)
        files.write_json(took, {"seconds": summary.seconds * total / summary.crops})
    return float(files.read_json(took)["seconds"]) if took.exists() else None


def _name(kind: str, columns: list[str], chosen: list[int]) -> str:
    """An arm's name: its kind, and of several teachers those that it is trained from."""
    return kind if len(columns) == 1 else f"{kind}:{'+'.join(columns[k] for k in chosen)}"


def _arm(config: Config, folder: Path, kind: str, seed: int, columns: list[str], chosen: list[int]) -> TrainConfig:
    """The training of an arm, from those `chosen` of the teachers whose targets are in `columns`."""
    from fkd_ssl.report import run_name

    own = {"out", "teacher", "teacher_weights", "checkpoint"}
    shared = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(Config)} - own
    where: dict[str, Any] = {"targets": kind, "teacher_weights": config.teacher_weights if len(chosen) > 1 else None}
    if kind == "stored":
        where |= {"store": str(folder / "store"), "teacher": ",".join(columns[k] for k in chosen) if len(columns) > 1 else None}
    else:
        files = [checkpoints_of(config.teacher, config.checkpoint)[k] for k in chosen]
        where |= {
            "teacher": ",".join(split(config.teacher)[k] for k in chosen),
            "checkpoint": ",".join(file or "" for file in files) if any(files) else None,
        }
    out = str(folder / "runs" / run_name(_name(kind, columns, chosen), seed))
    return TrainConfig(out=out, seed=seed, **{key: getattr(config, key) for key in shared}, **where)


def _train(config: TrainConfig, run: Path) -> dict[str, Any]:
    """Trains an arm in a process of its own, so that its memory and its clock are its own."""
    from fkd_ssl import files, runs
    from fkd_ssl.commands import console

    if runs.peek(run, config) != "done":
        run.parent.mkdir(exist_ok=True)
        file = run.parent / f"{run.name}.yaml"
        files.replace(file, runs.to_yaml(config).encode())
        command = [sys.executable, "-P", "-m", "fkd_ssl", "train", "--config", str(file)]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
        if ended.returncode:
            raise FkdError(f"{run}: training ended with status {ended.returncode}; the same compare continues it")
        console.say(ended.stdout.strip())
    results = runs.read_results(run)
    return {key: results[key] for key in _UNTRAINED}
