"""Replay on a GPU: the crops of many images at once, with the same bits as on the CPU.

The CPU reads and decodes the images and plans the crops. The GPU crops, halves, resizes and augments them, with the kernels in
`kernels.py`. `replay_digest(device)` shows whether the two make the same pixels on a machine.

Shape letters: n crops, P their side.
"""

import functools
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fkd_ssl.arrays import BoolArray, Int64Array, UInt8Array
from fkd_ssl.crops import records as crop_records
from fkd_ssl.crops.operations import OPERATIONS
from fkd_ssl.crops.records import CROP_DTYPE, FIELDS, Records, well_formed
from fkd_ssl.errors import ImageError, RequestError


@dataclass(frozen=True, kw_only=True)
class PendingCrops:
    """Crops of one image that a device will make.

    Raises:
        ImageError: A box is not inside the image.
    """

    image: UInt8Array
    """uint8 [H, W, 3]."""
    records: Records
    """[m]."""

    def __post_init__(self) -> None:
        crop_records.boxes(self.records, *self.image.shape[:2])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, some: slice) -> "PendingCrops":
        return replace(self, records=self.records[some])


@dataclass(frozen=True, kw_only=True)
class CropPlan:
    """Everything that a device needs to make crops of several images at one size.

    A DataLoader can pin it, and Lightning can move it to a device, like a tensor.
    """

    pixels: int
    """P."""
    sources: Tensor
    """The images' pixels, one image after the other: uint8 [S] with S = 3 x (sum of height x width)."""
    boxes: Tensor
    """First pixel, pixels per row, height and width of each box, in the sources or after its halvings; 1 if it is halved before
    the linear resize; 1 if it is resized to 2 P and halved once more: int64 [n, 6]."""
    flags: Tensor
    """Flags of each record: uint8 [n]."""
    parameters: dict[str, tuple[Tensor, ...]]
    """For each operation that is applied, the parameters of its device implementation: tensors [n, ...]."""
    passes: tuple[Tensor, ...]
    """The argument `boxes` of `kernels.halve` for each pass of halvings: int64 [k, 5]."""
    scratch: int
    """Number of pixels of all halved boxes."""
    largest: int
    """Number of pixels of the largest halved box."""

    def __len__(self) -> int:
        return len(self.flags)

    def to(self, device: str | torch.device, *, non_blocking: bool = True) -> "CropPlan":
        """Returns the plan with its tensors on a device.

        By default, copies from pinned memory do not wait for the GPU. Lightning passes `non_blocking` only to tensors.
        """
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self, device: Any = None) -> "CropPlan":
        """Returns the plan with its tensors in pinned memory."""
        return self._each(lambda tensor: tensor.pin_memory(device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> "CropPlan":
        parameters = {name: tuple(map(function, tensors)) for name, tensors in self.parameters.items()}
        passes = tuple(map(function, self.passes))
        sources, boxes, flags = map(function, (self.sources, self.boxes, self.flags))
        return replace(self, sources=sources, boxes=boxes, flags=flags, passes=passes, parameters=parameters)


def concatenate(crops: Sequence[PendingCrops], out: Tensor | None = None) -> Tensor:
    """Concatenates the pixels of the crops' images, in `out` if given: uint8 [S]."""
    sources = torch.empty(sum(some.image.size for some in crops), dtype=torch.uint8) if out is None else out
    np.concatenate([some.image.reshape(-1) for some in crops], out=sources.numpy())
    return sources


def plan_crops(crops: Sequence[PendingCrops], pixels: int, sources: Tensor) -> CropPlan:
    """Computes what a device needs to make these crops.

    Args:
        crops: The crops of each image.
        pixels: P.
        sources: The result of `concatenate(crops)`. Plans of several sizes can share it.

    Raises:
        ImageError: A record is invalid.
        RequestError: A record's colour coefficients are 32 or more, which no recipe reaches.
    """
    records = np.frombuffer(b"".join([some.records.tobytes() for some in crops]), dtype=CROP_DTYPE)
    if not well_formed(records):
        raise ImageError("invalid crop record: its file is damaged; run fkd-ssl verify")
    counts, (heights, widths) = [len(some) for some in crops], np.array([some.image.shape[:2] for some in crops]).T
    first = np.repeat(np.cumsum(heights * widths) - heights * widths, counts)  # first pixel of each image in the sources
    stride = np.repeat(widths, counts)
    top, left, height, width = (records[name].astype(np.int64) for name in ("top", "left", "height", "width"))
    halvings, doubled = resize_plans(height, width, pixels)
    boxes = np.stack([first + top * stride + left, stride, height, width, halvings > 0, doubled], axis=1)
    passes, scratch, largest = _halvings(boxes, halvings)
    parameters = {}
    for operation in OPERATIONS:
        applied = (records["flags"] & operation.bits) > 0
        if applied.any():
            fields = [records[name].astype(FIELDS[name].dtype.replace("f2", "f8")) for name in operation.fields]
            of_crops = operation.parameters(pixels, applied, records["flags"], *fields)
            parameters[operation.name] = tuple(torch.from_numpy(np.ascontiguousarray(each)) for each in of_crops)
    return CropPlan(
        pixels=pixels,
        sources=sources,
        boxes=torch.from_numpy(boxes),
        flags=torch.from_numpy(records["flags"].copy()),
        parameters=parameters,
        passes=passes,
        scratch=scratch,
        largest=largest,
    )


def _halvings(boxes: Int64Array, halvings: Int64Array) -> tuple[tuple[Tensor, ...], int, int]:
    """Plans the halvings of boxes int64 [n, 6], and updates the boxes in place. Returns `passes`, `scratch` and `largest`."""
    passes, scratch, largest = [], 0, 0
    for level in range(halvings.max(initial=0)):
        some = np.flatnonzero(halvings > level)
        first, stride, height, width = boxes[some, :4].T
        height, width = height // 2, width // 2
        to = scratch + np.cumsum(height * width) - height * width
        passes.append(torch.from_numpy(np.stack([first, stride, to, height, width], axis=1)))
        boxes[some, :4] = np.stack([to, width, height, width], axis=1)
        scratch, largest = int(scratch + (height * width).sum()), max(largest, int((height * width).max()))
    return tuple(passes), scratch, largest


def resize_plans(height: Int64Array, width: Int64Array, pixels: int) -> tuple[Int64Array, BoolArray]:
    """Computes `resize_plan` for many boxes: halvings int64 [n], and bool [n]."""
    doubled = 5 * np.maximum(height, width) > 6 * pixels
    lengths = np.frexp(np.minimum(height, width) // (2 * pixels))[1].astype(np.int64)  # in bits
    return np.where(doubled, np.maximum(lengths - 1, 0), 0), doubled


def check_device(device: torch.device) -> None:
    """Raises RequestError if crops cannot be made on this device."""
    try:
        from fkd_ssl.crops import kernels  # noqa: F401
    except ImportError as error:
        raise RequestError("--device_crops needs Triton, which is not installed: pip install triton") from error
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RequestError(f"--device_crops needs a CUDA GPU, found {device.type}: run without it")
    if device.type == "cuda" and (problem := _problem(device)):
        raise RequestError(f"--device_crops: Triton cannot build its kernels here: {problem}; run without it")


@functools.cache
def _problem(device: torch.device) -> str:
    """Returns why Triton cannot run a kernel, for instance that there is no C compiler; "" if it can."""
    from fkd_ssl.crops import kernels

    pixels = torch.zeros(2 * 2 * 3, dtype=torch.uint8, device=device)
    boxes = torch.tensor([[0, 2, 0, 1, 1]], device=device)
    try:
        with torch.cuda.device(device):
            kernels.halve(pixels, pixels.clone(), boxes, 1)
    except Exception as error:  # of many types
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def replay_plan(plan: CropPlan) -> Tensor:
    """Makes planned crops on the device of the plan.

    Returns:
        uint8 [n, 3, P, P] in channels-last memory, on that device.

    Raises:
        RequestError: Triton is not installed, or the device is not a CUDA GPU.
    """
    device = plan.sources.device
    check_device(device)
    from fkd_ssl.crops import kernels

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on the current device
        views = torch.empty((len(plan), plan.pixels, plan.pixels, 3), dtype=torch.uint8, device=device)
        scratch = torch.empty(3 * plan.scratch, dtype=torch.uint8, device=device)
        for k, boxes in enumerate(plan.passes):
            kernels.halve(scratch if k else plan.sources, scratch, boxes, plan.largest)
        kernels.resize(plan.sources, scratch, views, plan.boxes)
        for operation in OPERATIONS:
            if operation.name in plan.parameters:
                getattr(kernels, operation.name)(views, plan.flags, operation.bits, *plan.parameters[operation.name])
        return views.permute(0, 3, 1, 2)


def replay_on(device: str | torch.device, image: UInt8Array, records: Records, pixels: int) -> UInt8Array:
    """Makes one image's crops on a device, as `replay` does: uint8 [M, 3, P, P]."""
    crops = [PendingCrops(image=image, records=records)]
    views: UInt8Array = replay_plan(plan_crops(crops, pixels, concatenate(crops)).to(device)).cpu().numpy()
    return views
