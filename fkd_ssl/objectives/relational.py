"""Cross-entropy of similarities within the batch."""

from torch import Tensor

from fkd_ssl.errors import RequestError
from fkd_ssl.objectives.objective import Objective, check_positive, cross_entropy, scores


class Relational(Objective):
    """Cross-entropy between the softmax over j of t_i.t_j / T and that of s_i.s_j / T; j are all other crops of the batch.

    The distributions of CompRess (Koohpayegani et al., NeurIPS 2020, arXiv 2010.14713, eq. 1 to 3) with T = 0.04, over the
    batch instead of a memory bank, as in probabilistic knowledge transfer (Passalis and Tefas, arXiv 1803.10837). So nothing is
    kept, and both factors of a student's similarity have gradients. The similarity of a crop to itself is left out: it is 1.

    With several processes or `accumulate`, each part of the batch is compared within itself.

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
            raise RequestError("objective relational: needs at least 2 crops in a batch, found 1; choose a larger batch")
        return cross_entropy(_others(student) / self.temperature, _others(target) / self.temperature)


def _others(rows: Tensor) -> Tensor:
    """Dot products [B, B - 1] of each row [B, D] with every other row."""
    count = len(rows)
    # without the last element, every (B + 1)-th is on the diagonal; a mask would wait for a GPU to count its elements
    return scores(rows, rows).flatten()[:-1].view(count - 1, count + 1)[:, 1:].reshape(count, count - 1)
