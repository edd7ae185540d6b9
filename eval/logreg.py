"""The `logreg` probe: multinomial logistic regression on cached features, in seconds.

L-BFGS on features that are standardised with the statistics of the training set. The L2 strength is chosen on a held-out part
of the training set, never on the images to score; the probe is then trained on the whole training set. The strengths follow
DINOv2's evaluation (arXiv 2304.07193). The features are those of the centre crop, without augmentation.

Legend: `N` training images, `n` images to score, `D` feature dimension, `C` classes.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval.scores import accuracy, as_probe, probe_result, ranks
from fkd_ssl.progress import bar_disabled

STRENGTHS = tuple(float(10 ** (power / 2)) for power in range(-10, 5))
"""Inverse L2 strengths C in scikit-learn's sense, C x sum of losses + |W|^2 / 2: 1e-5 to 100 in half decades."""
HELD_OUT = 0.1
ITERATIONS = 500  # by then the accuracy has stopped changing

_GRADIENT, _CHANGE = 1e-6, 1e-9  # tolerances of L-BFGS: largest gradient, smallest step
_HISTORY = 10

Weights = tuple[torch.Tensor, torch.Tensor]  # float32 [C, D] and [C]


def evaluate(
    *,
    train_features: Any,
    train_labels: Any,
    features: Any,
    labels: Any,
    num_classes: int | None = None,
    names: Sequence[str] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy on `features` of a logistic regression trained on `train_features`.

    torch's L-BFGS reaches the optimum of scikit-learn's (a test compares them) in less time, since each strength starts from
    the weights of the one before. Needs about two more copies of the training features.

    Args:
        train_features: Array or tensor [N, D].
        train_labels: Array or tensor [N] of integers from 0.
        features: Array or tensor [n, D].
        labels: Array or tensor [n].
        num_classes: C; by default the largest training label plus one.
        names: Class names, for `per_class`.
        strengths: Inverse L2 strengths to choose from.
        seed: Seed for choosing the held-out tenth.
        progress: Show a progress bar on standard error.

    Returns:
        `top1`, `top5` in percent; `correct` bool [n]; `C`, the chosen strength; `sweep`, the held-out `top1` and `loss` of each
        strength; `n_held_out`, `n_train`, `n_val`, `classes`, `feature_dim`, `seed`, `notes`, and `per_class` if `names` are
        given.

    Raises:
        RequestError: Shapes, labels or strengths are invalid, or the training set cannot be split.
        FkdError: A feature is not finite, or too large to standardise.
    """
    train, known, wanted, truth, classes = as_probe(train_features, train_labels, features, labels, num_classes)
    if len(strengths) == 0 or min(strengths) <= 0:
        raise RequestError(f"strengths must be positive, got {list(strengths)}")

    held = held_out(known, seed=seed)
    with tqdm(total=len(strengths) + 1, desc="logreg", file=sys.stderr, disable=bar_disabled(show=progress)) as bar:
        sweep = _sweep(train, known, held, classes, sorted(strengths), bar)
        best = max(sweep, key=lambda row: (row["top1"], -row["loss"]))
        data, (mean, scale) = standardised(train, None)
        weights = minimise(data, torch.from_numpy(known), classes, best["C"])
        bar.update()
    scores = _logits(torch.from_numpy((wanted - mean.numpy()) / scale.numpy()), weights)
    rank = ranks(scores.numpy(), truth)
    edge = len(sweep) > 1 and best["C"] in (sweep[0]["C"], sweep[-1]["C"])
    return probe_result(
        rank,
        truth,
        names,
        train=train,
        features=wanted,
        classes=classes,
        notes=[f"the chosen C {best['C']:g} is the smallest or largest that was tried"] if edge else [],
        C=best["C"],
        sweep=sweep,
        n_held_out=int(held.sum()),
        seed=seed,
    )


def held_out(labels: Int64Array, *, seed: int) -> Any:
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


def minimise(
    features: torch.Tensor, labels: torch.Tensor, classes: int, strength: float, start: Weights | None = None
) -> Weights:
    """Weights [C, D] and biases [C] that minimise the mean cross-entropy plus |W|^2 / (2 `strength` N).

    Args:
        features: Standardised, float32 [N, D].
        labels: int64 [N].
        classes: C.
        strength: Inverse L2 strength; the biases are not penalised.
        start: Initial weights; zeros by default.
    """
    if start is None:
        start = torch.zeros(classes, features.shape[1]), torch.zeros(classes)
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        history_size=_HISTORY,
        tolerance_grad=_GRADIENT,
        tolerance_change=_CHANGE,
        line_search_fn="strong_wolfe",
    )
    penalty = 0.5 / (strength * len(labels))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(features @ weight.T + bias, labels) + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def _sweep(
    train: Float32Array, labels: Int64Array, held: Any, classes: int, strengths: list[float], bar: "tqdm[Any]"
) -> list[dict[str, float]]:
    rest, (mean, scale) = standardised(train, ~held)
    known, truth = torch.from_numpy(labels[~held]), labels[held]
    queries = (torch.from_numpy(train[held]) - mean) / scale
    rows = []
    weights = None
    for strength in strengths:
        weights = minimise(rest, known, classes, strength, weights)
        scores = _logits(queries, weights)
        rows.append(
            {
                "C": strength,
                "top1": accuracy(ranks(scores.numpy(), truth))["top1"],
                "loss": float(functional.cross_entropy(scores, torch.from_numpy(truth))),
            }
        )
        bar.set_postfix(C=f"{strength:g}", held_out_top1=f"{rows[-1]['top1']:.1f}")
        bar.update()
    return rows


def standardised(train: Float32Array, rows: Any) -> tuple[torch.Tensor, Weights]:
    """Features float32 of `rows` (None: all) with mean 0 and standard deviation 1, and that mean and deviation, each [D]."""
    chosen = train if rows is None else train[rows]
    mean = chosen.mean(axis=0, dtype=np.float64).astype(np.float32)
    with np.errstate(over="ignore"):
        data = chosen - mean
    deviation = np.sqrt(np.einsum("nd,nd->d", data, data, dtype=np.float64) / len(data)).astype(np.float32)
    if not np.isfinite(deviation).all():
        raise FkdError(f"train_features: values up to {np.abs(chosen).max():.3g} cannot be standardised in float32")
    # a constant dimension's deviation is rounding noise, which must not be scaled up
    scale = np.where(deviation > 1e-6 * np.abs(mean), deviation, 1.0).astype(np.float32)
    data /= scale
    return torch.from_numpy(data), (torch.from_numpy(mean), torch.from_numpy(scale))


def _logits(features: torch.Tensor, weights: Weights) -> torch.Tensor:
    return features @ weights[0].T + weights[1]
