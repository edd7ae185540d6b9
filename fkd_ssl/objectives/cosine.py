"""Squared distance between normalised features."""

from torch import Tensor

from fkd_ssl.objectives.objective import Objective


class Cosine(Objective):
    """2 - 2 cos(student, target), the squared Euclidean distance of L2-normalised vectors.

    SimReg (Navaneet et al., BMVC 2021, arXiv 2201.05131, eq. 1).
    """

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean distance, a scalar in 0 to 4, of L2-normalised student [..., D] and target [..., D]."""
        return 2 - 2 * (student * target).sum(dim=-1).mean()

    def floor(self, target: Tensor) -> Tensor:
        """The minimum of `forward` for these targets, which is 0."""
        return target.new_zeros(())
