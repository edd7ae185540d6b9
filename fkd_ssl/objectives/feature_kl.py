"""Cross-entropy of softmaxed features: the loss of S2-BNN, which FKD-SSL uses."""

from torch import Tensor

from fkd_ssl.objectives.objective import Objective, check_positive, cross_entropy


class FeatureKL(Objective):
    """Cross-entropy between softmax(target / T) and softmax(student / T) over the D feature dimensions.

    S2-BNN (Shen et al., CVPR 2021, arXiv 2102.08946, eq. 6) with T = 0.2. It has the same gradient as the KL divergence;
    subtract `floor`, the entropy of the targets, to get the KL divergence itself.

    Args:
        temperature: T.
    """

    def __init__(self, *, temperature: float = 0.2) -> None:
        super().__init__()
        check_positive("feature_kl", temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a scalar, of L2-normalised student [B, D] and target [B, D]."""
        return cross_entropy(student / self.temperature, target / self.temperature)
