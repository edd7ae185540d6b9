"""Cross-entropy of class probabilities: the loss of FKD; with a temperature, that of Hinton et al."""

import torch
from torch import Tensor

from fkd_ssl.objectives.objective import Objective, check_positive


class SoftCE(Objective):
    """Cross-entropy between the teacher's probabilities at a temperature and softmax(student / T), over K classes.

    FKD (Shen and Xing, ECCV 2022, arXiv 2112.01528, eq. 2) uses T = 1. With another T (Hinton et al., arXiv 1503.02531, section
    2) the stored probabilities p become p^(1/T) / sum p^(1/T), which equals the softmax of the teacher's logits at that T up to
    the loss of the codec. The loss is not multiplied by T^2.

    Args:
        temperature: Temperature of the student.
        teacher_temperature: Temperature of the teacher; by default that of the student.
    """

    kind = "distribution"

    def __init__(self, *, temperature: float = 1.0, teacher_temperature: float | None = None) -> None:
        super().__init__()
        self.temperature = temperature
        self.teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
        check_positive("soft_ce", temperature=temperature, teacher_temperature=self.teacher_temperature)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a scalar, of student logits [B, K] and target probabilities [B, K]."""
        with torch.autocast(student.device.type, enabled=False):
            exact = student if student.dtype == torch.float64 else student.float()
            loss: Tensor = -(self._target(target) * torch.log_softmax(exact / self.temperature, dim=1)).sum(dim=1).mean()
        return loss

    def floor(self, target: Tensor) -> Tensor:
        """The mean entropy in nats of the targets."""
        p = self._target(target)
        entropy: Tensor = -torch.special.xlogy(p, p).sum(dim=1).mean()
        return entropy

    def _target(self, target: Tensor) -> Tensor:
        target = target if target.dtype == torch.float64 else target.float()
        if self.teacher_temperature == 1:
            return target
        return (target.log() / self.teacher_temperature).softmax(dim=1)  # log 0 is -inf, whose softmax is 0
