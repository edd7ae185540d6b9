"""Linear probes: one fully connected layer trained on a frozen backbone, on random crops.

`moco` is main_lincls.py of MoCo (He et al., CVPR 2020, arXiv 1911.05722, section 4.1), setting by setting:
https://github.com/facebookresearch/moco/blob/main/main_lincls.py. Three things are made otherwise: crops are drawn by
the recipe `fkd` (the defaults of torchvision's RandomResizedCrop and flip) and resized by this project's `replay`; the
validation images' features are computed once, which a frozen backbone allows; and the last epoch is the headline,
beside which MoCo would keep the best. The others are made the same way from
`swav` https://github.com/facebookresearch/swav/blob/main/eval_linear.py,
`simsiam` https://github.com/facebookresearch/simsiam/blob/main/main_lincls.py with --lars (whose text says lr 0.02), and
`simclr` lightly.utils.benchmarking.LinearClassifier, which follows SimCLR (arXiv 2002.05709) but for its Nesterov momentum.
A batch above the training set is the training set; the last one of an epoch is smaller, where simclr would drop it.

The training loop is plain torch: it is one layer whose input needs no gradient, and a Trainer would put the backbone
into train mode.

Legend: `B` images in a batch, `N` training images, `n` images to score, `D` feature dimension, `C` classes.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm import tqdm

from fkd_ssl.crops import RECIPES, draw, image_key
from fkd_ssl.errors import FkdError, RequestError, did_you_mean
from fkd_ssl.eval.features import Model, View, check_counts, checked, extract, frozen, load, match_classes, view
from fkd_ssl.eval.scores import Int64Array, accuracy, few_classes, per_class, ranks
from fkd_ssl.images import ImageSet
from fkd_ssl.progress import hidden

RECIPE = RECIPES["fkd"]
WEIGHT_DEVIATION = 0.01  # of the layer's initial weights in moco, swav and simsiam; the bias starts at 0
DECAY = 0.1  # at each milestone
TRUST = 0.001  # of LARS


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol:
    """How a linear probe is trained."""

    name: str
    """Its name in PROTOCOLS."""
    source: str
    """Where its settings are published."""
    epochs: int
    """Sweeps over the training set."""
    batch_size: int
    """Images a step; the last batch of an epoch is smaller."""
    lr: float
    """Learning rate of SGD in the first epoch, for that batch size."""
    lr_follows_batch: bool = False
    """Whether it is published in proportion to the batch size."""
    momentum: float = 0.9
    """Of SGD, without Nesterov's."""
    weight_decay: float = 0.0
    """Of SGD."""
    milestones: tuple[int, ...] = ()
    """Epochs, from 0, at which the rate falls to a tenth; none: half a cosine."""
    every_step: bool = False
    """Whether the cosine moves every step, down to a thousandth (lightly's), and not every epoch towards 0."""
    lars: bool = False
    """Whether each tensor's gradient is scaled to TRUST of its own length (LARC of apex, without clipping)."""
    small_start: bool = True
    """Whether weights start at N(0, 0.01) and biases at 0, or as torch's Linear does."""

    def __post_init__(self) -> None:
        check_counts(epochs=self.epochs, batch_size=self.batch_size)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise RequestError(f"lr must be above 0, got {self.lr}")

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, from 0."""
        if self.milestones:
            return self.lr * DECAY ** sum(epoch >= milestone for milestone in self.milestones)
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of `steps` in all."""
        if not self.every_step:
            return self.rate(step * self.epochs // steps)
        done = step / (steps - 1) if steps > 1 else 1.0
        return self.lr * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * done)))


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        ProbeProtocol(
            name="moco",
            source="MoCo, arXiv 1911.05722, main_lincls.py",
            epochs=100,
            batch_size=256,
            lr=30.0,
            milestones=(60, 80),
        ),
        ProbeProtocol(
            name="swav",
            source="SwAV, arXiv 2006.09882, eval_linear.py",
            epochs=100,
            batch_size=256,
            lr=0.3,
            weight_decay=1e-6,
        ),
        ProbeProtocol(
            name="simsiam",
            source="SimSiam, arXiv 2011.10566, main_lincls.py --lars",
            epochs=90,
            batch_size=4096,
            lr=0.1 * 4096 / 256,
            lr_follows_batch=True,
            lars=True,
        ),
        ProbeProtocol(
            name="simclr",
            source="SimCLR, arXiv 2002.05709, lightly.utils.benchmarking.LinearClassifier",
            epochs=90,
            batch_size=256,
            lr=0.1,
            lr_follows_batch=True,
            every_step=True,
            small_start=False,
        ),
    )
}


