"""MEAL V2's discriminator, which the student learns to fool."""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from fkd_ssl.objectives.objective import Objective, size_of

if TYPE_CHECKING:
    from fkd_ssl.targets import TeacherInfo


class Discriminator(Objective):
    """Cross-entropy of a small network that tells the teacher's probabilities from the student's; the student maximises it.

    MEAL V2 (Shen and Savvides, arXiv 2009.08453, section 3; MEAL, arXiv 1812.02425, eq. 6): layers of K/8, K/64 (each at least
    16) and 1 output, with ReLU between them. The network is trained with the student. The input is probabilities, since
    stores have no logits (the same in the authors' FKD_train.py). It differs from their code in three points:

    - The student's gradient is reversed, as in the adversarial game of the paper; in the code both minimise the same loss.
    - One output is the logit. Theirs has two behind another ReLU, which has no gradient where it is 0.
    - With 1,000 classes the second layer has 16 units; theirs has 15, since it divides by 8 twice.

    Args:
        dim: K.
    """

    kind = "distribution"

    def __init__(self, dim: int) -> None:
        super().__init__()
        wide, narrow = max(16, dim // 8), max(16, dim // 64)
        with torch.random.fork_rng(devices=[]):  # does not change the initial weights of the student
            self.layers = nn.Sequential(
                nn.Linear(dim, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 1)
            )

    @classmethod
    def for_targets(cls, teacher: "TeacherInfo | None", **settings: Any) -> Self:
        """Makes the objective for the number of classes of the targets."""
        return cls(size_of(teacher, "discriminator"), **settings)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a scalar, of student logits [B, K] and target probabilities [B, K]."""
        weight: Tensor = self.layers[0].weight  # type: ignore[assignment]
        with torch.autocast(student.device.type, enabled=False):
            of_student = _reverse_gradient(torch.softmax(student.to(weight.dtype), dim=1))
            judged = self.layers(torch.cat([target.to(weight.dtype), of_student])).squeeze(1)
            teachers = torch.arange(len(judged), device=judged.device) < len(target)
            return nn.functional.binary_cross_entropy_with_logits(judged, teachers.to(judged.dtype))

    def floor(self, target: Tensor) -> Tensor:
        """Zero, the loss of a perfect discriminator."""
        return target.new_zeros(())


class _ReverseGradient(torch.autograd.Function):
    """The identity with a reversed gradient (Ganin et al., JMLR 2016, arXiv 1505.07818, section 4.2)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def _reverse_gradient(values: Tensor) -> Tensor:
    return _ReverseGradient.apply(values)  # type: ignore[no-any-return]
