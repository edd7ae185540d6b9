"""Weighted sums of objectives."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fkd_ssl.errors import RequestError
from fkd_ssl.objectives.objective import Objective


class Weighted(Objective):
    """The weighted sum w_1 L_1 + w_2 L_2 + ...

    Args:
        parts: The objectives L.
        weights: Their positive weights w. They are not normalised, so the learning rate depends on their sum.

    Raises:
        RequestError: The objectives are for different kinds of targets.
    """

    def __init__(self, parts: Sequence[Objective], weights: Sequence[float]) -> None:
        super().__init__()
        kinds = sorted({part.kind for part in parts})
        if len(kinds) != 1:
            raise RequestError(f"objectives for {' and '.join(kinds)} targets cannot be summed; choose those of one kind")
        self.kind = kinds[0]
        self.parts = nn.ModuleList(parts)
        self.weights = list(weights)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The sum, a scalar, of the losses of student [B, D] and target [B, D]."""
        return torch.stack([w * part(student, target) for w, part in zip(self.weights, self.parts, strict=True)]).sum()

    def floor(self, target: Tensor) -> Tensor:
        """The sum of the parts' floors for these targets [B, D]."""
        floors = [w * part.floor(target) for w, part in zip(self.weights, self.parts, strict=True)]  # type: ignore[operator]
        return torch.stack(floors).sum()

    def remember(self, target: Tensor) -> None:
        """Passes the targets [B, D] to every part."""
        for part in self.parts:
            part.remember(target)  # type: ignore[operator]
