"""What training asks of a loss."""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from fkd_ssl.errors import RequestError

if TYPE_CHECKING:
    from fkd_ssl.targets import TeacherInfo


class Objective(nn.Module):
    """A loss between a student's outputs [B, D] and their targets: L2-normalised [B, D], or logits and class probabilities.

    An objective for targets of another shape is given as many outputs as a target has numbers.

    Its settings are the keyword-only arguments of its constructor, each of them a number with a default:
    `--objective "name(setting=value)"` sets them, and nothing outside its module knows their names.

    Attributes:
        kind: Of the targets, one of fkd_ssl.targets.KINDS.
    """

    kind: str = "embedding"

    @classmethod
    def for_targets(cls, about: "TeacherInfo | None", **settings: Any) -> Self:
        """The objective for targets of which `about` is known; what needs more of them than its settings overrides this.

        Raises:
            RequestError: The targets lack what it needs, or a setting has a wrong value.
        """
        return cls(**settings)

    @abstractmethod
    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of student [B, D] and target [B, D]; the same for the same arguments until `remember`."""

    def floor(self, target: Tensor) -> Tensor:
        """The least value that `forward` can take for these targets [B, D]: a cross-entropy's is their mean entropy in nats."""
        return self(target, target)  # type: ignore[no-any-return]

    def remember(self, target: Tensor) -> None:
        """Takes the targets [B, D] of a step that is done; most objectives need none."""


def check_positive(objective: str, **settings: float) -> None:
    """Raises RequestError if a setting is not a positive, finite number."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise RequestError(f"objective {objective}: {name} {value!r}: must be positive and finite")


def size_of(about: "TeacherInfo | None", objective: str) -> int:
    """Numbers in one target; raises RequestError if nothing is known of them."""
    if about is None:
        raise RequestError(
            f"objective {objective}: the size of the targets is needed; pass about=TeacherInfo(name=..., spec=TargetSpec(...))"
        )
    return about.spec.size


def scores(rows: Tensor, columns: Tensor) -> Tensor:
    """Products [B, K] of rows [B, D] and columns [K, D], in fp32 at least: over a small T bf16 is off by nats."""
    exact = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        return rows.to(exact) @ columns.to(exact).T


def cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of the cross-entropy in nats of softmax(target) and softmax(student), both [B, K]; a scalar."""
    return -(torch.softmax(target, dim=1) * torch.log_softmax(student, dim=1)).sum(dim=1).mean()
