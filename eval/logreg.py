"""The `logreg` probe: multinomial logistic regression on cached features, in seconds.

L-BFGS, with the L2 strength chosen on a held-out part of the training set (`held_out`), as in DINOv2's evaluation (arXiv
2304.07193). DINOv2 tries 45 strengths from 1e-6 to 1e5. Here 15 are enough, since the features are standardised; a note says if
the best one is the smallest or largest. The features are those of the centre crop, without augmentation.

On a GPU, ImageNet with a ResNet-50 (N 1.28 M, D 2048, C 1000) takes about 4 N (D + 4 C) bytes, 31 GB, and 4 N D C operations in
an iteration, 10 TFLOP: 0.2 s on an H100 in float32.

Legend: `N` training images, `n` images to score, `D` feature dimension, `C` classes.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from fkd_ssl.eval import held_out
from fkd_ssl.eval.held_out import Weights
from fkd_ssl.progress import bar_disabled

STRENGTHS = tuple(float(10 ** (power / 2)) for power in range(-10, 5))
"""Inverse L2 strengths C in scikit-learn's sense, C x sum of losses + |W|^2 / 2: 1e-5 to 100 in half decades."""
ITERATIONS = 500  # by then the accuracy has stopped changing

_GRADIENT, _CHANGE = 1e-6, 1e-9  # tolerances of L-BFGS: largest gradient, smallest step
_HISTORY = 10


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
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy on `features` of a logistic regression trained on `train_features`.

    torch's L-BFGS reaches the same optimum as scikit-learn's (a test compares them) in less time, since each strength starts
    from the weights of the previous one. It needs memory for about two more copies of the training features.

    Args:
        train_features: Array or tensor [N, D].
        train_labels: Array or tensor [N] of integers from 0.
        features: Array or tensor [n, D].
        labels: Array or tensor [n].
        num_classes: C; by default the largest training label plus one.
        names: Class names, for `per_class`.
        strengths: Inverse L2 strengths to choose from.
        seed: Seed for choosing the held-out tenth.
        device: Where the probe is trained.
        progress: Show a progress bar on standard error.

    Returns:
        `top1`, `top5` in percent; `correct` bool [n]; `C`, the chosen strength; `held_out`, the `top1` and `loss` of each
        strength on the held-out images; `n_held_out`, `n_train`, `n_val`, `classes`, `feature_dim`, `seed`, `notes`, and
        `per_class` if `names` are given.

    Raises:
        RequestError: Shapes, labels or strengths are invalid, or the training set cannot be split.
        FkdError: A feature is not finite, or too large to standardise.
    """
    with tqdm(total=len(strengths) + 1, desc="logreg", file=sys.stderr, disable=bar_disabled(show=progress)) as bar:

        def fit(data: torch.Tensor, known: torch.Tensor, classes: int, chosen: list[float]) -> Iterator[Weights]:
            weights = None
            for strength in chosen:
                weights = minimise(data, known, classes, strength, weights)
                yield weights
                bar.update()

        return held_out.evaluate(
            fit,
            strengths,
            key="C",
            data=(train_features, train_labels, features, labels, num_classes),
            names=names,
            seed=seed,
            device=device,
        )


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
        start = features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
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
