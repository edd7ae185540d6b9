"""MEAL V2's discriminator: the student is to be mistaken for its teacher."""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from fkd_ssl.objectives.objective import Objective, size_of

if TYPE_CHECKING:
    from fkd_ssl.targets import TeacherInfo


class Discriminator(Objective):
    """Cross-entropy of a small network that tells teachers' class probabilities from a student's, which the student raises.

    MEAL V2 (Shen and Savvides, arXiv 2009.08453, section 3; MEAL, arXiv 1812.02425, eq. 6): layers of K/8, K/64 (of few classes
    16) and one number, with ReLU between. It is trained along with the student, whose gradient is turned round, so that both
    play the game of the paper; in its code both lower the same loss. It sees probabilities, since stores have no logits.

    Args:
        dim: K.
    """

    kind = "distribution"

    def __init__(self, dim: int) -> None:
        super().__init__()
        wide, narrow = max(16, dim // 8), max(16, dim // 64)
        with torch.random.fork_rng(devices=[]):  # the student's own initial weights are the same without it
            self.layers = nn.Sequential(
                nn.Linear(dim, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 1)
            )  # fmt: skip

    @classmethod
    def for_targets(cls, about: "TeacherInfo | None", **settings: Any) -> Self:
        """The objective for targets of their number of classes."""
        return cls(size_of(about, "discriminator"), **settings)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a scalar, of student logits [B, K] and target probabilities [B, K]."""
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
        with torch.autocast(student.device.type, enabled=False):
            of_student = _turned(torch.softmax(student.to(weight.dtype), dim=1))
            judged = self.layers(torch.cat([target.to(weight.dtype), of_student])).squeeze(1)
            teachers = torch.arange(len(judged), device=judged.device) < len(target)
            return nn.functional.binary_cross_entropy_with_logits(judged, teachers.to(judged.dtype))

    def floor(self, target: Tensor) -> Tensor:
        """Zero: of a discriminator that is never mistaken."""
        return target.new_zeros(())


class _Turned(torch.autograd.Function):
    """Itself, with its gradient's sign changed (Ganin et al., JMLR 2016, arXiv 1505.07818, section 4.2)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def _turned(values: Tensor) -> Tensor:
    return _Turned.apply(values)  # type: ignore[no-any-return]
