"""Objectives for grids of tokens, student and target [B, h, w, D]."""

import torch
from torch import Tensor

from fkd_ssl.objectives.cosine import Cosine
from fkd_ssl.objectives.objective import Objective


class TokenCosine(Cosine):
    """2 - 2 cos(student, target), the squared distance of L2-normalised tokens, averaged over all tokens of the batch.

    The loss of SimReg (arXiv 2201.05131, eq. 1) at each position of the grid.
    """

    kind = "tokens"


class TokenRelations(Objective):
    """Mean squared difference of the student's and the target's cosines between all pairs of positions of a crop.

    The pair-wise distillation of Liu et al. (CVPR 2019, arXiv 1903.04197); the Gram anchoring of DINOv3 (arXiv 2508.10104) is
    the sum instead of the mean. A rotation of the features does not change it: the student only learns which positions are
    alike. Crops are not compared with each other, so the value does not depend on `accumulate` or the number of processes.
    """

    kind = "tokens"

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean, a scalar in 0 to 4, for L2-normalised student [B, h, w, D] and target [B, h, w, D']."""
        return (_cosines(student) - _cosines(target)).square().mean()

    def floor(self, target: Tensor) -> Tensor:
        """The minimum of `forward` for these targets, which is 0."""
        return target.new_zeros(())


def _cosines(tokens: Tensor) -> Tensor:
    """Dot products [B, h w, h w] of the tokens [B, h, w, D] of each crop, in at least fp32."""
    rows = tokens.flatten(1, 2).to(torch.promote_types(tokens.dtype, torch.float32))
    with torch.autocast(tokens.device.type, enabled=False):
        return rows @ rows.mT
