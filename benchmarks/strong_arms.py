"""The experiments of strong_teacher.py: their arms, stores and settings."""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import strong_tables

STUDENT = "mobilenet_v3_small"
CODECS = ("PCA256,SQ8", "PCA64,SQ8", "OPQ64,PQ64x8", "PCA16,SQ8", "OPQ16,PQ16x8")
LABELS = ("hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm_k5")
LABELS += ("marginal_quantised_k6", "marginal_quantised_k10")
TUNING = {"targets": "labels", "objective": "soft_ce", "head": "classifier", "recipe": "fkd", "lr": 1e-3}
SMALL = "imagenette-small"
# of students that do not train well with the options of the others
OPTIONS: dict[str, dict[str, Any]] = {
    "timm/vit_tiny_patch16_224": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "clip": 1},
}
# the same for the arm `alone`; no other options were tried
ALONE: dict[str, dict[str, Any]] = {
    "timm/vit_tiny_patch16_224": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup_epochs": 1},
}
CLASSIFIER = {"objective": "soft_ce", "head": "classifier", "recipe": "fkd", "crops_per_image": 1}
CLASSIFIER_LRS = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A store: made by the teacher, the first crops of another store, or another store in another codec."""

    name: str
    images: str
    crops: int = 0
    layer: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    source: "Stored | None" = None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of a table: runs that differ only in their seed."""

    name: str
    verb: str = "train"
    """`train`, `pretrain`, or what is scored without a training: `untrained`, `teacher`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    store: Stored | None = None
    layer: str = ""
    """Suffix of an online teacher or of the scored teacher."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms that are trained on the same images for as long."""

    images: str
    """Name of the training images. The gallery of kNN is the whole set that they are from."""
    arms: list[Arm]
    reference: str
    """The arm that the others are compared with."""
    epochs: float
    options: Mapping[str, Any] = field(default_factory=dict)
    pair: tuple[str, str] | None = None
    """Two more arms whose difference is printed."""
    tuned: bool = False
    """Whether students are also fine-tuned on the labels."""


FEATURES = Stored(name=f"{SMALL}-features", images=SMALL, crops=100)
PROBABILITIES = Stored(
    name=f"{SMALL}-probabilities",
    images=SMALL,
    crops=60,
    layer="@probabilities",
    options={"recipe": "fkd", "codec": "full"},
)


def rates(args: argparse.Namespace) -> Experiment:
    """Every objective at every rate."""
    pairs = [(objective, lr) for objective in args.objectives for lr in args.lrs]
    arms = [
        Arm(name=f"{objective} {lr:g}", options={"objective": objective, "lr": lr}, store=FEATURES) for objective, lr in pairs
    ]
    options = {"crops_per_image": 1}
    return Experiment(images=SMALL, arms=arms, reference="", epochs=args.epochs or 20, options=options)


def label_rates(args: argparse.Namespace) -> Experiment:
    """Classifiers of the teacher's probabilities, and of the labels, at every rate."""
    arms = [Arm(name=f"full {lr:g}", options={"lr": lr}, store=PROBABILITIES) for lr in CLASSIFIER_LRS]
    arms += [Arm(name=f"labels {lr:g}", options={"lr": lr, "targets": "labels"}) for lr in CLASSIFIER_LRS]
    return Experiment(images=SMALL, arms=arms, reference="", epochs=args.epochs or 20, options=CLASSIFIER)


def crops(args: argparse.Namespace) -> Experiment:
    """C stored crops compared with online."""
    arms = [Arm(name=f"C={c}", store=_from(FEATURES, f"C{c}", crops=c)) for c in (1, 4, 25)]
    return _small(args, [*arms, Arm(name="C=100", store=FEATURES), Arm(name="online"), *_others(args)], "online")


