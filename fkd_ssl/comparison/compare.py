"""Trains and scores the arms of a comparison, each once; what is there is not made again."""

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fkd_ssl import files, processes, runs
from fkd_ssl.commands import resolve
from fkd_ssl.comparison.arms import MAPS, Arm, arms_of, run_name, training
from fkd_ssl.comparison.config import CompareConfig
from fkd_ssl.comparison.scorer import PROBES, Scorer
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval import stats
from fkd_ssl.eval.classify import check_classes
from fkd_ssl.eval.features import match_classes
from fkd_ssl.images import ImageSource, open_images
from fkd_ssl.objectives import TargetInfo
from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.pretraining.engine import check_pretraining, weights_file
from fkd_ssl.relabel import generate
from fkd_ssl.store.codecs import check_kind, code_size, usual_codec
from fkd_ssl.store.maintain.recode import recode
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.students import CLASSIFIER, check_student
from fkd_ssl.teachers import Teacher
from fkd_ssl.teachers.dense import DenseTeacher
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.engine import check_batch, objective_of
from fkd_ssl.training.metrics import read_metrics

Log = Callable[[str], None]
# what only a trained arm has
_TRAINED = ("train_seconds", "teacher_forwards", "peak_memory_bytes", "epochs", "data_wait")
_UNTRAINED: dict[str, Any] = dict.fromkeys(_TRAINED)


def compare(config: CompareConfig, log: Log = lambda message: None) -> dict[str, Any]:
    """Runs what is missing of a comparison.

    Args:
        config: What is compared; `out` may hold the same comparison of other seeds and further arms.
        log: Takes lines for the user.

    Returns:
        What its results.json says.

    Raises:
        RequestError: Something asked for cannot be; this is found before anything is written.
        FkdError: An arm's training failed; called again, it continues.
    """
    images, val = open_images(config.images), open_images(config.val)
    match_classes(images, val)
    resolve.recipe_of(config.recipe)
    check_student(config.student, config.pixels, head=config.head, stem=config.stem, width=config.width)
    teachers = resolve.teachers_of(config.teacher, config.checkpoint)
    columns = [teacher.name for teacher in teachers]
    arms = arms_of(config, columns)
    plain = training(arms[0], config, 0, columns)
    for teacher in teachers:
        objective_of(plain, TargetInfo(name=teacher.name, dim=teacher.dim, arrays=teacher.arrays, kind=teacher.kind))
        own = config.codec or usual_codec(teacher.kind, teacher.dim)
        for codec in (own, *(arm.codec for arm in arms if arm.codec is not None)):
            code_size(codec, teacher.dim)
            check_kind(teacher.kind, codec, teacher.name)
        if own in [arm.codec for arm in arms]:
            raise RequestError(f"further_arms 'stored:{own}': the store has that codec")
        if config.head == CLASSIFIER:
            check_classes(val, teacher.dim)
    for arm in arms:
        if arm.kind == "alone":
            check_pretraining(_alone(config, "alone", seed=0, epochs=1), images)
        if arm.kind == "labels":  # its classes are the folders of the images, and those of `val` are what it is scored by
            check_classes(images, len(val.classes))
    check_batch(plain, len(images))
    # before anything is written: not every network can make maps
    dense = DenseTeacher(teachers[0], pixels=config.pixels) if any(arm.kind == "relabel" for arm in arms) else None

    inputs = {**images.identity(), **val.identity("val images")}
    inputs |= {f"teacher {teacher.name}": f"{teacher.network}, sha256 {teacher.checkpoint_sha256}" for teacher in teachers}
    with runs.open_run(config.out, config, inputs) as (folder, state):
        if state == "done" and all(
            runs.read_config(folder).get(key) == getattr(config, key) for key in ("further_arms", "seeds")
        ):
            log(f"{folder}: this comparison is done")
            return runs.read_results(folder)
        files.replace(folder / runs.CONFIG, runs.to_yaml(config).encode())  # perhaps other seeds and further arms
        scorer = Scorer(config, folder / "scores", images, val)
        lines: list[dict[str, Any]] = []
        made: list[dict[str, Any] | None] = []
        for teacher in teachers:
            name = "teacher" if len(teachers) == 1 else f"teacher:{teacher.name}"
            scores = scorer.score(name.replace(":", "-"), teacher.features, classify=teacher.embed)
            lines.append({"name": name, "seed": None, **scores, **_UNTRAINED})
            took = folder / ("precompute.json" if len(teachers) == 1 else f"precompute-{teacher.name}.json")
            made.append(_precompute(config, folder, images, teacher, took, log))
        maps = _label_maps(folder, images, dense, log) if dense is not None else None
        dim = teachers[0].dim
        del teachers, teacher, dense  # the trainings are processes of their own, and need the memory
        whole = [cost for cost in made if cost is not None]
        cost = {"seconds": sum(one["seconds"] for one in whole)} if len(whole) == len(made) else {}
        stores = {arm.name: _store(arm, folder, columns, cost, log) for arm in arms if arm.kind == "stored"}
        if maps is not None:
            stores["relabel"] = maps
        for seed in range(config.seeds):
            scores = scorer.score_untrained(run_name("untrained", seed), seed, dim)
            lines.append({"name": "untrained", "seed": seed, **scores, **_UNTRAINED})
            for arm in sorted(arms, key=lambda arm: arm.kind == "alone"):  # last: it gets the time that stored took
                run = folder / "runs" / run_name(arm.name, seed)
                log(f"== {arm.name}, seed {seed}: {run}")
                if arm.kind == "alone":
                    trained, model = _train_alone(config, folder, seed, lines, cost, log)
                else:
                    trained, model = _train(training(arm, config, seed, columns), run, log), resolve.model_of(str(run))
                scores = scorer.score(run.name, model.features, classify=None if arm.kind == "alone" else model.network)
                lines.append({"name": arm.name, "seed": seed, **scores, **trained})
        runs.finish(folder, _results(config, len(images), len(val), arms, lines, cost, stores, scorer))
        return runs.read_results(folder)


