"""Objectives: the loss between a student's output and a target, both [B, D] and L2-normalised."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.objectives.cosine import Cosine
from fkd_ssl.objectives.feature_kl import FeatureKL
from fkd_ssl.objectives.prototype_ce import PrototypeCE


class Objective(Protocol):
    """What training asks of a loss."""

    def __call__(self, student: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of student [B, D] and target [B, D]."""

    def floor(self, target: Tensor) -> Tensor:
        """The least loss that these targets allow, a scalar."""


@dataclass(frozen=True, kw_only=True)
class TargetInfo:
    """What is known of one teacher's targets before the first of them is seen: of a store's column, or of a teacher."""

    name: str
    """The column or the teacher."""
    dim: int
    """D."""
    arrays: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """What the teacher has beside its embeddings, for instance `prototypes` float32 [K, D]."""


OBJECTIVES: dict[str, Callable[[float | None, TargetInfo | None], Objective]] = {
    "feature_kl": lambda temperature, _: FeatureKL(0.2 if temperature is None else temperature),
    "cosine": lambda temperature, _: _without(temperature, Cosine()),
    "prototype_ce": lambda temperature, about: PrototypeCE(
        torch.from_numpy(_array(about, "prototypes", "prototype_ce")), 0.1 if temperature is None else temperature
    ),
}


def make_objective(name: str, temperature: float | None = None, *, about: TargetInfo | None = None) -> Objective:
    """The objective of that name.

    Args:
        name: Of OBJECTIVES.
        temperature: None takes the paper's.
        about: The targets that it is for; not needed by an objective that knows nothing but its two vectors.

    Raises:
        RequestError: The name is unknown, the temperature is not positive or belongs to no objective of that name, or the
            targets lack what the objective needs.
    """
    if name not in OBJECTIVES:
        raise RequestError(f"objective {name!r} is unknown; there are {', '.join(OBJECTIVES)}{did_you_mean(name, OBJECTIVES)}")
    if temperature is not None and temperature <= 0:
        raise RequestError(f"temperature {temperature}: must be positive")
    return OBJECTIVES[name](temperature, about)


def _without(temperature: float | None, objective: Objective) -> Objective:
    if temperature is not None:
        raise RequestError(f"temperature {temperature}: {type(objective).__name__.lower()} has none")
    return objective


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


__all__ = ["OBJECTIVES", "Cosine", "FeatureKL", "Objective", "PrototypeCE", "TargetInfo", "make_objective"]
