"""Replay on a device: the crops of many images at once, in the integers of the CPU's path and so with its very bits.

The CPU reads, decodes and plans; the device cuts, halves, resizes, colours, blurs and flips. OpenCV does each of these in
integers for uint8 (a linear resize in 11-bit weights, colour in 10 bits, blur in 8), which are written out here in
torch's. `probe_digest(device)` tells whether a machine's two paths agree, as they do where this was tried.

Shape letters: n crops, m of them at a time, P their side.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fkd_ssl.crops import colour
from fkd_ssl.crops.records import BLUR, FLIP, GREY, JITTER, SOLARIZE, Records, unpack
from fkd_ssl.crops.replay import SIGMA_PIXELS, blur_kernel, resize_plan
from fkd_ssl.errors import RequestError
from fkd_ssl.images import UInt8Array

Plan = dict[str, Tensor]

_LARGEST = 32.0
ELEMENTS = 1 << 23  # of the largest temporary array, int64: crops and rows are worked on so many at a time that it fits


def plan(shapes: Sequence[tuple[int, int]], records: Sequence[Records], pixels: int) -> Plan:
    """What a device must know to replay these crops, in small tensors that a batch can carry.

    Args:
        shapes: Height and width of each image, in the order in which their pixels follow one another.
        records: Crop records of each image.
        pixels: P.

    Raises:
        ImageError: A box lies outside its image.
        RequestError: A record's colour coefficients are 32 or more, which no recipe's are.
    """
    boxes: list[tuple[int, int, int, int]] = []  # first pixel, pixels in a row, and size after halving
    chosen: dict[str, list[int]] = {name: [] for name in ("coloured", "blurred", "solarized", "flipped")}
    linear, offsets, kernels = [], [], []
    first = 0
    for (image_height, image_width), of_image in zip(shapes, records, strict=True):
        for record in unpack(of_image, image_height, image_width):
            top, left, height, width, flags, *_, sigma = record
            k, (level, doubled) = len(boxes), resize_plan(height, width, pixels)
            boxes.append((first + top * image_width + left, image_width, height >> level, width >> level))
            chosen.setdefault(f"{'doubled' if doubled else 'halved'}{level}", []).append(k)
            if flags & (JITTER | GREY):
                chosen["coloured"].append(k)
                of_rgb, of_mean = colour.linear_and_offset(record)
                if max(np.abs(of_rgb).max(), np.abs(of_mean).sum(axis=1).max()) >= _LARGEST:  # OpenCV leaves its integers there
                    raise RequestError(
                        f"crop record {record}: its colours are beyond what a device makes: leave --device_crops out"
                    )
                linear.append(of_rgb)
                offsets.append(of_mean)
            if flags & BLUR and len(kernel := blur_kernel(sigma * pixels / SIGMA_PIXELS)) > 1:
                chosen["blurred"].append(k)
                kernels.append(kernel)
            if flags & SOLARIZE:
                chosen["solarized"].append(k)
            if flags & FLIP:
                chosen["flipped"].append(k)
        first += image_height * image_width
    longest = max(map(len, kernels), default=1)
    padded = np.array([np.pad(kernel, (longest - len(kernel)) // 2) for kernel in kernels]).reshape(-1, longest)
    return {
        **{name: torch.tensor(indices, dtype=torch.int64) for name, indices in chosen.items()},
        "boxes": torch.tensor(boxes, dtype=torch.int64).view(-1, 4),
        "linear": torch.from_numpy(np.rint(np.array(linear).reshape(-1, 3, 3) * np.float32(1024)).astype(np.int32)),
        "offsets": torch.from_numpy(np.array(offsets, dtype=np.float64).reshape(-1, 3, 3)),
        "kernels": torch.from_numpy(np.rint(padded * 256).astype(np.int32)),
    }


def replay_planned(sources: Tensor, crops: Plan, pixels: int) -> Tensor:
    """The pixels of planned crops.

    Args:
        sources: The images' pixels, one image after the other: uint8 [S] with S = 3 x (sum of height x width).
        crops: What `plan` gave for them and for the same `pixels`, on the same device.
        pixels: P.

    Returns:
        uint8 [n, 3, P, P] in channels-last memory, on that device.
    """
    views = torch.empty((len(crops["boxes"]), pixels, pixels, 3), dtype=torch.uint8, device=sources.device)
    for name, indices in crops.items():
        if name.startswith(("halved", "doubled")):
            level, finer = int(name.removeprefix("halved").removeprefix("doubled")), 1 + name.startswith("doubled")
            for some in torch.split(indices, max(1, ELEMENTS // (2 * finer * pixels << level) ** 2)):
                rows = max(1, ELEMENTS // (len(some) * pixels * (2 * finer << level) ** 2))
                for top in range(0, pixels, rows):
                    end = min(top + rows, pixels)
                    band = slice(finer * top, finer * end)
                    resized = _resized(sources.view(-1, 3), crops["boxes"][some], level, finer * pixels, band)
                    views[some, top:end] = resized if finer == 1 else _halved(resized.int()).to(torch.uint8)
    for some, linear, offsets in _parts(crops, pixels, "coloured", "linear", "offsets"):
        views[some] = _coloured(views[some], linear, offsets)
    for some, kernels in _parts(crops, pixels, "blurred", "kernels"):
        views[some] = _blurred(views[some], kernels)
    for (some,) in _parts(crops, pixels, "solarized"):
        views[some] = torch.where(views[some] >= 128, 255 - views[some], views[some])
    for (some,) in _parts(crops, pixels, "flipped"):
        views[some] = views[some].flip(2)
    return views.permute(0, 3, 1, 2)


def replay_on(device: str | torch.device, image: UInt8Array, records: Records, pixels: int) -> UInt8Array:
    """`replay` of one image's crops by way of a device: uint8 [M, 3, P, P]."""
    crops = {name: part.to(device) for name, part in plan([image.shape[:2]], [records], pixels).items()}
    views: UInt8Array = replay_planned(torch.from_numpy(image).flatten().to(device), crops, pixels).cpu().numpy()
    return views


def _parts(crops: Plan, pixels: int, *names: str) -> Iterator[tuple[Tensor, ...]]:
    """The crops that something is done to, so many at a time that temporaries stay small, and what it needs of each."""
    return zip(*(torch.split(crops[name], max(1, ELEMENTS // (3 * pixels * pixels))) for name in names), strict=True)


def _resized(sources: Tensor, boxes: Tensor, level: int, pixels: int, band: slice) -> Tensor:
    """Boxes [m, 4] cut, halved `level` times and resized to `pixels`, some rows of them: uint8 [m, rows, P, 3]."""
    first, stride, height, width = boxes.unbind(1)
    step = 1 << level  # a pixel after halving is a square of so many
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


def _coloured(views: Tensor, linear: Tensor, offsets: Tensor) -> Tensor:
    """Crops uint8 [m, P, P, 3] through their colour matrices, int32 [m, 3, 3] in 1024ths; offsets float64 of their means."""
    mean = views.sum((1, 2), dtype=torch.int64).double() * (1.0 / (views.shape[1] * views.shape[2]))
    constant = (offsets * mean[:, None, :]).sum(2).float()
    result = ((constant + 0.5) * 1024).round().int()[:, None, None, :].expand(views.shape)
    for channel in range(3):
        result = result + views[..., channel, None].int() * linear[:, None, None, :, channel]
    return (result >> 10).clamp(0, 255).to(torch.uint8)


def _blurred(views: Tensor, kernels: Tensor) -> Tensor:
    """Crops uint8 [m, P, P, 3] through separable kernels int32 [m, K] in 256ths; halves go to the even neighbour."""
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
