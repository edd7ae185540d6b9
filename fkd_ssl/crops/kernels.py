"""Replay on a GPU: Triton kernels with the arithmetic of OpenCV, and therefore the same bits as on the CPU.

Each operation in `fkd_ssl.crops.operations` has a function of the same name here, which changes some of the crops in place. It
can be written in Triton or in torch. A program works on a part of one crop. There is more than one kernel because colours need
the mean of the whole crop, and a blur needs its neighbours. Pixels are integers. The few floating-point values are computed
with `enable_fp_fusion=False`, so that no fused multiply-add of the compiler changes a bit. Tests without a GPU use Triton's
interpreter (TRITON_INTERPRET=1).

Shape letters: n crops, P their side.
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


def resize(source: Tensor, scratch: Tensor, views: Tensor, boxes: Tensor) -> None:
    """Resizes boxes linearly to the size of the views, or to twice the size and halves the result.

    Args:
        source: Pixels uint8 [S].
        scratch: Pixels of halved boxes uint8 [T].
        views: Result uint8 [n, P, P, 3].
        boxes: First pixel, pixels per row, height and width of each box; 1 if it is in `scratch`; 1 if it is resized to twice
            the size: int64 [n, 6].
    """
    pixels = views.shape[1]
    tiles, block = _tiles(3 * pixels * pixels)
    _resize[len(views), tiles](source, scratch, views, boxes, taps(boxes, pixels), P=pixels, BLOCK=block)


def taps(boxes: Tensor, pixels: int) -> Tensor:
    """Returns the two neighbours of each output row and column and their weights, packed as in `_unpack`: int64 [n, 2, 2 P].

    They are computed as in OpenCV's resize: positions in float64, weights in float32. Only the first P of the 2 P are valid for
    boxes that are not resized to twice the size.
    """
    packed = torch.empty((len(boxes), 2, 2 * pixels), dtype=torch.int64, device=boxes.device)
    block = triton.next_power_of_2(2 * pixels)
    _taps[len(boxes), 2](boxes, packed, P=pixels, BLOCK=block, enable_fp_fusion=False)
    return packed


def colour(views: Tensor, flags: Tensor, bits: int, linear: Tensor, offsets: Tensor) -> None:
    """Applies colour matrices.

    Args:
        views: uint8 [n, P, P, 3].
        flags: uint8 [n]. Crops with any of the `bits` are changed.
        bits: Flags of the operation.
        linear: int32 [n, 3, 3], in 1024ths.
        offsets: float64 [n, 3, 3], which maps the mean of a crop to the constant that is added.
    """
    pixels, sums = views.shape[1], views.sum((1, 2), dtype=torch.int64)
    tiles, block = _tiles(pixels * pixels)
    _colour[len(views), tiles](views, flags, sums, linear, offsets, BITS=bits, P=pixels, BLOCK=block, enable_fp_fusion=False)


def blur(views: Tensor, flags: Tensor, bits: int, kernels: Tensor) -> None:
    """Applies separable kernels with a replicated border. Halves are rounded to the nearest even value.

    Args:
        views: uint8 [n, P, P, 3].
        flags: uint8 [n]. Crops with any of the `bits` are changed.
        bits: Flags of the operation.
        kernels: int32 [n, K], in 256ths, K odd.
    """
    pixels = views.shape[1]
    tiles, block = _tiles(3 * pixels * pixels)
    sums = torch.empty_like(views, dtype=torch.uint16)  # of the pixels of a row, at most 255 x 256
    for kernel in (_blur_rows, _blur_columns):
        kernel[len(views), tiles](views, flags, sums, kernels, kernels.shape[1], BITS=bits, P=pixels, BLOCK=block)


def flip(views: Tensor, flags: Tensor, bits: int) -> None:
    """Mirrors the crops of the views uint8 [n, P, P, 3] whose flags uint8 [n] have any of the `bits`."""
    pixels = views.shape[1]
    tiles, block = _tiles(pixels * pixels)
    _flip[len(views), tiles](views, flags, BITS=bits, P=pixels, BLOCK=block)


def _tiles(count: int) -> tuple[int, int]:
    """Returns the number of programs for `count` values, and the number of values per program."""
    block = min(triton.next_power_of_2(count), MAX_BLOCK)
    return triton.cdiv(count, block), block


@triton.jit
def _round(number):
    """Rounds float64 below 2^51 to the nearest integer, halves to the nearest even one."""
    return (number + 6755399441055744.0) - 6755399441055744.0  # 1.5 x 2^52


@triton.jit
def _taps(boxes, packed, P: tl.constexpr, BLOCK: tl.constexpr):
    crop, axis = tl.program_id(0), tl.program_id(1)  # axis 0: rows, 1: columns
    size = tl.load(boxes + 6 * crop + 2 + axis)
    finer = P * (1 + tl.load(boxes + 6 * crop + 5))
    output = tl.arange(0, BLOCK)
    scale = 1.0 / (finer.to(tl.float64) / size.to(tl.float64))
    position = ((output.to(tl.float64) + 0.5) * scale - 0.5).to(tl.float32)
    below = tl.floor(position)
    weight = position - below
    first = tl.minimum(tl.maximum(below.to(tl.int64), 0), size - 1)
    second = tl.minimum(below.to(tl.int64) + 1, size - 1)
    before, after = _round((1.0 - weight).to(tl.float64) * 2048), _round(weight.to(tl.float64) * 2048)
    result = (((first << 1) + (second - first)) << 32) + (before.to(tl.int64) << 12) + after.to(tl.int64)
    tl.store(packed + 2 * P * (2 * crop + axis) + output, result, mask=output < finer)


@triton.jit
def _unpack(taps):
    """Returns the first and second neighbour and their weights in 2048ths."""
    neighbours, weights = (taps >> 32).to(tl.int32), taps.to(tl.int32)
    first = neighbours >> 1
    return first, first + (neighbours & 1), weights >> 12, weights & 4095


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


@triton.jit
def _resize(source, scratch, views, boxes, taps, P: tl.constexpr, BLOCK: tl.constexpr):
    crop = tl.program_id(0).to(tl.int64)
    value = tl.minimum(tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), 3 * P * P - 1)
    pixel = value // 3
    y, x = pixel // P, pixel % P
    box = boxes + 6 * crop
    source = tl.where(tl.load(box + 4) > 0, scratch, source) + 3 * tl.load(box) + (value - 3 * pixel)
    stride = 3 * tl.load(box + 1)
    finer = 1 + tl.load(box + 5).to(tl.int32)
    rows = taps + 4 * P * crop + y * finer
    columns = taps + 4 * P * crop + 2 * P + x * finer
    result = tl.full((BLOCK,), 0, tl.int32)
    for i in range(finer):
        upper, lower, above, below = _unpack(tl.load(rows + i))
        upper, lower = source + upper * stride, source + lower * stride
        for j in range(finer):
            left, right, before, after = _unpack(tl.load(columns + j))
            left, right = 3 * left, 3 * right
            top = (tl.load(upper + left).to(tl.int32) * before + tl.load(upper + right).to(tl.int32) * after) >> 4
            bottom = (tl.load(lower + left).to(tl.int32) * before + tl.load(lower + right).to(tl.int32) * after) >> 4
            result += ((((top * above) >> 16) + ((bottom * below) >> 16)) + 2) >> 2
    mean = tl.where(finer == 2, (result + 2) >> 2, result)
    tl.store(views + 3 * P * P * crop + value, mean.to(tl.uint8))


@triton.jit
def _colour(views, flags, sums, linear, offsets, BITS: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    crop = tl.program_id(0).to(tl.int64)
    if (tl.load(flags + crop) & BITS) == 0:
        return
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < P * P
    at = views + 3 * (P * P * crop + pixel)
    red = tl.load(at, mask=inside, other=0).to(tl.int32)
    green = tl.load(at + 1, mask=inside, other=0).to(tl.int32)
    blue = tl.load(at + 2, mask=inside, other=0).to(tl.int32)
    share = tl.full((), 1.0 / (P * P), tl.float64)
    mean_red = tl.load(sums + 3 * crop).to(tl.float64) * share
    mean_green = tl.load(sums + 3 * crop + 1).to(tl.float64) * share
    mean_blue = tl.load(sums + 3 * crop + 2).to(tl.float64) * share
    for channel in tl.static_range(3):
        row = offsets + 9 * crop + 3 * channel
        constant = tl.load(row) * mean_red + tl.load(row + 1) * mean_green + tl.load(row + 2) * mean_blue
        rounded = _round(((constant.to(tl.float32) + 0.5) * 1024).to(tl.float64)).to(tl.int32)
        row = linear + 9 * crop + 3 * channel
        result = rounded + red * tl.load(row) + green * tl.load(row + 1) + blue * tl.load(row + 2)
        tl.store(at + channel, tl.minimum(tl.maximum(result >> 10, 0), 255).to(tl.uint8), mask=inside)


# Triton would compile again for a `size` of 1 and for multiples of 16
@triton.jit(do_not_specialize=["size"])
def _blur_rows(views, flags, sums, kernels, size, BITS: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    crop = tl.program_id(0).to(tl.int64)
    if (tl.load(flags + crop) & BITS) == 0:
        return
    value = tl.minimum(tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), 3 * P * P - 1)
    x = value // 3 % P
    at = views + 3 * P * P * crop + (value - 3 * x)
    total = tl.full((BLOCK,), 0, tl.int32)
    for tap in range(size):
        moved = tl.minimum(tl.maximum(x + (tap - size // 2), 0), P - 1)
        total += tl.load(at + 3 * moved).to(tl.int32) * tl.load(kernels + crop * size + tap)
    tl.store(sums + 3 * P * P * crop + value, total.to(tl.uint16))


@triton.jit(do_not_specialize=["size"])
def _blur_columns(views, flags, sums, kernels, size, BITS: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    crop = tl.program_id(0).to(tl.int64)
    if (tl.load(flags + crop) & BITS) == 0:
        return
    value = tl.minimum(tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), 3 * P * P - 1)
    y = value // (3 * P)
    at = sums + 3 * P * P * crop + (value - 3 * P * y)
    total = tl.full((BLOCK,), 0, tl.int32)
    for tap in range(size):
        moved = tl.minimum(tl.maximum(y + (tap - size // 2), 0), P - 1)
        total += tl.load(at + 3 * P * moved).to(tl.int32) * tl.load(kernels + crop * size + tap)
    rounded = (total + 32767 + ((total >> 16) & 1)) >> 16
    tl.store(views + 3 * P * P * crop + value, rounded.to(tl.uint8))


@triton.jit
def _flip(views, flags, BITS: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    crop = tl.program_id(0).to(tl.int64)
    if (tl.load(flags + crop) & BITS) == 0:
        return
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = pixel % P
    inside = (pixel < P * P) & (x < P // 2)
    left = views + 3 * (P * P * crop + pixel)
    right = left + 3 * (P - 1 - 2 * x)
    for channel in tl.static_range(3):
        one, other = tl.load(left + channel, mask=inside), tl.load(right + channel, mask=inside)
        tl.store(left + channel, other, mask=inside)
        tl.store(right + channel, one, mask=inside)
