"""Baselines of a score: the same protocol on 8 x 8 pixels, on a colour histogram, and chance.

A network whose features are no better than these has learned nothing that the images' colours do not show.

Legend: `B` images in a batch, `N` training images, `n` images to score, `P` pixels, `D` feature dimension.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fkd_ssl.arrays import Float32Array, Int64Array

GRID, LEVELS = 8, 4
"""Cells of the grid and levels of a colour, per side and channel."""
NAMES = {"pixels": f"{GRID} x {GRID} pixels", "colours": "colour histogram", "chance": "chance"}
DIMS = {"pixels": 3 * GRID**2, "colours": LEVELS**3}
DIM = sum(DIMS.values())

_SAMPLED = 64  # minimum number of rows and columns of a crop that are read


def features(views: torch.Tensor) -> torch.Tensor:
    """Both baselines' features: uint8 [B, 3, P, P] to float32 [B, DIM], on the same device.

    `pixels` are the mean colours of the cells of a grid, with grey as 0. `colours` are the square roots of a histogram, so that
    the cosine of two is their Bhattacharyya coefficient. Large crops are sampled: every P // 64-th row and column.
    """
    step = max(1, views.shape[-1] // _SAMPLED)
    sampled = views[:, :, ::step, ::step]
    pixels = functional.adaptive_avg_pool2d(sampled.float(), GRID).flatten(1) / 255 - 0.5
    red, green, blue = (sampled // (256 // LEVELS)).unbind(1)
    bins = ((red * LEVELS + green) * LEVELS + blue).flatten(1).long()
    counts = torch.zeros(len(views), LEVELS**3, device=views.device).scatter_add_(1, bins, torch.ones_like(bins).float())
    return torch.cat([pixels, (counts / bins.shape[1]).sqrt()], dim=1)


def by_name(found: Float32Array) -> dict[str, Float32Array]:
    """The features of each baseline, from `features` [N, DIM]."""
    pixels, colours = np.split(found, [DIMS["pixels"]], axis=1)
    return {"pixels": pixels, "colours": colours}


def chance(train_labels: Int64Array, labels: Int64Array) -> float:
    """Accuracy in percent of always predicting the most frequent class of the training set."""
    return 100.0 * float((labels == np.bincount(train_labels).argmax()).mean())


def scores(
    evaluate: Callable[..., dict[str, Any]],
    found: dict[str, tuple[Float32Array, Float32Array]],
    train_labels: Int64Array,
    labels: Int64Array,
) -> dict[str, float]:
    """Top-1 in percent of each baseline, the best first, and of chance.

    Args:
        evaluate: The protocol; takes `train_features` and `features`, and returns a result with `top1`.
        found: Features of the training images and of the images to score, by name, as `Split.baselines`.
        train_labels: int64 [N].
        labels: int64 [n].
    """
    top1 = {name: float(evaluate(train_features=train, features=val)["top1"]) for name, (train, val) in found.items()}
    return {**dict(sorted(top1.items(), key=lambda item: -item[1])), "chance": chance(train_labels, labels)}


def line(found: dict[str, float]) -> str:
    """The end of a score's line: `scores` in words.

    >>> line({"colours": 43.64, "chance": 10.0})
    'colour histogram 43.64 %, chance 10.00 %'
    """
    return ", ".join(f"{NAMES[name]} {value:.2f} %" for name, value in found.items())


def note(top1: float, found: dict[str, float], who: str = "the model") -> list[str]:
    """A note if a score is not above the best baseline.

    >>> note(37.0, {"pixels": 38.36, "chance": 10.0})
    ['the model (37.00 %) is no better than 8 x 8 pixels (38.36 %)']
    """
    name = max(found, key=lambda key: found[key])
    if top1 > found[name]:
        return []
    article = "a " if name == "colours" else ""
    return [f"{who} ({top1:.2f} %) is no better than {article}{NAMES[name]} ({found[name]:.2f} %)"]
