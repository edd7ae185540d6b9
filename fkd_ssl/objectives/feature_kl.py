"""Cross-entropy of softmaxed features: the loss of S2-BNN, which FKD-SSL uses."""

import math

from torch import Tensor

from fkd_ssl.objectives.objective import Objective, check_positive, cross_entropy

PUBLISHED = 0.2
"""S2-BNN's T, for targets of 128 dimensions."""


class FeatureKL(Objective):
    """Cross-entropy between softmax(target / T) and softmax(student / T) over the D feature dimensions.

    S2-BNN (Shen et al., CVPR 2021, arXiv 2102.08946, eq. 6) with T = 0.2 for D = 128. It has the same gradient as the KL
    divergence; subtract `floor`, the entropy of the targets, to get the KL divergence itself.

    The elements of a vector of unit length shrink with the root of D. At T = 0.2 the softmax of 1,280 pooled features is so
    flat that one output for all images is within 0.01 nats of the minimum. So the default T shrinks with the root of D too.

    Args:
        temperature: T; by default 0.2 up to D = 128, and 0.2 sqrt(128 / D) above.
    """

    def __init__(self, *, temperature: float | None = None) -> None:
        super().__init__()
        if temperature is not None:
            check_positive("feature_kl", temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a scalar, of L2-normalised student [B, D] and target [B, D]."""
        t = self.temperature or PUBLISHED * min(1.0, math.sqrt(128 / target.shape[1]))
        return cross_entropy(student / t, target / t)
