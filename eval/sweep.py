"""The `sweep` probe: linear layers on cached features with DINOv2's 13 learning rates, all trained at once.

dinov2/eval/linear.py (arXiv 2304.07193): SGD with momentum 0.9 and no weight decay, 13 learning rates for a batch of 256,
scaled to a batch of 1024, cosine decay to 0, weights from N(0, 0.01). Five things differ:

- The layers of all rates are one tensor, so a step is two matrix products.
- The features are those of the centre crop, without augmentation.
- They are standardised, since the best learning rate depends on their length. DINOv2's features come from a LayerNorm.
- The rate is chosen on a held-out tenth of the training set, where DINOv2 chooses on the images that it reports. The layer is
  then trained again on the whole training set.
- The features are the model's. DINOv2 also tries the last 1 or 4 blocks, with and without the mean of the patch tokens.

Legend: `N` training images, `n` images to score, `D` feature dimension, `C` classes, `R` rates, `B` images in a batch.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from fkd_ssl.eval import held_out
from fkd_ssl.eval.held_out import Weights
from fkd_ssl.progress import bar_disabled

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""DINOv2's learning rates, for a batch of 256."""
BATCH = 1024
EPOCHS = 10
MIN_STEPS = 2000  # for small training sets, where ten epochs are few steps
MOMENTUM = 0.9

_START = 0.01


def evaluate(
    *,
    train_features: Any,
    train_labels: Any,
    features: Any,
    labels: Any,
    num_classes: int | None = None,
    names: Sequence[str] | None = None,
    rates: Sequence[float] = RATES,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy on `features` of a linear layer trained on `train_features` with the best of several learning rates.

    Args:
        train_features: Array or tensor [N, D].
        train_labels: Array or tensor [N] of integers from 0.
        features: Array or tensor [n, D].
        labels: Array or tensor [n].
        num_classes: C; by default the largest training label plus one.
        names: Class names, for `per_class`.
        rates: Learning rates to choose from, for a batch of 256.
        seed: Seed for the held-out tenth, the initial weights and the order.
        device: Where the layers are trained.
        progress: Show a progress bar on standard error.

    Returns:
        `top1`, `top5` in percent; `correct` bool [n]; `lr`, the chosen rate; `held_out`, the `top1` and `loss` of each rate on
        the held-out images (loss None if it diverged); `steps`, `batch_size`, `n_held_out`, `n_train`, `n_val`, `classes`,
        `feature_dim`, `seed`, `notes`, and `per_class` if `names` are given.

    Raises:
        RequestError: Shapes, labels or rates are invalid, the training set cannot be split, or all rates diverged.
        FkdError: A feature is not finite, or too large to standardise.
    """
    images = len(train_labels)
    batch = min(BATCH, images)
    steps = max(MIN_STEPS, math.ceil(EPOCHS * images / batch)) if images else 0
    with tqdm(total=2 * steps, desc="sweep", unit="step", file=sys.stderr, disable=bar_disabled(show=progress)) as bar:

        def fit(data: torch.Tensor, known: torch.Tensor, classes: int, chosen: list[float]) -> Iterator[Weights]:
            yield from zip(*train_layers(data, known, classes, chosen, steps, seed=seed, bar=bar), strict=True)

        return held_out.evaluate(
            fit,
            rates,
            key="lr",
            data=(train_features, train_labels, features, labels, num_classes),
            names=names,
            seed=seed,
            device=device,
            steps=steps,
            batch_size=batch,
        )


@torch.no_grad()
def train_layers(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    rates: Sequence[float],
    steps: int,
    *,
    seed: int,
    bar: "tqdm[Any] | None" = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [R, C, D] and biases [R, C] of one layer for each rate, from the same initial weights and batches.

    Args:
        features: Standardised, float32 [N, D]; the layers are trained on their device.
        labels: int64 [N].
        classes: C.
        rates: For a batch of 256.
        steps: Number of steps; each uses BATCH images, or all if there are fewer.
        seed: Seed for the initial weights and the order.
        bar: Is advanced at each step.
    """
    images, dim = features.shape
    device = features.device
    batch = min(BATCH, images)
    generator = torch.Generator().manual_seed(seed)
    first = torch.empty(classes, dim).normal_(0, _START, generator=generator)
    weight = first.repeat(len(rates), 1).to(device)  # [R C, D]
    bias = torch.zeros(len(rates) * classes, device=device)
    peak = torch.tensor(rates, dtype=torch.float32, device=device).repeat_interleave(classes) * batch / 256
    speed = torch.zeros_like(weight), torch.zeros_like(bias)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(images, generator=generator)])
        rows, order = order[:batch], order[batch:]
        rows = rows.to(device)
        x, target = features[rows], labels[rows]
        error = (x @ weight.T + bias).view(batch, len(rates), classes).softmax(dim=2)
        error[torch.arange(batch, device=device), :, target] -= 1
        error = error.view(batch, -1) / batch
        rate = peak * (0.5 * (1 + math.cos(math.pi * step / steps)))
        speed[0].mul_(MOMENTUM).addmm_(error.T, x)
        speed[1].mul_(MOMENTUM).add_(error.sum(dim=0))
        weight -= rate[:, None] * speed[0]
        bias -= rate * speed[1]
        if bar is not None:
            bar.update()
    return weight.view(len(rates), classes, dim), bias.view(len(rates), classes)
