"""What training asks of a loss."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from fkd_ssl.kinds import Kind


class Objective(nn.Module):
    """A loss between a student's outputs and their targets, both [B, D]: L2-normalised, or logits and class probabilities.

    Attributes:
        kind: Of the targets.
    """

    kind: Kind = "embedding"

    @abstractmethod
    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of student [B, D] and target [B, D]; the same for the same arguments until `remember`."""

    def floor(self, target: Tensor) -> Tensor:
        """The least value that `forward` can take for these targets [B, D]: a cross-entropy's is their mean entropy in nats."""
        return self(target, target)  # type: ignore[no-any-return]

    def remember(self, target: Tensor) -> None:
        """Takes the targets [B, D] of a step that is done; most objectives need none."""


def scores(rows: Tensor, columns: Tensor) -> Tensor:
    """Products [B, K] of rows [B, D] and columns [K, D], in fp32 at least: over a small T bf16 is off by nats."""
    exact = torch.promote_types(torch.promote_types(rows.dtype, columns.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        return rows.to(exact) @ columns.to(exact).T


def cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of the cross-entropy in nats of softmax(target) and softmax(student), both [B, K]; a scalar."""
    return -(torch.softmax(target, dim=1) * torch.log_softmax(student, dim=1)).sum(dim=1).mean()
