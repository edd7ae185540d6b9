"""Cross-entropy of prototype assignments: SwAV's prediction, from stored embeddings and frozen prototypes."""

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fkd_ssl.errors import RequestError
from fkd_ssl.objectives.objective import Objective, check_positive, cross_entropy, scores

if TYPE_CHECKING:
    from fkd_ssl.targets import TeacherInfo


class PrototypeCE(Objective):
    """Cross-entropy between softmax(target P' / T) and softmax(student P' / T) over K prototypes P.

    SwAV (Caron et al., NeurIPS 2020, arXiv 2006.09882, eq. 2) with T = 0.1. The teacher's side also uses the softmax, not the
    Sinkhorn assignment, since a balanced assignment depends on the batch and cannot be stored per target.

    The rows of P are normalised to unit length. SwAV's code does so at the start of every step, so that scores are cosines, but
    saves checkpoints after an optimiser step, so that their rows have only approximately unit length.

    Args:
        prototypes: P, floats [K, D], frozen.
        temperature: T.

    Raises:
        RequestError: `prototypes` is not a matrix or has a row of zeros, or `temperature` is not positive.
    """

    prototypes: Tensor

    def __init__(self, prototypes: Tensor, *, temperature: float = 0.1) -> None:
        super().__init__()
        check_positive("prototype_ce", temperature=temperature)
        if prototypes.ndim != 2 or not prototypes.isfinite().all() or not prototypes.norm(dim=1).min() > 0:
            raise RequestError(f"prototypes {list(prototypes.shape)}: expected a finite matrix [K, D] without a row of zeros")
        self.temperature = temperature
        # they belong to the teacher, so the student's checkpoints do not have them
        self.register_buffer("prototypes", F.normalize(prototypes, dim=1), persistent=False)

    @classmethod
    def for_targets(cls, teacher: "TeacherInfo | None", **settings: Any) -> Self:
        """Makes the objective with the teacher's array `prototypes` float32 [K, D].

        Raises:
            RequestError: The teacher has no prototypes, or they do not fit the targets.
        """
        if teacher is None or "prototypes" not in teacher.arrays:
            where = "the targets" if teacher is None else f"the targets of {teacher.name!r}"
            raise RequestError(f"objective prototype_ce: {where} have no prototypes; use a SwAV teacher, or another objective")
        found = teacher.arrays["prototypes"].astype(np.float32, copy=False)
        if found.ndim != 2 or found.shape[1:] != teacher.spec.shape:
            raise RequestError(
                f"objective prototype_ce: the prototypes of {teacher.name!r} are {list(found.shape)}, expected "
                f"[K, {teacher.spec.size}]"
            )
        return cls(torch.from_numpy(found), **settings)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a scalar, of L2-normalised student [B, D] and target [B, D]."""
        return cross_entropy(self._scores(student), self._scores(target))

    def _scores(self, embedding: Tensor) -> Tensor:
        return scores(embedding, self.prototypes) / self.temperature
