"""The `logreg` probe: multinomial logistic regression on cached features, for when minutes count.

L-BFGS on features standardised with the training set's statistics; the L2 strength is chosen on a held-out part of the
training set and never on the images that are scored, then the probe is fitted on all of the training set. The sweep
follows DINOv2's evaluation (arXiv 2304.07193); the features are those of the centre crop, without augmentation.

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
from fkd_ssl.eval.scores import accuracy, as_probe, feature_notes, few_classes, per_class, ranks
from fkd_ssl.progress import hidden

STRENGTHS = tuple(float(10 ** (power / 2)) for power in range(-10, 5))
"""Inverse L2 strengths C as scikit-learn counts them: C x sum of losses + |W|^2 / 2; 1e-5 to 100 by half decades."""
HELD_OUT = 0.1
ITERATIONS = 500  # a fit that needs more is as good as converged: accuracy has long stopped changing

_GRADIENT, _CHANGE = 1e-6, 1e-9  # where L-BFGS stops: largest gradient, smallest step
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
    """Accuracy on `features` of a logistic regression fitted on `train_features`.

    torch's L-BFGS and not scikit-learn's: the same optimum (a test compares them) sooner, since each fit of the sweep
    starts at the last one's weights. Needs about two more copies of the training features.

    Args:
        train_features: Array or tensor [N, D].
        train_labels: Array or tensor [N] of whole numbers from 0.
        features: Array or tensor [n, D].
        labels: Array or tensor [n].
        num_classes: C; by default the largest training label plus one.
        names: Of the classes, for `per_class`.
        strengths: The inverse L2 strengths to choose from.
        seed: Of the choice of the held-out tenth.
        progress: Show a bar on standard error.

    Returns:
        `top1`, `top5` in percent; `correct` bool [n]; `C`, the chosen strength; `sweep`, for each strength the held-out
        `top1` and `loss`; `n_held_out`, `n_train`, `n_val`, `classes`, `feature_dim`, `seed`, `notes`, and `per_class` where
        there are names.

    Raises:
        RequestError: Shapes, labels or strengths that cannot be right, or a training set that cannot be split.
        FkdError: Features that are not finite, or too large to standardise.
    """
    train, known, wanted, truth, classes = as_probe(train_features, train_labels, features, labels, num_classes)
    if len(strengths) == 0 or min(strengths) <= 0:
        raise RequestError(f"strengths must be numbers above 0, got {list(strengths)}")

    held = held_out(known, seed=seed)
    with tqdm(total=len(strengths) + 1, desc="logreg", file=sys.stderr, disable=hidden(show=progress)) as bar:
        sweep = _sweep(train, known, held, classes, sorted(strengths), bar)
        best = max(sweep, key=lambda row: (row["top1"], -row["loss"]))
        data, (mean, scale) = standardised(train, None)
        weights = fit(data, torch.from_numpy(known), classes, best["C"])
        bar.update()
    scores = _logits(torch.from_numpy((wanted - mean.numpy()) / scale.numpy()), weights)
    rank = ranks(scores.numpy(), truth)
    notes = [*few_classes(classes), *feature_notes(train, wanted)]
    if len(sweep) > 1 and best["C"] in (sweep[0]["C"], sweep[-1]["C"]):
        notes.append(f"the chosen C {best['C']:g} is at the edge of the sweep")
    return {
        **accuracy(rank),
        "C": best["C"],
        "sweep": sweep,
        "n_held_out": int(held.sum()),
        "n_train": len(train),
        "n_val": len(wanted),
        "classes": classes,
        "feature_dim": train.shape[1],
        "seed": seed,
        **({} if names is None else {"per_class": per_class(rank, truth, names)}),
        "notes": notes,
    }


def held_out(labels: Int64Array, *, seed: int) -> Any:
    """Which training images the strength is chosen on: bool [N], a tenth of each class, at least one where it has two.

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
        raise RequestError("no class has two training images: none can be held out to choose the L2 strength on")
    return held


def fit(features: torch.Tensor, labels: torch.Tensor, classes: int, strength: float, start: Weights | None = None) -> Weights:
    """Weights [C, D] and biases [C] that minimise the mean cross-entropy plus |W|^2 / (2 `strength` N).

    Args:
        features: Standardised, float32 [N, D].
        labels: int64 [N].
        classes: C.
        strength: Inverse L2 strength; the biases are not penalised.
        start: Weights to start at instead of zeros.
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
        weights = fit(rest, known, classes, strength, weights)
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
    """Features float32 of `rows` (None: all) with mean 0 and deviation 1, and the mean and deviation [D] each."""
    chosen = train if rows is None else train[rows]
    mean = chosen.mean(axis=0, dtype=np.float64).astype(np.float32)
    with np.errstate(over="ignore"):
        data = chosen - mean
    deviation = np.sqrt(np.einsum("nd,nd->d", data, data, dtype=np.float64) / len(data)).astype(np.float32)
    if not np.isfinite(deviation).all():
        raise FkdError(f"train_features: values up to {np.abs(chosen).max():.3g} cannot be standardised in float32")
    # a dead dimension has rounding noise for a deviation: dividing by it would blow that up
    scale = np.where(deviation > 1e-6 * np.abs(mean), deviation, 1.0).astype(np.float32)
    data /= scale
    return torch.from_numpy(data), (torch.from_numpy(mean), torch.from_numpy(scale))


def _logits(features: torch.Tensor, weights: Weights) -> torch.Tensor:
    return features @ weights[0].T + weights[1]
