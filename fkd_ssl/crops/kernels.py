"""Replay on a GPU: Triton kernels with the integer arithmetic of OpenCV, and therefore the same bits as on the CPU.

Each operation in `fkd_ssl.crops.operations` has a function of the same name here, which changes some of the crops in place. It
can be written in Triton or in torch. The kernels use integer arithmetic only. Floating-point values are computed in torch, so
that no fused multiply-add of a compiler changes a bit. Tests without a GPU use Triton's interpreter (TRITON_INTERPRET=1).

Shape letters: n crops, k of them, P their side.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# Triton has no types for the arguments of kernels

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# values per program; the interpreter is faster with more
MAX_BLOCK = 1 << 16 if os.environ.get("TRITON_INTERPRET") == "1" else 1024
VALUES = 1 << 26  # maximum size of a temporary array; larger batches are made in several parts
VARYING = ["size", "count"]  # arguments that differ between batches: Triton would compile again for 1 and for multiples of 16


def halve(source: Tensor, scratch: Tensor, boxes: Tensor, largest: int) -> None:
    """Writes the 2 x 2 means of boxes to `scratch`. An odd last row or column is dropped.

    Args:
        source: Pixels uint8 [S]; can be `scratch` itself.
        scratch: uint8 [T].
        boxes: First pixel and pixels per row in `source`, first pixel in `scratch`, and height and width there: int64 [k, 5].
        largest: Pixels of the largest result.
    """
    tiles, block = _tiles(3 * largest)
    _halve[len(boxes), min(tiles, 4096)](source, scratch, boxes, BLOCK=block)


def resize(source: Tensor, views: Tensor, crops: Tensor, boxes: Tensor, doubled: bool) -> None:
    """Resizes boxes linearly to the size of the views, or to twice the size and halves the result.

    Args:
        source: Pixels uint8 [S].
        views: uint8 [n, P, P, 3].
        crops: Which of the views to write: int64 [k].
        boxes: First pixel and pixels per row in `source`, height and width: int64 [n, 4].
        doubled: Whether to resize to twice the size.
    """
    pixels, finer = views.shape[1], 1 + doubled
    for some in _parts(views, crops):
        # together, since a GPU takes longer to start each of these small operations than to run it
        rows, columns = _taps(boxes[some, 2:].T.reshape(-1), finer * pixels).view(2, len(some), finer * pixels)
        count = len(some) * views[0].numel()
        tiles, block = _tiles(count)
        _resize[(tiles,)](source, views, some, boxes, rows, columns, count, P=pixels, FINER=finer, BLOCK=block)


def colour(views: Tensor, crops: Tensor, linear: Tensor, offsets: Tensor) -> None:
    """Applies colour matrices.

    Args:
        views: uint8 [n, P, P, 3].
        crops: Which of the views to change: int64 [k].
        linear: int32 [n, 3, 3], in 1024ths.
        offsets: float64 [n, 3, 3], which maps the mean of a crop to the constant that is added.
    """
    pixels = views.shape[1]
    for some in _parts(views, crops):
        mean = views[some].sum((1, 2), dtype=torch.int64).double() * (1.0 / (pixels * pixels))
        products = offsets[some] * mean[:, None, :]
        constant = (products[..., 0] + products[..., 1] + products[..., 2]).float()  # the same order of sums on all devices
        count = len(some) * pixels * pixels
        tiles, block = _tiles(count)
        _colour[(tiles,)](views, some, linear, ((constant + 0.5) * 1024).round().int(), count, P=pixels, BLOCK=block)


def blur(views: Tensor, crops: Tensor, kernels: Tensor) -> None:
    """Applies separable kernels with a replicated border. Halves are rounded to the nearest even value.

    Args:
        views: uint8 [n, P, P, 3].
        crops: Which of the views to change: int64 [k].
        kernels: int32 [n, K], in 256ths, K odd.
    """
    for some in _parts(views, crops):
        count = len(some) * views[0].numel()
        tiles, block = _tiles(count)
        sums = torch.empty(count, dtype=torch.int32, device=views.device)
        for kernel in (_blur_rows, _blur_columns):
            kernel[(tiles,)](views, some, sums, kernels, kernels.shape[1], count, P=views.shape[1], BLOCK=block)


def flip(views: Tensor, crops: Tensor) -> None:
    """Mirrors crops [k] of the views uint8 [n, P, P, 3]."""
    for some in _parts(views, crops):
        views[some] = views[some].flip(2)


def _parts(views: Tensor, crops: Tensor) -> tuple[Tensor, ...]:
    """Splits crops into parts that fit in the temporary memory."""
    return torch.split(crops, max(1, VALUES // views[0].numel()))


def _tiles(count: int) -> tuple[int, int]:
    """Returns the number of programs for `count` values, and the number of values per program."""
    block = min(triton.next_power_of_2(count), MAX_BLOCK)
    return triton.cdiv(count, block), block


def _taps(size: Tensor, pixels: int) -> Tensor:
    """Returns the two neighbours of each output pixel and their weights in 2048ths, packed in int64 [k, P], for sizes [k].

    They are computed as in OpenCV's resize: positions in float64, weights in float32. `_unpack` is the inverse.
    """
    # torch computes `number / size` as `number * (1 / size)`, which rounds twice; torch.tensor(..., device) waits for a GPU
    scale = 1.0 / (torch.full_like(size, pixels, dtype=torch.float64) / size)
    position = ((torch.arange(pixels, device=size.device).double() + 0.5) * scale[:, None] - 0.5).float()
    below = position.floor()
    weight = position - below
    first, second = (torch.minimum((below + k).long().clamp_(min=0), (size - 1)[:, None]) for k in (0, 1))
    weights = [(w * 2048).round().long() for w in (1 - weight, weight)]
    return (first << 25) + ((second - first) << 24) + (weights[0] << 12) + weights[1]


@triton.jit
def _unpack(taps):
    """Returns the first and second neighbour and their weights."""
    first = taps >> 25
    return first, first + ((taps >> 24) & 1), ((taps >> 12) & 4095).to(tl.int32), (taps & 4095).to(tl.int32)


@triton.jit
def _halve(source, scratch, boxes, BLOCK: tl.constexpr):
    box = boxes + 5 * tl.program_id(0)
    first, stride, to = tl.load(box), tl.load(box + 1), tl.load(box + 2)
    height, width = tl.load(box + 3), tl.load(box + 4)
    for start in range(tl.program_id(1) * BLOCK, 3 * height * width, tl.num_programs(1) * BLOCK):
        value = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = value < 3 * height * width
        pixel = value // 3
        row = pixel // width
        upper = source + 3 * (first + 2 * (row * stride + pixel - row * width)) + value - 3 * pixel
        total = tl.load(upper, mask=inside, other=0).to(tl.int32) + tl.load(upper + 3, mask=inside, other=0).to(tl.int32)
        lower = upper + 3 * stride
        total += tl.load(lower, mask=inside, other=0).to(tl.int32) + tl.load(lower + 3, mask=inside, other=0).to(tl.int32)
        tl.store(scratch + 3 * to + value, ((total + 2) >> 2).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _resize(source, views, crops, boxes, rows, columns, count, P: tl.constexpr, FINER: tl.constexpr, BLOCK: tl.constexpr):
    value = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), count - 1)
    row = value // (3 * P)  # of all crops together
    k, within = row // P, value - row * 3 * P
    x = within // 3
    crop = tl.load(crops + k)
    source += 3 * tl.load(boxes + 4 * crop) + (within - 3 * x)
    stride = 3 * tl.load(boxes + 4 * crop + 1)
    rows += row * FINER
    columns += (k * P + x) * FINER
    result = tl.full((BLOCK,), 0, tl.int32)
    for i in tl.static_range(FINER):
        upper, lower, above, below = _unpack(tl.load(rows + i))
        upper, lower = source + upper * stride, source + lower * stride
        for j in tl.static_range(FINER):
            left, right, before, after = _unpack(tl.load(columns + j))
            left, right = 3 * left, 3 * right
            top = (tl.load(upper + left).to(tl.int32) * before + tl.load(upper + right).to(tl.int32) * after) >> 4
            bottom = (tl.load(lower + left).to(tl.int32) * before + tl.load(lower + right).to(tl.int32) * after) >> 4
            result += ((((top * above) >> 16) + ((bottom * below) >> 16)) + 2) >> 2
    if FINER == 2:
        result = (result + 2) >> 2
    tl.store(views + 3 * P * P * crop + (value - 3 * P * P * k), result.to(tl.uint8))


@triton.jit(do_not_specialize=VARYING)
def _colour(views, crops, linear, constant, count, P: tl.constexpr, BLOCK: tl.constexpr):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < count
    k = pixel // (P * P)
    crop = tl.load(crops + k, mask=inside, other=0)
    at = views + 3 * (P * P * crop + (pixel - P * P * k))
    red = tl.load(at, mask=inside, other=0).to(tl.int32)
    green = tl.load(at + 1, mask=inside, other=0).to(tl.int32)
    blue = tl.load(at + 2, mask=inside, other=0).to(tl.int32)
    for channel in tl.static_range(3):
        row = linear + 9 * crop + 3 * channel
        result = tl.load(constant + 3 * k + channel, mask=inside, other=0) + red * tl.load(row, mask=inside, other=0)
        result += green * tl.load(row + 1, mask=inside, other=0) + blue * tl.load(row + 2, mask=inside, other=0)
        tl.store(at + channel, tl.minimum(tl.maximum(result >> 10, 0), 255).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _blur_rows(views, crops, sums, kernels, size, count, P: tl.constexpr, BLOCK: tl.constexpr):
    value = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), count - 1)
    row = value // (3 * P)
    k, x = row // P, (value - row * 3 * P) // 3
    crop = tl.load(crops + k)
    at = views + 3 * P * P * crop + (value - 3 * P * P * k) - 3 * x
    total = tl.full((BLOCK,), 0, tl.int32)
    for tap in range(size):
        moved = tl.minimum(tl.maximum(x + (tap - size // 2), 0), P - 1)
        total += tl.load(at + 3 * moved).to(tl.int32) * tl.load(kernels + crop * size + tap)
    tl.store(sums + value, total)


@triton.jit(do_not_specialize=VARYING)
def _blur_columns(views, crops, sums, kernels, size, count, P: tl.constexpr, BLOCK: tl.constexpr):
    value = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), count - 1)
    row = value // (3 * P)
    k = row // P
    y = row - k * P
    crop = tl.load(crops + k)
    total = tl.full((BLOCK,), 0, tl.int32)
    for tap in range(size):
        moved = tl.minimum(tl.maximum(y + (tap - size // 2), 0), P - 1)
        total += tl.load(sums + (value + 3 * P * (moved - y))) * tl.load(kernels + crop * size + tap)
    rounded = (total + 32767 + ((total >> 16) & 1)) >> 16
    tl.store(views + 3 * P * P * crop + (value - 3 * P * P * k), rounded.to(tl.uint8))
