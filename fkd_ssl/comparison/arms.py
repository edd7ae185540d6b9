"""The arms of a comparison: their names, and the config of each one's training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fkd_ssl.comparison.config import CompareConfig
from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.objectives import complete, only
from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.students.heads import CLASSIFIER
from fkd_ssl.targets import TeacherInfo
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.groups import checkpoints_of, split, teacher_precision

Kind = Literal["stored", "online", "alone", "labels", "relabel"]
ON_STORED = "stored_crops"
MAPS = "label-maps"
"""Folder of the label maps of the arm `relabel`, in the comparison's folder."""
_FURTHER = (f"online:{ON_STORED}", "alone", "labels", "relabel")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train the student.

    Attributes:
        kind: Source of its targets. `alone` has none; `labels` uses the images' classes, `relabel` label maps.
        detail: Distinguishes it from other arms of its kind; empty for the plain arm of a kind.
        chosen: Indices of the teachers that it is trained from.
        crops: Number of stored crops per image that it may use; None for all.
        codec: Codec of its targets; None for the store's.
        on_stored: Whether the teacher runs online on the crops of the store.
    """

    kind: Kind
    detail: str = ""
    chosen: tuple[int, ...] = (0,)
    crops: int | None = None
    codec: str | None = None
    on_stored: bool = False

    @property
    def name(self) -> str:
        """Its name in tables: KIND or KIND:DETAIL."""
        return f"{self.kind}:{self.detail}" if self.detail else self.kind

    @property
    def store(self) -> str:
        """Folder of its store, in the comparison's folder."""
        return "store" if self.crops is None and self.codec is None else f"store-{self.detail.replace(',', '-')}"


def store_folder(config: CompareConfig, arm: Arm) -> str:
    """Returns the folder of an arm's store, or its URL."""
    if config.store is not None and arm.store == "store":
        return config.store
    return str(Path(config.out) / arm.store)


def run_name(arm: str, seed: int) -> str:
    """Returns the folder of an arm's run, in `runs` of the comparison's folder."""
    return f"{re.sub('[:,]', '-', arm)}-seed{seed}"


def arms_of(config: CompareConfig, columns: Sequence[str]) -> list[Arm]:
    """Returns the arms of a comparison. With two teachers, the last `stored` and `online` arms are trained from both.

    Raises:
        RequestError: A further arm is unknown, or is in the list already.
    """
    sets: list[tuple[int, ...]] = [(0,)] if len(columns) == 1 else [(0,), (1,), (0, 1)]
    details = ["" if len(columns) == 1 else "+".join(columns[k] for k in chosen) for chosen in sets]
    kinds: tuple[Kind, Kind] = ("stored", "online")
    arms = [Arm(kind=kind, detail=d, chosen=chosen) for kind in kinds for d, chosen in zip(details, sets, strict=True)]
    for word in config.further_arms.split():
        arm = _further(word, config, sets[-1])
        if arm.name in [other.name for other in arms]:
            raise RequestError(f"further_arms {word!r}: this arm is in the comparison already; remove it")
        arms.append(arm)
    return arms


def _further(word: str, config: CompareConfig, chosen: tuple[int, ...]) -> Arm:
    """Returns the arm that a word of `further_arms` names."""
    kind, _, detail = word.partition(":")
    if word == "alone":
        return Arm(kind="alone", chosen=())
    if word in ("labels", "relabel"):
        if config.head != CLASSIFIER:
            raise RequestError(f"further_arms {word!r}: trains a classifier; add --head {CLASSIFIER}")
        if word == "relabel" and len(chosen) > 1:
            raise RequestError(f"further_arms {word!r}: label maps come from one teacher; name one teacher, or remove this arm")
        return Arm(kind="labels" if word == "labels" else "relabel", chosen=())
    if word == _FURTHER[0]:
        return Arm(kind="online", detail=detail, chosen=chosen, on_stored=True)
    if kind != "stored" or not detail:
        raise RequestError(
            f"further_arms {word!r}: unknown arm{did_you_mean(word, _FURTHER)}; expected {', '.join(_FURTHER)}, "
            "stored:C=NUMBER or stored:CODEC"
        )
    if match := re.fullmatch(r"C=(\d+)", detail):
        crops = int(match[1])
        if not config.crops_per_image <= crops < config.stored_crops:
            raise RequestError(
                f"further_arms {word!r}: expected {config.crops_per_image} (--crops_per_image) to {config.stored_crops - 1} "
                f"crops, fewer than the {config.stored_crops} of the store"
            )
        return Arm(kind="stored", detail=detail, chosen=chosen, crops=crops)
    if len(chosen) > 1:
        raise RequestError(f"further_arms {word!r}: codecs are compared with one teacher; name one teacher, or remove this arm")
    return Arm(kind="stored", detail=detail, chosen=chosen, codec=detail)


def training(arm: Arm, config: CompareConfig, seed: int, teachers: Sequence[TeacherInfo]) -> TrainConfig:
    """Returns the config of the training of any arm but `alone`. The teachers' names are their columns of the store."""
    own = {"out", "store", "teacher", "teacher_weights", "checkpoint", "crops", "codec", "teacher_precision", "grid"}
    shared = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(CompareConfig)} - own
    where: dict[str, Any] = {
        "targets": arm.kind,
        "teacher_weights": config.teacher_weights if len(arm.chosen) > 1 else None,
        "store": store_folder(config, arm) if arm.kind == "stored" or arm.on_stored else None,
        "label_maps": str(Path(config.out) / MAPS) if arm.kind == "relabel" else None,
    }
    if arm.kind == "stored":
        where["column"] = ",".join(teachers[k].name for k in arm.chosen)
    elif arm.kind == "online":
        files = [checkpoints_of(config.teacher, config.checkpoint)[k] for k in arm.chosen]
        where["teacher"] = ",".join(split(config.teacher)[k] for k in arm.chosen)
        where["teacher_precision"] = teacher_precision(config)
        where["grid"] = config.grid if any(name.endswith("@tokens") for name in split(where["teacher"])) else None
        where["checkpoint"] = ",".join(file or "" for file in files) if any(files) else None
    kinds = [teachers[k].spec.kind for k in arm.chosen] or ["distribution"]
    where["objective"] = only(complete(config.objective, kinds), kinds)
    out = str(Path(config.out) / "runs" / run_name(arm.name, seed))
    return TrainConfig(out=out, seed=seed, **{**{key: getattr(config, key) for key in shared}, **where})


def pretraining(config: CompareConfig, name: str, *, seed: int, epochs: int) -> PretrainConfig:
    """Returns the config of the training of the arm `alone`, in the run `name`.

    A student that needs AdamW gets it here too, with the same share of warm-up.
    """
    adamw = config.optimizer == "adamw"
    return PretrainConfig(
        images=config.images,
        out=str(Path(config.out) / "runs" / name),
        arch=config.student,
        stem=config.stem,
        width=config.width,
        epochs=epochs,
        batch_size=config.batch_size,
        pixels=config.pixels,
        optimizer="adamw" if adamw else "sgd",
        lr=config.alone_lr,
        warmup_epochs=(config.warmup_epochs or 0.0) / config.epochs * epochs if adamw else 0.0,
        momentum=config.alone_momentum,
        seed=seed,
        precision=config.precision,
        workers=config.workers,
    )
