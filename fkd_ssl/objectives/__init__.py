"""Objectives: the loss between a student's output and a target, both [B, D]."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.kinds import Kind
from fkd_ssl.objectives.cosine import Cosine
from fkd_ssl.objectives.discriminator import Discriminator
from fkd_ssl.objectives.expression import Term, parse
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


OBJECTIVES: dict[str, type[Objective]] = {
    "feature_kl": FeatureKL,
    "cosine": Cosine,
    "queue_kl": QueueKL,
    "prototype_ce": PrototypeCE,
    "relational": Relational,
    "soft_ce": SoftCE,
    "discriminator": Discriminator,
}


def make_objective(expression: str, *, about: TargetInfo | None = None) -> Objective:
    """The objective that an expression names, or a weighted sum of several.

    Args:
        expression: A name of OBJECTIVES, perhaps with settings, `queue_kl(queue=4096, temperature=0.07)`; or a sum of such,
            perhaps with weights, `feature_kl + 0.5*relational`. A setting that is not given has the paper's value.
        about: The targets that it is for; an objective that needs only its two vectors does without.

    Raises:
        RequestError: The expression cannot be read, a name or a setting is unknown, a value is wrong, or the targets lack what
            the objective needs.
    """
    terms = parse(expression)
    parts = [_part(term, about) for term in terms]
    if len(terms) == 1 and terms[0].weight == 1:
        return parts[0]
    return Weighted(parts, [term.weight for term in terms])


def settings_of(name: str) -> list[str]:
    """Names of an objective's settings: the keyword-only arguments of its constructor."""
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _part(term: Term, about: TargetInfo | None) -> Objective:
    if term.name not in OBJECTIVES:
        raise RequestError(
            f"objective {term.name!r} is unknown; there are {', '.join(OBJECTIVES)}{did_you_mean(term.name, OBJECTIVES)}"
        )
    known = settings_of(term.name)
    for setting in term.settings:
        if setting not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise RequestError(f"objective {term.name}: no setting {setting!r}{did_you_mean(setting, known)}; {has}")
    return _fitting(OBJECTIVES[term.name].for_targets(about, **term.settings), term.name, about)


def _fitting(objective: Objective, name: str, about: TargetInfo | None) -> Objective:
    """The objective; raises RequestError if it is for another kind of targets."""
    if about is not None and about.kind != objective.kind:
        what, fits = {
            "embedding": ("embeddings", "feature_kl, for instance, and --head mocov2"),
            "distribution": ("class probabilities", "soft_ce and --head classifier"),
        }[about.kind]
        raise RequestError(f"objective {name}: the targets of {about.name!r} are {what}: choose --objective {fits}")
    return objective


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
    "settings_of",
]
