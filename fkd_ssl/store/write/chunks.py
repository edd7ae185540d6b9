"""A chunk of crops: joined from the crops of several images, run through a teacher, and checked."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fkd_ssl.arrays import Float32Array
from fkd_ssl.crops.device import CropPlan, PendingCrops, concatenate, plan_crops, replay_plan
from fkd_ssl.errors import FkdError
from fkd_ssl.store.write.rows import Teacher, Views
from fkd_ssl.targets.sharing import embed_all


def device_of(teacher: Teacher) -> torch.device:
    """Returns the device of a teacher; the CPU if it has no attribute `device`."""
    device: torch.device = getattr(teacher, "device", torch.device("cpu"))
    return device


def join(parts: Sequence[Views], pixels: int, *, pinned: bool) -> Tensor | CropPlan:
    """Joins the crops of several images: uint8 [n, 3, P, P] with P = `pixels`, or a plan of pending crops."""
    pending = [part for part in parts if isinstance(part, PendingCrops)]
    if pending:
        size = sum(part.image.size for part in pending)
        plan = plan_crops(pending, pixels, concatenate(pending, torch.empty(size, dtype=torch.uint8, pin_memory=pinned)))
        return plan.pin_memory() if pinned else plan
    made = [part for part in parts if not isinstance(part, PendingCrops)]
    if len(made) == 1 and not pinned:
        return torch.from_numpy(made[0]).permute(0, 3, 1, 2)
    chunk = torch.empty(sum(map(len, made)), pixels, pixels, 3, dtype=torch.uint8, pin_memory=pinned)
    np.concatenate(made, out=chunk.numpy())
    return chunk.permute(0, 3, 1, 2)


def forward(teachers: Sequence[Teacher], chunk: Tensor | CropPlan, chunk_size: int) -> list[Tensor]:
    """Returns each teacher's targets of at most `chunk_size` crops uint8 [n, 3, P, P], padded to exactly `chunk_size`."""
    crops = replay_plan(chunk) if isinstance(chunk, CropPlan) else chunk
    missing = chunk_size - len(crops)
    padded = torch.cat([crops, crops.new_zeros(missing, *crops.shape[1:])]) if missing else crops
    found = embed_all([teacher.embed for teacher in teachers], padded.contiguous(memory_format=torch.channels_last))
    return [targets[: len(crops)].float() for targets in found]


def checked(teacher: Teacher, targets: Tensor, count: int) -> Float32Array:
    """Returns a copy of the targets of `count` crops. Raises FkdError if they are not finite or of another shape."""
    result: Float32Array = targets.numpy().copy()  # the pinned memory is reused
    expected = (count, *teacher.info.spec.shape)
    if result.shape != expected or not np.isfinite(result).all():
        raise FkdError(
            f"teacher {teacher.info.name}: gave targets {list(result.shape)}, expected finite {list(expected)}"
            f"{f': {teacher.info.if_not_finite}' if result.shape == expected else ''}"
        )
    return result


class Launched:
    """A chunk that a GPU works on, while the CPU goes on.

    Args:
        teachers: Teachers on the same GPU.
        chunk: n crops in pinned memory. They are copied on a stream of their own.
        chunk_size: Number of crops per forward pass.

    Attributes:
        targets: Each teacher's float32 [n, *shape] in pinned memory, which is valid after `wait`.
    """

    _copies: ClassVar[dict[torch.device, Any]] = {}

    def __init__(self, teachers: Sequence[Teacher], chunk: Tensor | CropPlan, chunk_size: int) -> None:
        self._device = device = device_of(teachers[0])
        with torch.cuda.device(device):
            copies = self._copies.setdefault(device, torch.cuda.Stream())  # type: ignore[no-untyped-call]
            self._marks: list[Any] = [
                torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
                for _ in range(4)
            ]
            with torch.cuda.stream(copies):
                self._marks[0].record()
                self._chunk = chunk.to(device, non_blocking=True)  # kept, so that no later copy uses its memory
                self._marks[1].record()
            torch.cuda.current_stream().wait_event(self._marks[1])
            self._marks[2].record()
            self.targets = [targets.to("cpu", non_blocking=True) for targets in forward(teachers, self._chunk, chunk_size)]
            self._marks[3].record()

    def wait(self, stages: Any) -> None:
        """Waits for the GPU, and adds the seconds of the copy and of the forward pass to the stages."""
        copied, copied_at, began, ended = self._marks
        with torch.cuda.device(self._device):  # the writing thread would else begin to use the first GPU
            ended.synchronize()
        stages.transfer += copied.elapsed_time(copied_at) / 1000
        stages.forward += began.elapsed_time(ended) / 1000
