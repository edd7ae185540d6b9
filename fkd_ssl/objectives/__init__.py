"""Objectives: the loss between a student's output and a target, both [B, D]."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.kinds import Kind
from fkd_ssl.objectives.cosine import Cosine
from fkd_ssl.objectives.discriminator import Discriminator
from fkd_ssl.objectives.feature_kl import FeatureKL
from fkd_ssl.objectives.objective import Objective
from fkd_ssl.objectives.prototype_ce import PrototypeCE
from fkd_ssl.objectives.queue_kl import QueueKL
from fkd_ssl.objectives.relational import Relational
from fkd_ssl.objectives.soft_ce import SoftCE
from fkd_ssl.objectives.weighted import Weighted


@dataclass(frozen=True, kw_only=True)
class TargetInfo:
    """What is known of one teacher's targets before the first of them is seen: of a store's column, or of a teacher."""

    name: str
    """The column or the teacher."""
    dim: int
    """D."""
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """What the teacher has beside its embeddings, for instance `prototypes` float32 [K, D]."""
    kind: Kind = "embedding"
    """L2-normalised vectors, or class probabilities."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user may say of an objective; None takes the paper's. One that has no such thing refuses it."""

    temperature: float | None = None
    """T."""
    teacher_temperature: float | None = None
    """The teacher's, where it is another."""
    queue: int | None = None
    """K, targets in a queue."""


OBJECTIVES: dict[str, Callable[[Settings, TargetInfo | None], Objective]] = {
    "feature_kl": lambda given, _: FeatureKL(**_given(given, "feature_kl", "temperature")),
    "cosine": lambda given, _: Cosine(**_given(given, "cosine")),
    "queue_kl": lambda given, about: QueueKL(
        _dim(about, "queue_kl"), **_given(given, "queue_kl", "temperature", "teacher_temperature", size="queue")
    ),
    "prototype_ce": lambda given, about: PrototypeCE(
        torch.from_numpy(_array(about, "prototypes", "prototype_ce")), **_given(given, "prototype_ce", "temperature")
    ),
    "relational": lambda given, _: Relational(**_given(given, "relational", "temperature")),
    "soft_ce": lambda given, _: SoftCE(**_given(given, "soft_ce", "temperature", "teacher_temperature")),
    "discriminator": lambda given, about: Discriminator(_dim(about, "discriminator"), **_given(given, "discriminator")),
}


def make_objective(
    name: str,
    temperature: float | None = None,
    *,
    about: TargetInfo | None = None,
    teacher_temperature: float | None = None,
    queue: int | None = None,
) -> Objective:
    """The objective of that name, or a sum of several.

    Args:
        name: Of OBJECTIVES, or such with weights between plus signs: `feature_kl+0.5*relational`.
        temperature: None takes the paper's.
        about: The targets that it is for; not needed by an objective that knows nothing but its two vectors.
        teacher_temperature: Of queue_kl.
        queue: Of queue_kl.

    Raises:
        RequestError: The name is unknown, a temperature is not positive or belongs to no objective of that name or to one of
            several, a weight is no positive number, or the targets lack what the objective needs.
    """
    given = Settings(temperature=temperature, teacher_temperature=teacher_temperature, queue=queue)
    for option, value in vars(given).items():
        if value is not None and not 0 < value < math.inf:
            raise RequestError(f"{option} {value}: must be positive and finite")
    terms = [_term(term, name) for term in name.split("+")]
    for _, one in terms:
        if one not in OBJECTIVES:
            raise RequestError(
                f"objective {one!r} is unknown; there are {', '.join(OBJECTIVES)}{did_you_mean(one, OBJECTIVES)}"
            )
    if len(terms) == 1 and "*" not in name:
        return _fitting(OBJECTIVES[terms[0][1]](given, about), terms[0][1], about)
    for option in ("temperature", "teacher_temperature"):
        if (value := getattr(given, option)) is not None:
            raise RequestError(f"{option} {value}: {name} is a sum, each of whose objectives has its own; leave it out")
    if queue is not None and all(one != "queue_kl" for _, one in terms):
        raise RequestError(f"queue {queue}: {name} has none")
    parts = [OBJECTIVES[one](Settings(queue=queue) if one == "queue_kl" else Settings(), about) for _, one in terms]
    for part, (_, one) in zip(parts, terms, strict=True):
        _fitting(part, one, about)
    return Weighted(parts, [weight for weight, _ in terms])


def _fitting(objective: Objective, name: str, about: TargetInfo | None) -> Objective:
    """The objective; raises RequestError where it is for another kind of targets."""
    if about is not None and about.kind != objective.kind:
        what, fits = {
            "embedding": ("embeddings", "feature_kl, for instance, and --head mocov2"),
            "distribution": ("class probabilities", "soft_ce and --head classifier"),
        }[about.kind]
        raise RequestError(f"objective {name}: the targets of {about.name!r} are {what}: choose --objective {fits}")
    return objective


def _term(term: str, whole: str) -> tuple[float, str]:
    """The weight and the name of one term of a sum: `0.5*relational`."""
    weight, star, name = term.rpartition("*")
    try:
        value = float(weight) if star else 1.0
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise RequestError(f"objective {whole!r}: the weight {weight!r} is no positive number; write feature_kl+0.5*relational")
    return value, name.strip()


def _given(settings: Settings, objective: str, *allowed: str, **renamed: str) -> dict[str, Any]:
    """What was said, by the objective's own argument names; raises RequestError where the objective has no such thing."""
    names = {**{name: name for name in allowed}, **{option: own for own, option in renamed.items()}}
    said = {option: value for option, value in vars(settings).items() if value is not None}
    for option, value in said.items():
        if option not in names:
            raise RequestError(f"{option} {value}: {objective} has none")
    return {names[option]: value for option, value in said.items()}


def _dim(about: TargetInfo | None, objective: str) -> int:
    if about is None:
        raise RequestError(
            f"objective {objective}: needs to know the targets' dimension; pass about=TargetInfo(name=..., dim=...)"
        )
    return about.dim


def _array(about: TargetInfo | None, array: str, objective: str) -> npt.NDArray[Any]:
    """An array of the teacher's with one row of D for each of something."""
    if about is None or array not in about.arrays:
        where = "the targets" if about is None else f"the targets of {about.name!r}"
        raise RequestError(f"objective {objective}: {where} have no {array}; use a SwAV teacher, or another objective")
    found = about.arrays[array].astype(np.float32, copy=False)
    if found.ndim != 2 or found.shape[1] != about.dim:
        raise RequestError(
            f"objective {objective}: the {array} of {about.name!r} are {list(found.shape)}, expected [K, {about.dim}]"
        )
    return found


__all__ = [
    "OBJECTIVES",
    "Cosine",
    "Discriminator",
    "FeatureKL",
    "Objective",
    "PrototypeCE",
    "QueueKL",
    "Relational",
    "SoftCE",
    "TargetInfo",
    "Weighted",
    "make_objective",
]