def _results(
    config: CompareConfig,
    images: int,
    val: int,
    arms: Sequence[Arm],
    lines: Sequence[dict[str, Any]],
    cost: dict[str, Any],
    stores: dict[str, dict[str, Any]],
    scorer: Scorer,
) -> dict[str, Any]:
    def difference(one: str, other: str) -> dict[str, Any]:
        """Of two arms in each probe, with its interval."""
        found: dict[str, Any] = {"arm": one, "minus": other}
        for probe in scorer.probes if "alone" not in (one, other) else PROBES:
            a, b = (
                np.stack([scorer.correct(run_name(name, seed), probe) for seed in range(config.seeds)]) for name in (one, other)
            )
            value, low, high = stats.paired_bootstrap(a, b)
            found[probe] = {"difference": value, "low": low, "high": high, "equal": stats.equal(low, high)}
        return found

    def seconds(name: str) -> float:
        return float(statistics.mean(line["train_seconds"] for line in lines if line["name"] == name))

    plain = [arm for arm in arms if not (arm.on_stored or arm.crops or arm.codec)]
    stored, online = ([arm.name for arm in plain if arm.kind == kind] for kind in ("stored", "online"))
    pairs = [(stored[-1], online[-1])]
    pairs += [(stored[-1], single) for single in stored[:-1]]
    pairs += [(arm.name, online[-1]) for arm in arms if arm.on_stored]
    pairs += [(stored[-1], arm.name) for arm in arms if arm.kind in ("alone", "labels", "relabel")]
    pairs += [(arm.name, stored[-1]) for arm in arms if arm.crops or arm.codec]
    saved, taken = seconds(online[-1]) - seconds(stored[-1]), cost.get("seconds")
    students = None if taken is None or saved <= 0 else taken / saved
    return {
        "config": config.__dict__,
        "images": images,
        "val_images": val,
        "crops": config.stored_crops,
        "arms": list(lines),
        "differences": [difference(*pair) for pair in pairs],
        "precompute_seconds": taken,
        "stores": stores,
        "break_even_students": None if students is None else math.ceil(students),
        "break_even_epochs": None if students is None else students * config.epochs,
        "reached": _reached(config, online[-1], [arm.name for arm in arms if arm.kind != "alone"]),
    }


def _reached(config: CompareConfig, online: str, names: Sequence[str]) -> dict[str, Any]:
    """How long each arm trained until its kNN was within the margin of online's last one: means over seeds, None for never."""
    curves: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in names}
    for name in names:
        for seed in range(config.seeds):
            metrics = read_metrics(Path(config.out) / "runs" / run_name(name, seed) / "metrics.csv")
            curves[name].append(
                [(line["seconds"] or 0.0, line["knn_top1"]) for line in metrics if line["knn_top1"] is not None]
            )
    goal = statistics.mean(curve[-1][1] for curve in curves[online]) - stats.MARGIN
    first = {name: [next((s for s, top1 in curve if top1 >= goal), None) for curve in curves[name]] for name in names}
    return {
        "knn_top1": goal,
        "seconds": {name: None if None in times else statistics.mean(t for t in times if t) for name, times in first.items()},
    }


def _precompute(
    config: CompareConfig, folder: Path, images: ImageSource, teacher: Teacher, took: Path, log: Log
) -> dict[str, Any] | None:
    """Makes a column of the comparison's store; returns the `seconds` of all of it, also when this call made a part.

    They are kept in `took`. None where the column was finished by a call that was killed before it could note them.
    """
    summary = precompute(
        images,
        folder / "store",
        teacher,
        crops=config.stored_crops,
        recipe=resolve.recipe_of(config.recipe),
        codec=config.codec,
        pixels=config.pixels,
        threads=min(16, resolve.cpu_threads()),
        log=log,
    )
    if summary.busy:
        raise FkdError(f"{folder / 'store'}: another process is writing it; run the same compare again when that has ended")
    if not took.exists() and summary.crops:
        files.write_json(took, {"seconds": summary.seconds * len(images) * config.stored_crops / summary.crops})
    return files.read_json(took) if took.exists() else None


