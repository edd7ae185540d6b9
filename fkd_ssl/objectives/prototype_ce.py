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

    SwAV (Caron et al., NeurIPS 2020, arXiv 2006.09882, eq. 2) with T = 0.1 and its softmax in the place of its Sinkhorn
    assignment on the teacher's side too, since an assignment in equal parts belongs to a batch and not to a stored target.

    The rows of P are brought to unit length here. SwAV's code does so at the beginning of every step, so its scores are
    cosines; its checkpoints are saved after a step of the optimiser, so their rows are of nearly, not exactly, that length.

    Args:
        prototypes: P, floats [K, D], frozen.
        temperature: T.

    Raises:
        RequestError: `prototypes` is not a matrix, or has a row of zeros, or `temperature` is not positive.
    """

    prototypes: Tensor

    def __init__(self, prototypes: Tensor, *, temperature: float = 0.1) -> None:
        super().__init__()
        check_positive("prototype_ce", temperature=temperature)
        if prototypes.ndim != 2 or not prototypes.isfinite().all() or not prototypes.norm(dim=1).min() > 0:
            raise RequestError(f"prototypes {list(prototypes.shape)}: expected a finite matrix [K, D] without a row of zeros")
        self.temperature = temperature
        # the teacher's, not the student's: no part of its checkpoints
        self.register_buffer("prototypes", F.normalize(prototypes, dim=1), persistent=False)

    @classmethod
    def for_targets(cls, about: "TeacherInfo | None", **settings: Any) -> Self:
        """The objective with the prototypes of the targets' teacher, its array `prototypes` float32 [K, D].

        Raises:
            RequestError: The teacher has none, or they are not for such targets.
        """
        if about is None or "prototypes" not in about.arrays:
            where = "the targets" if about is None else f"the targets of {about.name!r}"
            raise RequestError(f"objective prototype_ce: {where} have no prototypes; use a SwAV teacher, or another objective")
        found = about.arrays["prototypes"].astype(np.float32, copy=False)
        if found.ndim != 2 or found.shape[1:] != about.spec.shape:
            raise RequestError(
                f"objective prototype_ce: the prototypes of {about.name!r} are {list(found.shape)}, expected "
                f"[K, {about.spec.size}]"
            )
        return cls(torch.from_numpy(found), **settings)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a scalar, of L2-normalised student [B, D] and target [B, D]."""
        return cross_entropy(self._scores(student), self._scores(target))

    def _scores(self, embedding: Tensor) -> Tensor:
        return scores(embedding, self.prototypes) / self.temperature
