"""Scores at the positions of a map and labels at the pixels of a mask: from one to the other.

Legend: `h` x `w` positions of a map, `H` x `W` pixels of a mask, `C` classes, `S` points.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fkd_ssl.arrays import Float32Array, UInt8Array
from fkd_ssl.eval.masks import IGNORED

_VALUES = 2**24  # interpolated scores in memory at once


def on_grid(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores [h w, C] as [C, h, w]."""
    return scores.T.reshape(-1, *size)


def sample(scores: Tensor, points: Tensor) -> Tensor:
    """Interpolates scores [C, h, w] bilinearly at points [S, 2], x and y from -1 to 1; returns [S, C].

    At the centres of pixels this is `functional.interpolate(mode="bilinear", align_corners=False)`.
    """
    found = functional.grid_sample(scores[None], points[None, None], padding_mode="border", align_corners=False)
    return found[0, :, 0].T


def classes_at(scores: Tensor, height: int, width: int) -> Tensor:
    """The class of the highest interpolated score at each pixel of a mask: int64 [H, W] from scores [C, h, w]."""
    x = (torch.arange(width, device=scores.device) * 2 + 1) / width - 1
    y = (torch.arange(height, device=scores.device) * 2 + 1) / height - 1
    found = []
    for part in torch.split(y, max(1, _VALUES // (width * len(scores)))):
        points = torch.stack([x.expand(len(part), width), part[:, None].expand(len(part), width)], dim=-1)
        found.append(sample(scores, points.flatten(0, 1)).argmax(dim=1))
    return torch.cat(found).view(height, width)


def shares_of(labels: UInt8Array, size: tuple[int, int], classes: int) -> Float32Array:
    """The share of each class in the pixels of each cell, float32 [h w, C]; zeros for a cell without scored pixels."""
    (height, width), (h, w) = labels.shape, size
    rows, columns = (np.arange(height) + 0.5) * h // height, (np.arange(width) + 0.5) * w // width
    cells = (rows[:, None] * w + columns).astype(np.int64)
    scored = labels != IGNORED
    counts = np.bincount(cells[scored] * classes + labels[scored], minlength=h * w * classes).reshape(h * w, classes)
    shares: Float32Array = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)
    return shares
