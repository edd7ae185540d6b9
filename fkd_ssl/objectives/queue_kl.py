"""Cross-entropy of similarities to a queue of targets: SEED's distillation."""

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from fkd_ssl.errors import RequestError
from fkd_ssl.objectives.objective import Objective, check_positive, cross_entropy, scores, size_of

if TYPE_CHECKING:
    from fkd_ssl.targets import TeacherInfo


class QueueKL(Objective):
    """Cross-entropy between softmax([t.t, t Q'] / T_t) and softmax([s.t, s Q'] / T) over a queue Q of the latest targets.

    SEED (Fang et al., ICLR 2021, arXiv 2101.04731, eq. 4 to 7) with T = 0.2, T_t = 1e-4 and K = 65536. The target itself is
    logit 0, as in its code; the queue is filled with the targets of past batches, which come from a store here, so that no
    teacher is run for it. lightly-train's variant has 0.07 for both temperatures.

    The queue starts with random unit vectors, as MoCo's and SEED's do, and is part of a checkpoint. Of several processes
    each holds the targets of all.

    Args:
        dim: D.
        queue: K, targets in the queue.
        temperature: T, the student's.
        teacher_temperature: T_t.

    Raises:
        RequestError: A setting is not positive, or `queue` is not a whole number.
    """

    queue: Tensor
    next: Tensor

    def __init__(self, dim: int, *, queue: int = 65536, temperature: float = 0.2, teacher_temperature: float = 1e-4) -> None:
        super().__init__()
        check_positive("queue_kl", queue=queue, temperature=temperature, teacher_temperature=teacher_temperature)
        if not isinstance(queue, int):
            raise RequestError(f"objective queue_kl: queue {queue}: must be a whole number")
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        noise = torch.randn(queue, dim, generator=torch.Generator().manual_seed(0))  # leaves the student's draw alone
        self.register_buffer("queue", F.normalize(noise, dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @classmethod
    def for_targets(cls, about: "TeacherInfo | None", **settings: Any) -> Self:
        """The objective for targets of their dimension."""
        return cls(size_of(about, "queue_kl"), **settings)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a scalar, of L2-normalised student [B, D] and target [B, D]."""
        of_student = torch.cat([_own(student, target), scores(student, self.queue)], dim=1) / self.temperature
        of_target = torch.cat([_own(target, target), scores(target, self.queue)], dim=1) / self.teacher_temperature
        return cross_entropy(of_student, of_target)

    def floor(self, target: Tensor) -> Tensor:
        """The targets' mean entropy in nats at T_t [B, D]: a bound, which the student's larger T may keep it from reaching."""
        of_target = torch.cat([_own(target, target), scores(target, self.queue)], dim=1) / self.teacher_temperature
        return cross_entropy(of_target, of_target)

    @torch.no_grad()
    def remember(self, target: Tensor) -> None:
        """Puts the targets [B, D] of all processes in the places of the oldest ones."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts = [torch.empty_like(target) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, target.contiguous())
            target = torch.cat(parts)
        size = len(self.queue)
        target = target[-size:]
        places = (self.next + torch.arange(len(target), device=self.queue.device)) % size
        self.queue[places] = target.to(self.queue)
        self.next.add_(len(target)).remainder_(size)


def _own(rows: Tensor, target: Tensor) -> Tensor:
    """Each row's product with its own target: [B, 1]."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    return (rows.to(exact) * target.to(exact)).sum(dim=1, keepdim=True)
