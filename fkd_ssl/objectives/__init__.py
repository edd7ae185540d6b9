"""Objectives: the loss between a student's output and a target, both [B, D] or, for grids of tokens, [B, h, w, D]."""

import inspect
from collections.abc import Collection, Iterable, Sequence

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
from fkd_ssl.objectives.tokens import TokenCosine, TokenRelations
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
    "token_cosine": TokenCosine,
    "token_relations": TokenRelations,
}
DEFAULTS = {"embedding": "feature_kl", "distribution": "soft_ce", "tokens": "token_cosine"}
"""Kind of targets -> its default objective."""


def complete(expression: str | None, kinds: Iterable[str]) -> str:
    """Adds the default objective of each of these kinds of targets that has no term in the expression.

    >>> complete("queue_kl(queue=4096)", ["embedding", "tokens"])
    'queue_kl(queue=4096)+token_cosine'

    Raises:
        RequestError: The expression cannot be read, or a name is unknown.
    """
    present = [] if expression is None else [_class_of(term).kind for term in parse(expression)]
    added = [DEFAULTS[kind] for kind in dict.fromkeys(kinds) if kind in DEFAULTS and kind not in present]
    return "+".join(added if expression is None else [expression, *added])


def only(expression: str, kinds: Collection[str]) -> str:
    """Returns the terms of an expression that are for these kinds of targets.

    >>> only("2*cosine+token_cosine", ["embedding"])
    '2.0*cosine'
    """
    return "+".join(term.text for term in parse(expression) if _class_of(term).kind in kinds)


def make_objectives(expression: str, targets: Sequence[TeacherInfo]) -> list[Objective]:
    """Makes one objective per teacher: the sum of the terms for its kind of targets.

    Raises:
        RequestError: `make_objective` raises it, a term is for another kind of targets, or a teacher has no term.
    """
    terms = parse(expression)
    for term in terms:
        if _class_of(term).kind not in [teacher.spec.kind for teacher in targets]:
            _check_kind(term, targets[0])
    return [_sum([term for term in terms if _class_of(term).kind == teacher.spec.kind], teacher) for teacher in targets]


def make_objective(expression: str, *, teacher: TeacherInfo | None = None) -> Objective:
    """Makes the objective of an expression: a single objective or a weighted sum.

    Args:
        expression: A name in OBJECTIVES, optionally with settings: `queue_kl(queue=4096, temperature=0.07)`; or a sum of them,
            optionally with weights: `feature_kl + 0.5*relational`. Settings default to the values of the paper.
        teacher: Information about the targets; optional for objectives that need only the two vectors.

    Raises:
        RequestError: The expression cannot be read, a name or a setting is unknown, a value is wrong, or the targets lack what
            the objective needs.
    """
    return _sum(parse(expression), teacher)


def settings_of(name: str) -> list[str]:
    """Returns the names of an objective's settings, the keyword-only arguments of its constructor."""
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _sum(terms: Sequence[Term], teacher: TeacherInfo | None) -> Objective:
    if not terms:
        assert teacher is not None  # by parse
        raise RequestError(f"objective: no term is for {teacher.spec.definition.display_name}, the targets of {teacher.name!r}")
    parts = [_part(term, teacher) for term in terms]
    if len(terms) == 1 and terms[0].weight == 1:
        return parts[0]
    return Weighted(parts, [term.weight for term in terms])


def _class_of(term: Term) -> type[Objective]:
    if term.name not in OBJECTIVES:
        raise RequestError(
            f"objective {term.name!r} is unknown; there are {', '.join(OBJECTIVES)}{did_you_mean(term.name, OBJECTIVES)}"
        )
    return OBJECTIVES[term.name]


def _part(term: Term, teacher: TeacherInfo | None) -> Objective:
    objective = _class_of(term)
    known = settings_of(term.name)
    for setting in term.settings:
        if setting not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise RequestError(f"objective {term.name}: no setting {setting!r}{did_you_mean(setting, known)}; {has}")
    if teacher is not None:
        _check_kind(term, teacher)
    return objective.for_targets(teacher, **term.settings)


def _check_kind(term: Term, teacher: TeacherInfo) -> None:
    """Raises RequestError if the objective is for another kind of targets."""
    kind = _class_of(term).kind
    if teacher.spec.kind == kind:
        return
    advice = {
        "embedding": "choose --objective feature_kl, for instance, and --head mocov2",
        "distribution": "choose --objective soft_ce and --head classifier",
        "tokens": "choose --objective token_cosine, for instance",
    }.get(teacher.spec.kind, f"{term.name} is for {KINDS[kind].display_name}")
    raise RequestError(
        f"objective {term.name}: the targets of {teacher.name!r} are {teacher.spec.definition.display_name}: {advice}"
    )


__all__ = [
    "DEFAULTS",
    "OBJECTIVES",
    "Cosine",
    "Discriminator",
    "FeatureKL",
    "Objective",
    "PrototypeCE",
    "QueueKL",
    "Relational",
    "SoftCE",
    "TokenCosine",
    "TokenRelations",
    "Weighted",
    "complete",
    "make_objective",
    "make_objectives",
    "only",
    "settings_of",
]
