"""Cross-entropy of similarities within the batch: the student keeps who is near whom."""

import torch
from torch import Tensor

from fkd_ssl.errors import RequestError
from fkd_ssl.objectives.objective import Objective, check_positive, cross_entropy, scores


class Relational(Objective):
    """Cross-entropy between softmax over j of t_i.t_j / T and of s_i.s_j / T, j all other crops of the batch.

    CompRess's distributions (Koohpayegani et al., NeurIPS 2020, arXiv 2010.14713, eq. 1 to 3) with T = 0.04, over the batch
    in the place of its memory bank, as in probabilistic knowledge transfer (Passalis and Tefas, arXiv 1803.10837): nothing
    to keep, and the student's side has a gradient too. A crop's likeness to itself is left out, since it is 1 on both sides.

    Of several processes, and where a step's batch is run in parts, each compares its own part.

    Args:
        temperature: T.
    """

    def __init__(self, *, temperature: float = 0.04) -> None:
        super().__init__()
        check_positive("relational", temperature=temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a scalar, of L2-normalised student [B, D] and target [B, D'].

        Raises:
            RequestError: B is 1.
        """
        if len(student) < 2:
            raise RequestError("objective relational: compares the crops of a batch, and there is 1; choose a larger batch")
        return cross_entropy(_others(student) / self.temperature, _others(target) / self.temperature)


def _others(rows: Tensor) -> Tensor:
    """Products [B, B - 1] of each row [B, D] with every other."""
    count = len(rows)
    apart = ~torch.eye(count, dtype=torch.bool, device=rows.device)
    return scores(rows, rows)[apart].view(count, count - 1)