def _store(arm: Arm, folder: Path, columns: Sequence[str], cost: dict[str, Any], log: Log) -> dict[str, Any]:
    """Makes the store of an arm that needs one of its own; returns its `bytes`, and the `crops` an image that it holds.

    `seconds` is what precomputing so many crops takes.
    """
    out = folder / arm.store
    store = Store(folder / "store")
    if arm.crops is not None:
        log(f"{out}: the first {arm.crops} crops of {store.folder}")
        store = subset(store, out, crops=arm.crops)
    elif arm.codec is not None:
        log(f"{out}: {store.folder} in {arm.codec}")
        store = recode(store, arm.codec, name=columns[0], out=out).store
    c = store.crops_per_image
    whole = cost.get("seconds")
    seconds = None if whole is None else whole * c / Store(folder / "store").crops_per_image
    used = [column for k, column in enumerate(columns) if k in arm.chosen]
    unused = sum(files.total_bytes(store.column(name).folder) for name in store.teachers if name not in used)
    return {"bytes": files.total_bytes(store.folder) - unused, "crops": c, "seconds": seconds}


def _label_maps(folder: Path, images: ImageSource, dense: DenseTeacher, log: Log) -> dict[str, Any]:
    """Makes the label maps of the arm relabel; as `_store`, with None for `crops`, since they serve any."""
    took = folder / "label-maps.json"
    made = generate(images, folder / MAPS, dense, k=min(5, dense.teacher.dim), threads=min(16, resolve.cpu_threads()), log=log)
    if made.busy:
        raise FkdError(f"{folder / MAPS}: another process is writing it; run the same compare again when that has ended")
    if not took.exists() and made.made:
        files.write_json(took, {"seconds": made.seconds * made.images / made.made})
    seconds = files.read_json(took)["seconds"] if took.exists() else None
    return {"bytes": made.bytes, "crops": None, "seconds": seconds}


def _train(config: TrainConfig, run: Path, log: Log) -> dict[str, Any]:
    """Trains an arm in a process of its own, so that its memory and its clock are its own."""
    results = _run_of("train", config, run, log)
    return {key: results[key] for key in _TRAINED}


def _train_alone(
    config: CompareConfig, folder: Path, seed: int, lines: Sequence[dict[str, Any]], cost: dict[str, Any], log: Log
) -> tuple[dict[str, Any], resolve.Model]:
    """Trains the student without a teacher, for the time that the first stored one took with its precomputing."""
    note = folder / "alone.json"
    if not note.exists():
        name = "alone-timed"
        of_epoch = _run_of("pretrain", _alone(config, name, seed=0, epochs=1), folder / "runs" / name, log)["train_seconds"]
        stored = next(line["train_seconds"] for line in lines if line["name"].startswith("stored"))
        seconds = stored + (cost.get("seconds") or 0.0)
        epochs = max(1, round(seconds / of_epoch))
        files.write_json(note, {"seconds": seconds, "epoch_seconds": of_epoch, "epochs": epochs})
    epochs = int(files.read_json(note)["epochs"])
    run = folder / "runs" / run_name("alone", seed)
    pretraining = _alone(config, run.name, seed=seed, epochs=epochs)
    results = _run_of("pretrain", pretraining, run, log)
    trained = {**_UNTRAINED, **{key: results[key] for key in ("train_seconds", "peak_memory_bytes")}}
    weights = str(run / weights_file(pretraining))
    network = ("teacher:mocov2", weights) if pretraining.is_teacher else (weights, None)
    return {**trained, "teacher_forwards": 0, "epochs": epochs}, resolve.model_of(*network)


def _alone(config: CompareConfig, name: str, *, seed: int, epochs: int) -> PretrainConfig:
    """The training of the student without a teacher."""
    return PretrainConfig(
        images=config.images, out=str(Path(config.out) / "runs" / name), arch=config.student, stem=config.stem,
        width=config.width, epochs=epochs, batch_size=config.batch_size, pixels=config.pixels, lr=config.alone_lr,
        momentum=config.alone_momentum, seed=seed, workers=config.workers,
    )  # fmt: skip


def _run_of(verb: str, config: Any, run: Path, log: Log) -> dict[str, Any]:
    """The results of a run of a verb, which is started as a process, or gone on with, unless it is done."""
    if runs.peek(run, config) != "done":
        run.parent.mkdir(exist_ok=True)
        file = run.parent / f"{run.name}.yaml"
        files.replace(file, runs.to_yaml(config).encode())
        command = [sys.executable, "-P", "-m", "fkd_ssl", verb, "--config", str(file)]
        env = {**os.environ, processes.PARENT: str(os.getpid())}
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=env)  # noqa: S603
        if ended.returncode:
            runs.forget_contents(run.parent.parent)  # it may have been an image that can be repaired
            raise FkdError(f"{run}: training ended with status {ended.returncode}; the same compare continues it")
        log(ended.stdout.strip())
    return runs.read_results(run)