def evaluate(
    *,
    model: Model,
    train: ImageSet,
    val: ImageSet,
    pixels: int,
    protocol: str = "moco",
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a linear probe on `train` and scores it on `val`; classes are matched by folder name.

    The backbone is never changed: an `nn.Module` is in eval mode throughout, any other callable sees to that itself,
    and no gradient is computed through it. The layer lives on the device that the features come on.

    Args:
        model: uint8 [B, 3, P, P] -> float [B, D].
        train: The images that the layer learns from.
        val: The images that are scored.
        pixels: P, of the random crops and of the evaluation crop.
        protocol: Name in PROTOCOLS.
        epochs: Instead of the protocol's; its milestones move in proportion.
        batch_size: Instead of the protocol's; the learning rate of simsiam and simclr is published in proportion to it.
        lr: Instead of the protocol's.
        seed: Of the initial weights, the order and the crops.
        workers: Processes that decode.
        progress: Show a bar on standard error.

    Returns:
        `top1`, `top5` in percent after the last epoch, the headline; `best_top1` and `best_epoch` (from 1), chosen on
        `val` and so only to be printed beside it; `correct` bool [n] after the last epoch; `history`, each epoch's
        `epoch`, `lr`, `loss`, `train_top1` (of the random crops, while learning), `top1`; `protocol`, `source`,
        `epochs`, `batch_size`, `lr`, `momentum`, `weight_decay`, `seed`, `pixels`, `n_train`, `n_val`, `classes`,
        `feature_dim`; `per_class`, top-1 of each; `notes`, among them every departure from the protocol.

    Raises:
        RequestError: An unknown protocol, an image without a class, a class that `train` lacks, or a wrong number.
        FkdError: Images or features that cannot be used, or a loss that is not finite.
    """
    probe, notes = _settings(protocol, epochs=epochs, batch_size=batch_size, lr=lr)
    labels = match_classes(train, val)
    classes = len(train.classes)
    features, _ = extract(
        model,
        val,
        pixels=pixels,
        batch_size=probe.batch_size,
        workers=workers,
        progress=progress,
        desc="features of val",
    )
    if len(train) < probe.batch_size:
        notes.append(f"a batch of {probe.batch_size} is all {len(train)} training images: one step an epoch")
    layer = _layer(features.shape[1], classes, seed, small=probe.small_start)
    history = []
    rank = np.empty(0, dtype=np.int64)
    with (
        frozen(model),
        tqdm(total=probe.epochs * len(train), unit="img", file=sys.stderr, disable=hidden(show=progress)) as bar,
    ):
        for row in _train(model, layer, train, probe, pixels=pixels, seed=seed, workers=workers, bar=bar):
            rank = _ranks(layer, features, labels)
            history.append({**row, "top1": 100.0 * float((rank < 1).mean())})
            if progress:
                bar.write(_line(history[-1], probe), file=sys.stderr)
    best = max(history, key=lambda row: row["top1"])
    return {
        **accuracy(rank),
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
        "history": history,
        "protocol": probe.name,
        "source": probe.source,
        "epochs": probe.epochs,
        "batch_size": probe.batch_size,
        "lr": probe.lr,
        "momentum": probe.momentum,
        "weight_decay": probe.weight_decay,
        "seed": seed,
        "pixels": pixels,
        "n_train": len(train),
        "n_val": len(val),
        "classes": classes,
        "feature_dim": features.shape[1],
        "per_class": per_class(rank, labels, train.classes),
        "notes": [*few_classes(classes), *notes],
    }


def _settings(name: str, *, epochs: int | None, batch_size: int | None, lr: float | None) -> tuple[ProbeProtocol, list[str]]:
    """The protocol with what was given instead, and a note for each departure."""
    if name not in PROTOCOLS:
        raise RequestError(f"no linear protocol {name!r} (known: {', '.join(PROTOCOLS)}){did_you_mean(name, PROTOCOLS)}")
    preset = PROTOCOLS[name]
    notes = []
    chosen: dict[str, Any] = {}
    for key, value in (("epochs", epochs), ("batch_size", batch_size), ("lr", lr)):
        if value is not None and value != getattr(preset, key):
            chosen[key] = value
            notes.append(f"departs from the {name} protocol: {key} {value} instead of {getattr(preset, key)}")
    if "batch_size" in chosen and lr is None and preset.lr_follows_batch:
        chosen["lr"] = preset.lr * chosen["batch_size"] / preset.batch_size
    if "epochs" in chosen and preset.milestones:
        share = chosen["epochs"] / preset.epochs
        chosen["milestones"] = tuple(round(milestone * share) for milestone in preset.milestones)
    return replace(preset, **chosen), notes


def _layer(dim: int, classes: int, seed: int, *, small: bool = True) -> nn.Linear:
    layer = nn.Linear(dim, classes, device="meta").to_empty(device="cpu")  # draws nothing from the global generator
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if small:
            layer.weight.normal_(mean=0.0, std=WEIGHT_DEVIATION, generator=generator)
            layer.bias.zero_()
        else:
            for part in (layer.weight, layer.bias):
                part.uniform_(-1 / math.sqrt(dim), 1 / math.sqrt(dim), generator=generator)
    return layer


def _train(
    model: Model,
    layer: nn.Linear,
    train: ImageSet,
    probe: ProbeProtocol,
    *,
    pixels: int,
    seed: int,
    workers: int,
    bar: "tqdm[Any]",
) -> Iterator[dict[str, Any]]:
    """Trains `layer` and yields after every epoch what it was like."""
    optimizer: torch.optim.SGD | None = None
    labels = torch.from_numpy(train.labels)
    batches = load(_Drawn(train, pixels, seed), _Order(len(train), probe, seed), workers=workers)
    steps, step = probe.epochs * math.ceil(len(train) / probe.batch_size), 0
    for epoch in range(probe.epochs):
        bar.set_description(f"{probe.name} epoch {epoch + 1}/{probe.epochs}")
        loss_sum, hits, seen = 0.0, 0, 0
        while seen < len(train):
            views, indices = next(batches)
            with torch.no_grad():
                features = checked(model(views), train, indices)
                features = features.clone()  # a model that runs in inference mode returns what autograd refuses
            if features.shape[1] != layer.in_features:
                raise FkdError(
                    f"the model returned {layer.in_features} dimensions, then {features.shape[1]}: expected one size"
                )
            if optimizer is None:
                layer.to(features.device)
                optimizer = torch.optim.SGD(
                    layer.parameters(),
                    lr=probe.lr,
                    momentum=probe.momentum,
                    weight_decay=0.0 if probe.lars else probe.weight_decay,  # LARS scales it with the gradient
                )
            rate = optimizer.param_groups[0]["lr"] = probe.rate_at(step, steps)
            step += 1
            target = labels[indices].to(features.device)
            with torch.enable_grad():
                logits = layer(features)
                loss = functional.cross_entropy(logits, target)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            if probe.lars:
                scale_gradients(layer, probe.weight_decay)
            optimizer.step()
            value = loss.item()
            if not math.isfinite(value):
                raise FkdError(
                    f"the probe diverged in epoch {epoch + 1}: loss {value}, learning rate {rate:g}, "
                    f"features of mean length {features.norm(dim=1).mean().item():.3g}; give a lower lr"
                )
            loss_sum += value * len(target)
            hits += int((logits.detach().argmax(dim=1) == target).sum())
            seen += len(target)
            bar.set_postfix(loss=f"{loss_sum / seen:.4f}", top1=f"{100 * hits / seen:.1f}", refresh=False)
            bar.update(len(target))
        yield {"epoch": epoch + 1, "lr": rate, "loss": loss_sum / seen, "train_top1": 100.0 * hits / seen}


@torch.no_grad()
def scale_gradients(layer: nn.Module, weight_decay: float = 0.0, *, epsilon: float = 1e-8) -> None:
    """LARS as apex's LARC without clipping makes it of SGD: a gradient becomes TRUST times as long as its tensor.

    You et al., arXiv 1708.03888, equation 6. A tensor or gradient of zeros, as the bias is at first, is left alone.
    lightly's LARS will not do: it leaves alone whatever has no weight decay, which is all of this layer.
    """
    for part in layer.parameters():
        assert part.grad is not None
        length, slope = part.norm(), part.grad.norm()
        if length > 0 and slope > 0:
            part.grad.add_(part, alpha=weight_decay).mul_(TRUST * length / (slope + weight_decay * length + epsilon))


@torch.no_grad()
def _ranks(layer: nn.Linear, features: Any, labels: Int64Array) -> Int64Array:
    rank = np.empty(len(labels), dtype=np.int64)
    for start in range(0, len(labels), 4096):
        rows = slice(start, start + 4096)
        scores = layer(torch.from_numpy(features[rows]).to(layer.weight.device))
        rank[rows] = ranks(scores.cpu().numpy(), labels[rows])
    return rank


def _line(row: dict[str, Any], probe: ProbeProtocol) -> str:
    return (
        f"{probe.name} epoch {row['epoch']}/{probe.epochs}: lr {row['lr']:g}, loss {row['loss']:.4f}, "
        f"train top1 {row['train_top1']:.1f}, val top1 {row['top1']:.1f}"
    )


class _Order:
    """Batches of (epoch, image) through all epochs, each a fresh permutation; one loader serves the whole training."""

    def __init__(self, images: int, probe: ProbeProtocol, seed: int) -> None:
        self.images, self.probe, self.seed = images, probe, seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(self.probe.epochs):
            order = torch.randperm(self.images, generator=generator)
            for start in range(0, self.images, self.probe.batch_size):
                yield [(epoch, row) for row in order[start : start + self.probe.batch_size].tolist()]


class _Drawn(Dataset[View]):
    def __init__(self, images: ImageSet, pixels: int, seed: int) -> None:
        self.images, self.pixels, self.seed = images, pixels, seed

    def __getitem__(self, key: tuple[int, int]) -> View:
        epoch, index = key
        image = image_key(self.seed, self.images.paths[index])
        return view(self.images, index, self.pixels, lambda height, width: draw(RECIPE, image, height, width, epoch, 1))
