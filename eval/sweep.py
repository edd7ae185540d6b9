"""The `sweep` probe: linear layers on cached features with DINOv2's 13 learning rates, all trained at once.

dinov2/eval/linear.py (arXiv 2304.07193): SGD with momentum 0.9 and no weight decay, 13 learning rates for a batch of 256,
scaled to a batch of 1024, cosine decay to 0, weights from N(0, 0.01). Four things differ:

- The layers of all rates are one tensor, so a step is two matrix products.
- The features are those of the centre crop, without augmentation.
- They are standardised: learning rates depend on the length of the features, and only a vision transformer has a LayerNorm.
- The rate is chosen on a held-out tenth of the training set, where DINOv2 chooses on the images that it reports. The layer is
  then trained again on the whole training set.

Legend: `N` training images, `n` images to score, `D` feature dimension, `C` classes, `R` rates, `B` images in a batch.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.errors import RequestError
from fkd_ssl.eval.logreg import held_out, standardised
from fkd_ssl.eval.scores import accuracy, as_probe, probe_result, ranks
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
        `top1`, `top5` in percent; `correct` bool [n]; `lr`, the chosen rate; `sweep`, the held-out `top1` and `loss` of each
        rate (loss None if it diverged); `steps`, `batch_size`, `n_held_out`, `n_train`, `n_val`, `classes`, `feature_dim`,
        `seed`, `notes`, and `per_class` if `names` are given.

    Raises:
        RequestError: Shapes, labels or rates are invalid, the training set cannot be split, or all rates diverged.
        FkdError: A feature is not finite, or too large to standardise.
    """
    train, known, wanted, truth, classes = as_probe(train_features, train_labels, features, labels, num_classes)
    if len(rates) == 0 or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise RequestError(f"rates must be positive and finite, got {list(rates)}")

    held = held_out(known, seed=seed)
    batch = min(BATCH, len(train))
    steps = max(MIN_STEPS, math.ceil(EPOCHS * len(train) / batch))
    with tqdm(total=2 * steps, desc="sweep", unit="step", file=sys.stderr, disable=bar_disabled(show=progress)) as bar:
        rest, (mean, scale) = standardised(train, ~held)
        layers = train_layers(
            rest, torch.from_numpy(known[~held]), classes, sorted(rates), steps, seed=seed, device=device, bar=bar
        )
        del rest
        sweep = _choose((torch.from_numpy(train[held]) - mean) / scale, known[held], layers, sorted(rates))
        converged = [row for row in sweep if row["loss"] is not None]
        if not converged:
            raise RequestError(f"all rates {sorted(rates)} diverged; give lower ones")
        best = max(converged, key=lambda row: (row["top1"], -row["loss"]))
        data, (mean, scale) = standardised(train, None)
        weight, bias = train_layers(
            data, torch.from_numpy(known), classes, [best["lr"]], steps, seed=seed, device=device, bar=bar
        )
    scores = torch.from_numpy((wanted - mean.numpy()) / scale.numpy()).to(weight.device) @ weight[0].T + bias[0]
    rank = ranks(scores.cpu().numpy(), truth)
    edge = len(sweep) > 1 and best["lr"] in (sweep[0]["lr"], sweep[-1]["lr"])
    return probe_result(
        rank,
        truth,
        names,
        train=train,
        features=wanted,
        classes=classes,
        notes=[f"the chosen learning rate {best['lr']:g} is the smallest or largest that was tried"] if edge else [],
        lr=best["lr"],
        sweep=sweep,
        steps=steps,
        batch_size=batch,
        n_held_out=int(held.sum()),
        seed=seed,
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
    device: torch.device | str = "cpu",
    bar: "tqdm[Any] | None" = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [R, C, D] and biases [R, C] of one layer for each rate, from the same initial weights and batches.

    Args:
        features: Standardised, float32 [N, D].
        labels: int64 [N].
        classes: C.
        rates: For a batch of 256.
        steps: Steps of BATCH images, or of all if there are fewer.
        seed: Seed for the initial weights and the order.
        device: Where the layers are trained; the features are not moved.
        bar: Is advanced at each step.
    """
    images, dim = features.shape
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
        x, target = features[rows].to(device), labels[rows].to(device)
        error = (x @ weight.T + bias).view(batch, len(rates), classes).softmax(dim=2)
        error[torch.arange(batch, device=x.device), :, target] -= 1
        error = error.view(batch, -1) / batch
        rate = peak * (0.5 * (1 + math.cos(math.pi * step / steps)))
        speed[0].mul_(MOMENTUM).addmm_(error.T, x)
        speed[1].mul_(MOMENTUM).add_(error.sum(dim=0))
        weight -= rate[:, None] * speed[0]
        bias -= rate * speed[1]
        if bar is not None:
            bar.update()
    return weight.view(len(rates), classes, dim), bias.view(len(rates), classes)


def _choose(
    features: torch.Tensor, truth: Int64Array, layers: tuple[torch.Tensor, torch.Tensor], rates: Sequence[float]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    there = features.to(layers[0].device)
    for rate, weight, bias in zip(rates, *layers, strict=True):
        scores = (there @ weight.T + bias).cpu()
        if not scores.isfinite().all():
            rows.append({"lr": rate, "top1": 0.0, "loss": None})
            continue
        table: Float32Array = scores.numpy()
        loss = float(functional.cross_entropy(scores, torch.from_numpy(truth)))
        rows.append({"lr": rate, "top1": accuracy(ranks(table, truth))["top1"], "loss": loss})
    return rows