def codecs(args: argparse.Namespace) -> Experiment:
    """Codecs of features; SQ8 is the arm C=100 of `crops`."""
    return _small(args, [Arm(name="SQ8", store=FEATURES), *(_recoded(FEATURES, codec) for codec in CODECS)], "SQ8")


def students(args: argparse.Namespace) -> Experiment:
    """Stored, online and without the teacher, on all images of imagenette."""
    return _whole(args, "imagenette", crops=30, epochs=30)


def tiny100(args: argparse.Namespace) -> Experiment:
    """The same on tiny100."""
    return _whole(args, "tiny100", crops=10, epochs=10)


def probabilities(args: argparse.Namespace) -> Experiment:
    """The label codecs, online, ReLabel and labels."""
    maps = {"targets": "relabel", "label_maps": args.work / "label-maps"}
    arms = [Arm(name="full", store=PROBABILITIES), *(_recoded(PROBABILITIES, codec) for codec in LABELS)]
    arms += [Arm(name="online", layer="@probabilities"), Arm(name="ReLabel", options=maps)]
    labels = {"targets": "labels", "lr": best_rate(args, "labels")}
    arms += [Arm(name="labels", options=labels), Arm(name="teacher", verb="teacher", layer="@probabilities")]
    experiment = _small(args, arms, "full", {**CLASSIFIER, "lr": best_rate(args, "full")})
    return replace(experiment, pair=("marginal_quantised_k6", "marginal_smoothing_k5"))


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], Experiment]] = {
    "rates": rates,
    "label_rates": label_rates,
    "crops": crops,
    "codecs": codecs,
    "students": students,
    "tiny100": tiny100,
    "probabilities": probabilities,
}


def best(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the objective and the rate that `rates` found, or those of the command line."""
    found = args.work / "rates.json"
    known = json.loads(found.read_text())["best"] if found.exists() else {}
    given = {key: getattr(args, key) for key in ("objective", "lr") if getattr(args, key) is not None}
    return {"objective": None, "lr": None, **known, **given}


def best_rate(args: argparse.Namespace, targets: str) -> float | None:
    """Returns the rate of classifiers of `full` or `labels` that `label_rates` found, or that of the command line."""
    found = args.work / "label_rates.json"
    if args.classifier_lr is None and found.exists():
        return float(json.loads(found.read_text())["best"][targets])
    return args.classifier_lr


def _small(args: argparse.Namespace, arms: list[Arm], reference: str, options: Mapping[str, Any] | None = None) -> Experiment:
    options = {**best(args), "crops_per_image": 1} if options is None else options
    return Experiment(images=SMALL, arms=arms, reference=reference, epochs=args.epochs or 60, options=options)


def _whole(args: argparse.Namespace, images: str, *, crops: int, epochs: float) -> Experiment:
    store = Stored(name=f"{images}-features", images=images, crops=crops)
    arms = [Arm(name="stored", store=store), Arm(name="online"), *_others(args)]
    options = {**best(args), "crops_per_image": 1, **OPTIONS.get(args.student, {})}
    epochs = args.epochs or epochs
    return Experiment(images=images, arms=arms, reference="online", epochs=epochs, options=options, tuned=True)


def _others(args: argparse.Namespace) -> list[Arm]:
    """Returns the arms without targets of the teacher, and the teacher."""
    labels = {"targets": "labels", "objective": "soft_ce", "head": "classifier", "lr": best_rate(args, "labels")}
    labels |= OPTIONS.get(args.student, {})
    arms = [Arm(name="labels", options=labels), Arm(name="alone", verb="pretrain")]
    return [*arms, *(Arm(name=name, verb=name) for name in strong_tables.UNTRAINED)]


def _from(source: Stored, suffix: str, **options: Any) -> Stored:
    return Stored(name=f"{source.name}-{suffix}", images=source.images, options=options, source=source)


def _recoded(source: Stored, codec: str) -> Arm:
    return Arm(name=codec, store=_from(source, codec.replace(",", "-"), codec=codec))
