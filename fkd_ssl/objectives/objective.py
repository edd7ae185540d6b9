"""The base class of losses."""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from fkd_ssl.errors import RequestError

if TYPE_CHECKING:
    from fkd_ssl.targets import TeacherInfo


class Objective(nn.Module):
    """Base class of losses between student outputs [B, D] and targets [B, D]: L2-normalised, or logits and class probabilities.

    For grids of tokens, both are L2-normalised [B, h, w, D]. For targets of another shape, the student has as many outputs as a
    target has elements.

    The settings of an objective are the keyword-only arguments of its constructor, each a number with a default. Users set them
    with `--objective "name(setting=value)"`; no other module needs to know their names.

    Attributes:
        kind: Kind of the targets, one of fkd_ssl.targets.KINDS.
    """

    kind: str = "embedding"

    @classmethod
    def for_targets(cls, teacher: "TeacherInfo | None", **settings: Any) -> Self:
        """Makes the objective for targets described by `teacher`. Override it if the constructor needs more than the settings.

        Raises:
            RequestError: The targets lack what the objective needs, or a setting is invalid.
        """
        return cls(**settings)

    @abstractmethod
    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of student [B, D] and target [B, D]. The same arguments give the same loss until `remember`."""

    def floor(self, target: Tensor) -> Tensor:
        """The minimum of `forward` for these targets [B, D]; for a cross-entropy, their mean entropy in nats."""
        return self(target, target)  # type: ignore[no-any-return]

    def remember(self, target: Tensor) -> None:
        """Receives the targets [B, D] of a finished step; does nothing by default."""


def check_positive(objective: str, **settings: float) -> None:
    """Raises RequestError if a setting is not a positive, finite number."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise RequestError(f"objective {objective}: {name} {value!r}: must be positive and finite")


def size_of(teacher: "TeacherInfo | None", objective: str) -> int:
    """The number of elements of a target; raises RequestError if `teacher` is None."""
    if teacher is None:
        raise RequestError(
            f"objective {objective}: it needs the size of the targets; pass teacher=TeacherInfo(name=..., spec=TargetSpec(...))"
        )
    return teacher.spec.size


def scores(rows: Tensor, columns: Tensor) -> Tensor:
    """Dot products [B, K] of rows [B, D] and columns [K, D], in at least fp32: with a small T, bf16 is off by nats."""
    exact = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        return rows.to(exact) @ columns.to(exact).T


def cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    """The mean cross-entropy in nats between softmax(target) and softmax(student), logits [B, K]; a scalar."""
    return -(torch.softmax(target, dim=1) * torch.log_softmax(student, dim=1)).sum(dim=1).mean()
