"""Objectives: the loss between a student's output and a target, both [B, D]."""

import inspect

from fkd_ssl.errors import RequestError, did_you_mean
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
from fkd_ssl.targets import KINDS, TeacherInfo

OBJECTIVES: dict[str, type[Objective]] = {
    "feature_kl": FeatureKL,
    "cosine": Cosine,
    "queue_kl": QueueKL,
    "prototype_ce": PrototypeCE,
    "relational": Relational,
    "soft_ce": SoftCE,
    "discriminator": Discriminator,
}


def make_objective(expression: str, *, about: TeacherInfo | None = None) -> Objective:
    """Makes the objective of an expression: a single objective or a weighted sum.

    Args:
        expression: A name in OBJECTIVES, optionally with settings: `queue_kl(queue=4096, temperature=0.07)`; or a sum of them,
            optionally with weights: `feature_kl + 0.5*relational`. Settings default to the values of the paper.
        about: Information about the targets; optional for objectives that need only the two vectors.

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
    """Returns the names of an objective's settings, the keyword-only arguments of its constructor."""
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _part(term: Term, about: TeacherInfo | None) -> Objective:
    if term.name not in OBJECTIVES:
        raise RequestError(
            f"objective {term.name!r} is unknown; there are {', '.join(OBJECTIVES)}{did_you_mean(term.name, OBJECTIVES)}"
        )
    known = settings_of(term.name)
    for setting in term.settings:
        if setting not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise RequestError(f"objective {term.name}: no setting {setting!r}{did_you_mean(setting, known)}; {has}")
    objective = OBJECTIVES[term.name].for_targets(about, **term.settings)
    _check_kind(objective, term.name, about)
    return objective


def _check_kind(objective: Objective, name: str, about: TeacherInfo | None) -> None:
    """Raises RequestError if the objective is for another kind of targets."""
    if about is not None and about.spec.kind != objective.kind:
        advice = {
            "embedding": "choose --objective feature_kl, for instance, and --head mocov2",
            "distribution": "choose --objective soft_ce and --head classifier",
        }.get(about.spec.kind, f"{name} is for {KINDS[objective.kind].display_name}")
        raise RequestError(
            f"objective {name}: the targets of {about.name!r} are {about.spec.definition.display_name}: {advice}"
        )


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
    "Weighted",
    "make_objective",
    "settings_of",
]
