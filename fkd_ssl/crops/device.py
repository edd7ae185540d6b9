"""Replay on a device: the crops of many images at once, with the same bits as on the CPU.

The CPU reads and decodes the images and plans the crops. The device cuts, halves, resizes and augments them. OpenCV processes
uint8 in integers (linear resize with 11-bit weights, colour with 10 bits, blur with 8), and the same integer arithmetic is
written here in torch. `probe_digest(device)` shows whether the two agree on a machine.

Shape letters: n crops, m of them at a time, P their side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fkd_ssl.crops import blur, colour
from fkd_ssl.crops.operations import OPERATIONS
from fkd_ssl.crops.records import FIELDS, Records, boxes, well_formed
from fkd_ssl.errors import ImageError, RequestError
from fkd_ssl.images import UInt8Array

_MAX_COEFFICIENT = 32.0  # OpenCV leaves its integers there
ELEMENTS = 1 << 23  # of the largest temporary array, int64: crops and rows are worked on so many at a time that it fits


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
        boxes(self.records, *self.image.shape[:2])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, some: slice) -> "PendingCrops":
        return replace(self, records=self.records[some])


@dataclass(frozen=True, kw_only=True)
class CropPlan:
    """Crops of several images at one size, with all numbers that a device needs to make them.

    A DataLoader pins it and Lightning moves it to a device as they do a tensor.
    """

    pixels: int
    """P."""
    sources: Tensor
    """The images' pixels, one image after the other: uint8 [S] with S = 3 x (sum of height x width)."""
    boxes: Tensor
    """First pixel, pixels per row of its image, and height and width after the halvings of each crop: int64 [n, 4]."""
    parameters: dict[str, tuple[Tensor, ...]]
    """By name of the operation, what its device implementation needs of each crop: tensors [n, ...]."""
    halvings: npt.NDArray[np.int64]
    """How often each box is halved before the linear resize, int64 [n]; always on the CPU, like the next two."""
    doubled: npt.NDArray[np.bool_]
    """Whether it is resized to 2 P and halved once more, bool [n]."""
    flags: npt.NDArray[np.uint8]
    """Flags of each record, uint8 [n]."""

    def __len__(self) -> int:
        return len(self.flags)

    def to(self, device: str | torch.device, **options: Any) -> "CropPlan":
        """The plan with its tensors on a device; `options` are those of `Tensor.to`."""
        return self._each(lambda tensor: tensor.to(device, **options))

    def pin_memory(self, device: Any = None) -> "CropPlan":
        """The plan with its tensors in pinned memory."""
        return self._each(lambda tensor: tensor.pin_memory(device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> "CropPlan":
        parameters = {name: tuple(map(function, tensors)) for name, tensors in self.parameters.items()}
        return replace(self, sources=function(self.sources), boxes=function(self.boxes), parameters=parameters)


def concatenate(crops: Sequence[PendingCrops], out: Tensor | None = None) -> Tensor:
    """The pixels of the crops' images, one image after the other: uint8 [S]; `out` is used if given."""
    sources = torch.empty(sum(some.image.size for some in crops), dtype=torch.uint8) if out is None else out
    np.concatenate([some.image.reshape(-1) for some in crops], out=sources.numpy())
    return sources


def plan_crops(crops: Sequence[PendingCrops], pixels: int, sources: Tensor) -> CropPlan:
    """Computes what a device needs to make these crops.

    Args:
        crops: Of each image.
        pixels: P.
        sources: What `concatenate` gives for them. Plans of several sizes can share it.

    Raises:
        ImageError: A record is invalid.
        RequestError: A record's colour coefficients are 32 or more, which no recipe reaches.
    """
    records = np.concatenate([some.records for some in crops])
    if not well_formed(records):
        raise ImageError("invalid crop record: its file is damaged; run fkd-ssl verify")
    counts, (heights, widths) = [len(some) for some in crops], np.array([some.image.shape[:2] for some in crops]).T
    first = np.repeat(np.cumsum(heights * widths) - heights * widths, counts)  # pixel of the image in the sources
    stride = np.repeat(widths, counts)
    top, left, height, width = (records[name].astype(np.int64) for name in ("top", "left", "height", "width"))
    halvings, doubled = resize_plans(height, width, pixels)
    parameters = {}
    for operation in OPERATIONS:
        applied = (records["flags"] & operation.bits) > 0
        if applied.any():
            fields = [records[name].astype(FIELDS[name].dtype.replace("f2", "f8")) for name in operation.fields]
            of_crops = DEVICE_OPERATIONS[operation.name].parameters(pixels, applied, records["flags"], *fields)
            parameters[operation.name] = tuple(map(torch.from_numpy, of_crops))
    return CropPlan(
        pixels=pixels,
        sources=sources,
        boxes=torch.from_numpy(np.stack([first + top * stride + left, stride, height >> halvings, width >> halvings], axis=1)),
        parameters=parameters,
        halvings=halvings,
        doubled=doubled,
        flags=records["flags"].copy(),
    )


def resize_plans(
    height: npt.NDArray[np.int64], width: npt.NDArray[np.int64], pixels: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """`resize_plan` of many boxes: halvings int64 [n], and bool [n]."""
    doubled = 5 * np.maximum(height, width) > 6 * pixels
    lengths = np.frexp(np.minimum(height, width) // (2 * pixels))[1].astype(np.int64)  # in bits
    return np.where(doubled, np.maximum(lengths - 1, 0), 0), doubled


def replay_plan(plan: CropPlan) -> Tensor:
    """Makes planned crops on the device where the plan is.

    Returns:
        uint8 [n, 3, P, P] in channels-last memory, on that device.
    """
    pixels, device = plan.pixels, plan.sources.device
    views = torch.empty((len(plan), pixels, pixels, 3), dtype=torch.uint8, device=device)
    for level, doubled in np.unique(np.stack([plan.halvings, plan.doubled], axis=1), axis=0).tolist():
        finer = 1 + doubled
        indices = torch.from_numpy(np.flatnonzero((plan.halvings == level) & (plan.doubled == doubled))).to(device)
        for some in torch.split(indices, max(1, ELEMENTS // (2 * finer * pixels << level) ** 2)):
            rows = max(1, ELEMENTS // (len(some) * pixels * (2 * finer << level) ** 2))
            for top in range(0, pixels, rows):
                end = min(top + rows, pixels)
                band = slice(finer * top, finer * end)
                resized = _resized(plan.sources.view(-1, 3), plan.boxes[some], level, finer * pixels, band)
                views[some, top:end] = resized if finer == 1 else _halved(resized.int()).to(torch.uint8)
    for operation in OPERATIONS:
        indices = torch.from_numpy(np.flatnonzero(plan.flags & operation.bits)).to(device)
        for some in torch.split(indices, max(1, ELEMENTS // (3 * pixels * pixels))) if len(indices) else ():
            parameters = (of_crops[some] for of_crops in plan.parameters[operation.name])
            views[some] = DEVICE_OPERATIONS[operation.name].apply(views[some], *parameters)
    return views.permute(0, 3, 1, 2)


def replay_on(device: str | torch.device, image: UInt8Array, records: Records, pixels: int) -> UInt8Array:
    """`replay` of one image's crops on a device: uint8 [M, 3, P, P]."""
    crops = [PendingCrops(image=image, records=records)]
    views: UInt8Array = replay_plan(plan_crops(crops, pixels, concatenate(crops)).to(device)).cpu().numpy()
    return views


def _resized(sources: Tensor, boxes: Tensor, level: int, pixels: int, band: slice) -> Tensor:
    """The rows `band` of boxes [m, 4] that are cut, halved `level` times and resized to `pixels`: uint8 [m, rows, P, 3]."""
    first, stride, height, width = boxes.unbind(1)
    step = 1 << level  # a pixel after the halvings is the mean of a square of this side
    within = torch.arange(step, device=boxes.device)
    rows, down = _taps(height, pixels)
    rows, down = rows[:, 2 * band.start : 2 * band.stop], down[:, band]
    columns, across = _taps(width, pixels)
    y = (rows[:, :, None] * step + within).flatten(1) * stride[:, None]
    x = (columns[:, :, None] * step + within).flatten(1)
    where = (first[:, None, None] + y[:, :, None]) + x[:, None, :]
    values = sources.index_select(0, where.flatten()).view(*where.shape, 3).int()
    for _ in range(level):
        values = _halved(values)
    values = values[:, :, 0::2] * across[:, None, :, :1] + values[:, :, 1::2] * across[:, None, :, 1:]
    values = values >> 4
    values = ((values[:, 0::2] * down[:, :, :1, None]) >> 16) + ((values[:, 1::2] * down[:, :, 1:, None]) >> 16)
    return ((values + 2) >> 2).clamp_(0, 255).to(torch.uint8)


def _halved(values: Tensor) -> Tensor:
    """Means of 2 x 2 pixels: int32 [m, H, W, 3] to [m, H / 2, W / 2, 3]."""
    rows_of_two = values[:, 0::2] + values[:, 1::2]
    return (rows_of_two[:, :, 0::2] + rows_of_two[:, :, 1::2] + 2) >> 2


def _taps(size: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    """The two neighbours of each output pixel, side by side, int64 [m, 2 P], and their weights in 2048ths int32 [m, P, 2].

    As OpenCV's resize computes them: sizes [m] and positions in float64, weights in float32.
    """
    scale = 1.0 / (pixels / size.double())
    position = ((torch.arange(pixels, device=size.device).double() + 0.5) * scale[:, None] - 0.5).float()
    below = position.floor()
    weight = position - below
    neighbours = torch.stack((below, below + 1), dim=2).long().clamp_(min=0)
    neighbours = torch.minimum(neighbours, (size - 1)[:, None, None])
    return neighbours.flatten(1), (torch.stack((1 - weight, weight), dim=2) * 2048).round().int()


def _colour_parameters(
    pixels: int, applied: npt.NDArray[np.bool_], flags: npt.NDArray[np.uint8], *factors: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], ...]:
    linear, offsets = colour.matrices(flags, *factors)
    largest = np.maximum(np.abs(linear).max(axis=(1, 2)), np.abs(offsets).sum(axis=2).max(axis=1))
    if (applied & (largest >= _MAX_COEFFICIENT)).any():
        raise RequestError("a crop record's colour factors are too large for --device_crops: run without it")
    return np.rint(linear * np.float32(1024)).astype(np.int32), offsets


def _colour(views: Tensor, linear: Tensor, offsets: Tensor) -> Tensor:
    """Applies colour matrices, int32 [m, 3, 3] in 1024ths; `offsets` float64 [m, 3, 3] maps a crop's mean to the constant."""
    mean = views.sum((1, 2), dtype=torch.int64).double() * (1.0 / (views.shape[1] * views.shape[2]))
    constant = (offsets * mean[:, None, :]).sum(2).float()
    result = ((constant + 0.5) * 1024).round().int()[:, None, None, :].expand(views.shape)
    for channel in range(3):
        result = result + views[..., channel, None].int() * linear[:, None, None, :, channel]
    return (result >> 10).clamp(0, 255).to(torch.uint8)


def _blur_parameters(
    pixels: int, applied: npt.NDArray[np.bool_], flags: npt.NDArray[np.uint8], sigma: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[Any], ...]:
    return (blur.kernels(np.where(applied, sigma, 0.0), pixels),)


def _blur(views: Tensor, kernels: Tensor) -> Tensor:
    """Applies separable kernels int32 [m, K] in 256ths; halves are rounded to the even neighbour."""
    values = views.int()
    middle = kernels.shape[1] // 2
    for dim in (2, 1):
        places = torch.arange(values.shape[dim], device=values.device)
        total = torch.zeros_like(values)
        for k in range(kernels.shape[1]):
            moved = values.index_select(dim, (places + (k - middle)).clamp_(0, values.shape[dim] - 1))
            total += moved * kernels[:, k, None, None, None]
        values = total
    return (values.float() / 65536).round().to(torch.uint8)  # exact: below 2^24


@dataclass(frozen=True, kw_only=True)
class DeviceOperation:
    """The device implementation of an operation in `OPERATIONS`."""

    apply: Callable[..., Tensor]
    """`apply(views, *parameters)` gives the new pixels of crops uint8 [m, P, P, 3]."""
    parameters: Callable[..., tuple[npt.NDArray[Any], ...]] = lambda pixels, applied, flags, *fields: ()
    """`parameters(pixels, applied, flags, *fields)` gives NumPy arrays [n, ...] for `apply`, from the records' values [n]."""


DEVICE_OPERATIONS = {
    "colour": DeviceOperation(parameters=_colour_parameters, apply=_colour),
    "blur": DeviceOperation(parameters=_blur_parameters, apply=_blur),
    "flip": DeviceOperation(apply=lambda views: views.flip(2)),
}
"""By the operation's name."""
