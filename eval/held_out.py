"""Linear probes whose settings are chosen on a held-out part of the training set: what `logreg` and `sweep` share.

A setting is never chosen on the images to score. The probe is then trained again on the whole training set. Features are
standardised, because one grid of settings does not suit features of all lengths.

Legend: `N` training images, `n` images to score, `D` feature dimension, `C` classes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fkd_ssl.arrays import BoolArray, Float32Array, Int64Array
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval.scores import accuracy, as_probe, probe_result, ranks

HELD_OUT = 0.1
"""Share of each class that is held out."""

Weights = tuple[torch.Tensor, torch.Tensor]
"""float32 [C, D] and [C]."""
Fit = Callable[[torch.Tensor, torch.Tensor, int, list[float]], Iterable[Weights]]
"""Trains a layer for each setting, on standardised features float32 [N, D], labels int64 [N] and C classes."""


@dataclass(frozen=True)
class Standardisation:
    """The mean and standard deviation of training features, each float32 [D]."""

    mean: Float32Array
    deviation: Float32Array

    @classmethod
    def of(cls, features: Float32Array) -> "Standardisation":
        """Measures features [N, D]; raises FkdError if they are too large."""
        mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        with np.errstate(over="ignore"):
            centred = features - mean
        deviation = np.sqrt(np.einsum("nd,nd->d", centred, centred, dtype=np.float64) / len(features)).astype(np.float32)
        if not np.isfinite(deviation).all():
            raise FkdError(
                f"train_features: values up to {np.abs(features).max():.3g} are too large to standardise in float32; scale them"
            )
        # the deviation of a constant dimension is rounding noise, which must not be scaled up
        return cls(mean, np.where(deviation > 1e-6 * np.abs(mean), deviation, 1.0).astype(np.float32))

    def apply(self, features: Float32Array, device: torch.device | str) -> torch.Tensor:
        """The standardised features on a device."""
        standardised = features - self.mean
        standardised /= self.deviation
        return torch.from_numpy(standardised).to(device)


def evaluate(
    fit: Fit,
    settings: Sequence[float],
    *,
    key: str,
    data: tuple[Any, Any, Any, Any, int | None],
    names: Sequence[str] | None,
    seed: int,
    device: torch.device | str,
    **values: Any,
) -> dict[str, Any]:
    """Chooses a setting, trains on the whole training set, and scores.

    Args:
        fit: Trains the layers.
        settings: Settings to choose from.
        key: Name of the setting.
        data: The arguments of `scores.as_probe`.
        names: Class names, for `per_class`; None leaves it out.
        seed: Seed for choosing the held-out images.
        device: Where the layers are trained. It holds the training features, 4 N D bytes.
        **values: Further values of the result.

    Returns:
        `top1`, `top5` in percent; `correct` bool [n]; the chosen setting under `key`; `held_out`, the `top1` and `loss` of each
        setting on the held-out images (loss None if it diverged); `n_held_out`, and the values of `scores.probe_result`.

    Raises:
        RequestError: Shapes, labels or settings are invalid, the training set cannot be split, or all settings diverged.
        FkdError: A feature is not finite, or too large to standardise.
    """
    train, known, wanted, truth, classes = as_probe(*data)
    if len(settings) == 0 or not all(np.isfinite(one) and one > 0 for one in settings):
        raise RequestError(f"{key}: expected positive numbers to choose from, got {list(settings)}")
    ordered = sorted(settings)
    held = draw(known, seed=seed)
    fitted = Standardisation.of(train[~held])
    queries = fitted.apply(train[held], device)
    labels = torch.from_numpy(known).to(device)
    kept = torch.from_numpy(~held).to(device)
    layers = fit(fitted.apply(train[~held], device), labels[kept], classes, ordered)
    rows = [
        {key: setting, **_score(_logits(queries, weights), known[held])}
        for setting, weights in zip(ordered, layers, strict=True)
    ]
    del layers  # frees its features
    converged = [row for row in rows if row["loss"] is not None]
    if not converged:
        raise RequestError(f"the probe diverged with every {key} of {ordered}; give lower ones")
    best = max(converged, key=lambda row: (row["top1"], -row["loss"]))
    fitted = Standardisation.of(train)
    [weights] = fit(fitted.apply(train, device), labels, classes, [best[key]])
    rank = ranks(_logits(fitted.apply(wanted, device), weights).cpu().numpy(), truth)
    edge = len(rows) > 1 and best[key] in (ordered[0], ordered[-1])
    return probe_result(
        rank,
        truth,
        names,
        train=train,
        features=wanted,
        classes=classes,
        notes=[f"the chosen {key} {best[key]:g} is the smallest or largest that was tried"] if edge else [],
        **{key: best[key]},
        held_out=rows,
        n_held_out=int(held.sum()),
        seed=seed,
        **values,
    )


def draw(labels: Int64Array, *, seed: int) -> BoolArray:
    """The held-out training images: bool [N], a tenth of each class, at least one image of a class with two or more.

    Raises:
        RequestError: No class has two images.
    """
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) > 1:
            held[rows[: max(1, round(HELD_OUT * len(rows)))]] = True
    if not held.any():
        raise RequestError("no class has two training images, so none can be held out to choose the settings")
    return held


def _logits(features: torch.Tensor, weights: Weights) -> torch.Tensor:
    return features @ weights[0].T + weights[1]


def _score(logits: torch.Tensor, truth: Int64Array) -> dict[str, Any]:
    logits = logits.cpu()
    if not logits.isfinite().all():
        return {"top1": 0.0, "loss": None}
    loss = float(functional.cross_entropy(logits, torch.from_numpy(truth)))
    return {"top1": accuracy(ranks(logits.numpy(), truth))["top1"], "loss": loss}
