"""Linear probes: one fully connected layer trained on a frozen backbone, on random crops.

`moco` is main_lincls.py of MoCo (He et al., CVPR 2020, arXiv 1911.05722, section 4.1), setting by setting:
https://github.com/facebookresearch/moco/blob/main/main_lincls.py. Three things are made otherwise: crops are drawn by
the recipe `fkd` (the defaults of torchvision's RandomResizedCrop and flip) and resized by this project's `replay`; the
validation images' features are computed once, which a frozen backbone allows; and the last epoch is the headline,
beside which MoCo would keep the best. `swav` is SwAV's eval_linear.py: https://github.com/facebookresearch/swav/blob/main/eval_linear.py.

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
from fkd_ssl.eval.scores import Int64Array, accuracy, few_classes, ranks
from fkd_ssl.images import ImageSet
from fkd_ssl.progress import hidden

RECIPE = RECIPES["fkd"]
WEIGHT_DEVIATION = 0.01  # of the layer's initial weights, in all of the protocols here; the bias starts at 0
DECAY = 0.1  # at each milestone


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
    """Learning rate of SGD in the first epoch."""
    momentum: float = 0.9
    """Of SGD, without Nesterov's."""
    weight_decay: float = 0.0
    """Of SGD."""
    milestones: tuple[int, ...] = ()
    """Epochs, from 0, at which the rate falls to a tenth; none: half a cosine, one step an epoch."""

    def __post_init__(self) -> None:
        check_counts(epochs=self.epochs, batch_size=self.batch_size)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise RequestError(f"lr must be above 0, got {self.lr}")

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, from 0."""
        if self.milestones:
            return self.lr * DECAY ** sum(epoch >= milestone for milestone in self.milestones)
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


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
        batch_size: Instead of the protocol's; the learning rate is not scaled with it.
        lr: Instead of the protocol's.
        seed: Of the initial weights, the order and the crops.
        workers: Processes that decode.
        progress: Show a bar on standard error.

    Returns:
        `top1`, `top5` in percent after the last epoch, the headline; `best_top1` and `best_epoch` (from 1), chosen on
        `val` and so only to be printed beside it; `correct` bool [n] after the last epoch; `history`, each epoch's
        `epoch`, `lr`, `loss`, `train_top1` (of the random crops, while learning), `top1`; `protocol`, `source`,
        `epochs`, `batch_size`, `lr`, `momentum`, `weight_decay`, `seed`, `pixels`, `n_train`, `n_val`, `classes`,
        `feature_dim`; `notes`, among them every departure from the protocol.

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
    layer = _layer(features.shape[1], classes, seed)
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
    if "epochs" in chosen and preset.milestones:
        share = chosen["epochs"] / preset.epochs
        chosen["milestones"] = tuple(round(milestone * share) for milestone in preset.milestones)
    return replace(preset, **chosen), notes


def _layer(dim: int, classes: int, seed: int) -> nn.Linear:
    layer = nn.Linear(dim, classes, device="meta").to_empty(device="cpu")  # draws nothing from the global generator
    with torch.no_grad():
        layer.weight.normal_(mean=0.0, std=WEIGHT_DEVIATION, generator=torch.Generator().manual_seed(seed))
        layer.bias.zero_()
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
                    layer.parameters(), lr=probe.lr, momentum=probe.momentum, weight_decay=probe.weight_decay
                )
            optimizer.param_groups[0]["lr"] = probe.rate(epoch)
            target = labels[indices].to(features.device)
            with torch.enable_grad():
                logits = layer(features)
                loss = functional.cross_entropy(logits, target)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            value = loss.item()
            if not math.isfinite(value):
                raise FkdError(
                    f"the probe diverged in epoch {epoch + 1}: loss {value}, learning rate {probe.rate(epoch):g}, "
                    f"features of mean length {features.norm(dim=1).mean().item():.3g}; give a lower lr"
                )
            loss_sum += value * len(target)
            hits += int((logits.detach().argmax(dim=1) == target).sum())
            seen += len(target)
            bar.set_postfix(loss=f"{loss_sum / seen:.4f}", top1=f"{100 * hits / seen:.1f}", refresh=False)
            bar.update(len(target))
        yield {"epoch": epoch + 1, "lr": probe.rate(epoch), "loss": loss_sum / seen, "train_top1": 100.0 * hits / seen}


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
