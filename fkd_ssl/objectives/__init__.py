"""Objectives: the loss between a student's output and a target, both [B, D] and L2-normalised."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.objectives.cosine import Cosine
from fkd_ssl.objectives.feature_kl import FeatureKL


class Objective(Protocol):
    """What training asks of a loss."""

    def __call__(self, student: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of student [B, D] and target [B, D]."""

    def floor(self, target: Tensor) -> Tensor:
        """The least loss that these targets allow, a scalar."""


OBJECTIVES: dict[str, Callable[[float | None], Objective]] = {
    "feature_kl": lambda temperature: FeatureKL(0.2 if temperature is None else temperature),
    "cosine": lambda temperature: _without(temperature, Cosine()),
}


def make_objective(name: str, temperature: float | None = None) -> Objective:
    """The objective of that name; `temperature` None takes the paper's.

    Raises:
        RequestError: The name is unknown, or the temperature is not positive or belongs to no objective of that name.
    """
    if name not in OBJECTIVES:
        raise RequestError(f"objective {name!r} is unknown; there are {', '.join(OBJECTIVES)}{did_you_mean(name, OBJECTIVES)}")
    if temperature is not None and temperature <= 0:
        raise RequestError(f"temperature {temperature}: must be positive")
    return OBJECTIVES[name](temperature)


def _without(temperature: float | None, objective: Objective) -> Objective:
    if temperature is not None:
        raise RequestError(f"temperature {temperature}: {type(objective).__name__.lower()} has none")
    return objective


__all__ = ["OBJECTIVES", "Cosine", "FeatureKL", "Objective", "make_objective"]
