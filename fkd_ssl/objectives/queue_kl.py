"""Cross-entropy of similarities to a queue of targets: the loss of SEED."""

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
    logit 0, as in SEED's code. The queue has the targets of past batches; if these come from a store, no teacher is run.
    lightly-train's variant uses 0.07 for both temperatures.

    The queue starts with random unit vectors, as in MoCo and SEED, and is saved in checkpoints. With several processes, each
    has the targets of all processes.

    Args:
        dim: D.
        queue: K, number of targets in the queue.
        temperature: T, temperature of the student.
        teacher_temperature: T_t, temperature of the teacher.

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
        noise = torch.randn(queue, dim, generator=torch.Generator().manual_seed(0))  # does not change the global generator
        self.register_buffer("queue", F.normalize(noise, dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @classmethod
    def for_targets(cls, teacher: "TeacherInfo | None", **settings: Any) -> Self:
        """Makes the objective for the dimension of the targets."""
        return cls(size_of(teacher, "queue_kl"), **settings)

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a scalar, of L2-normalised student [B, D] and target [B, D]."""
        of_target = self._similarities(target, target) / self.teacher_temperature
        return cross_entropy(self._similarities(student, target) / self.temperature, of_target)

    def floor(self, target: Tensor) -> Tensor:
        """The mean entropy in nats of the targets at T_t: a lower bound, which may not be attainable if T is larger."""
        of_target = self._similarities(target, target) / self.teacher_temperature
        return cross_entropy(of_target, of_target)

    def _similarities(self, rows: Tensor, target: Tensor) -> Tensor:
        """Returns the dot products of each row with its own target and with those in the queue: [B, 1 + K]."""
        exact = torch.promote_types(rows.dtype, torch.float32)
        own = (rows.to(exact) * target.to(exact)).sum(dim=1, keepdim=True)
        return torch.cat([own, scores(rows, self.queue)], dim=1)

    @torch.no_grad()
    def remember(self, target: Tensor) -> None:
        """Replaces the oldest targets in the queue by the targets [B, D] of all processes."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts = [torch.empty_like(target) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, target.contiguous())
            target = torch.cat(parts)
        size = len(self.queue)
        target = target[-size:]
        places = (self.next + torch.arange(len(target), device=self.queue.device)) % size
        self.queue[places] = target.to(self.queue)
        self.next.add_(len(target)).remainder_(size)
