"""Linear probes: one fully connected layer trained on a frozen backbone, on random crops.

`moco` has the settings of MoCo's main_lincls.py (He et al., CVPR 2020, arXiv 1911.05722, section 4.1),
https://github.com/facebookresearch/moco/blob/1999df86de600027cd2702cbd7cd7b7d2a53559d/main_lincls.py
Three things differ: crops are drawn by the recipe `fkd` (the defaults of torchvision's RandomResizedCrop and flip) and resized
by this project's `replay`; the features of the validation images are computed once, since the backbone is frozen; and the
headline is the last epoch, where MoCo keeps the best. The other protocols are made in the same way: `simclr` from
lightly.utils.benchmarking.LinearClassifier, which follows SimCLR (arXiv 2002.05709) except for its Nesterov momentum, and
`swav` and `simsiam` (with --lars, whose text says lr 0.02) from
https://github.com/facebookresearch/swav/blob/06b1b7cbaf6ba2a792300d79c7299db98b93b7f9/eval_linear.py
https://github.com/facebookresearch/simsiam/blob/a7bc1772896d0dad0806c51f0bb6f3b16d290468/main_lincls.py

If the batch size is larger than the training set, a batch is the whole training set. The last batch of an epoch is smaller (the
code of simclr drops it). The training loop is plain torch, since a Lightning Trainer would put the backbone into train mode.

Legend: `B` images in a batch, `N` training images, `n` images to score, `D` feature dimension, `C` classes.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.crops import RECIPES, draw, image_key
from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.eval.features import Model, checked, extract_rows, frozen, match_classes
from fkd_ssl.eval.probe import Probe, ProbeProtocol
from fkd_ssl.eval.scores import accuracy, feature_notes, few_classes, per_class
from fkd_ssl.eval.views import View, load, view
from fkd_ssl.images import ImageSource
from fkd_ssl.progress import bar_disabled

RECIPE = RECIPES["fkd"]
MAX_FORWARD = 256  # images per forward pass; larger batches are put together from several passes


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


def evaluate(*, protocol: str, **options: Any) -> dict[str, Any]:
    """Runs `evaluate_together` with one protocol."""
    return evaluate_together([protocol], **options)[protocol]


def evaluate_together(
    protocols: Sequence[str],
    *,
    model: Model,
    train: ImageSource,
    val: ImageSource,
    pixels: int,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: bool = True,
    kept: Mapping[str, Path] | None = None,
    identity: str = "",
    skipped: set[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Trains linear probes on `train` and scores them on `val`; classes are matched by folder name.

    The protocols share the passes of images through the backbone, which take nearly all of the time. Each gives the same result
    as alone, because the order and the crops of an epoch depend only on the seed.

    An `nn.Module` is in eval mode during the call (any other callable must ensure that itself), and no gradient is computed
    through it. The layers are on the device of the features.

    Args:
        protocols: Names in PROTOCOLS.
        model: uint8 [B, 3, P, P] -> float [B, D].
        train: Images to train the layers on.
        val: Images to score.
        pixels: P, the side of the random crops and of the evaluation crop.
        epochs: Replaces the protocol's; milestones are scaled in proportion.
        batch_size: Replaces the protocol's; the learning rate of simsiam and simclr is proportional to it.
        lr: Replaces the protocol's.
        seed: Seed for the initial weights, the order and the crops.
        workers: Processes that read images.
        progress: Show a progress bar on standard error.
        kept: A checkpoint file for each protocol, written after each epoch. If it exists, training continues from it, with
            the same result as without the interruption.
        identity: Identifies the model; the checkpoint of another one is refused.
        skipped: Collects the error message of each damaged image, which is left out. By default the first error is raised.

    Returns:
        For each protocol: `top1`, `top5` in percent and `correct` bool [n], all after the last epoch; `best_top1` and
        `best_epoch` (from 1), which are chosen on `val`, so they are not the headline; `history`, the `epoch`, `lr`, `images`,
        `loss`, `train_top1` (of the random crops, during training) and `top1` of each epoch;
        `protocol`, `source`, `epochs`, `batch_size`, `lr`, `momentum`, `weight_decay`, `seed`, `pixels`, `n_train`, `n_val`,
        `classes`, `feature_dim`; `per_class`; `notes`, with each change to the protocol.

    Raises:
        RequestError: A protocol is unknown, an image has no class, `train` lacks a class, a number is invalid, or a checkpoint
            is damaged or of another training.
        FkdError: An image cannot be read, or a feature or a loss is not finite.
    """
    chosen = {name: _settings(name, epochs=epochs, batch_size=batch_size, lr=lr) for name in protocols}
    if not chosen:
        raise RequestError("at least one linear protocol is needed")
    labels = match_classes(train, val)
    features, rows = extract_rows(
        model, val, pixels=pixels, workers=workers, progress=progress, desc="features of val", skipped=skipped
    )
    labels = labels[rows]
    probes = []
    for name, (protocol, _) in chosen.items():
        file = None if kept is None else kept[name]
        text = json.dumps([identity, asdict(protocol), seed, pixels, train.identity(sizes=False), val.identity(sizes=False)])
        digest = hashlib.sha256(text.encode()).hexdigest()
        probes.append(Probe(protocol, features, train, seed, file, digest))
    with frozen(model):
        _train(
            model,
            probes,
            train,
            (features, labels),
            pixels=pixels,
            seed=seed,
            workers=workers,
            progress=progress,
            skipped=skipped,
        )
    feature_warnings = feature_notes(features, None)
    if train.digest() == val.digest():
        feature_warnings.append(
            "val has the same images as train: the probe is scored on its training images; use other images"
        )
    results = {}
    for probe, (protocol, notes) in zip(probes, chosen.values(), strict=True):
        rank = probe.ranks(features, labels)
        best = max(probe.history, key=lambda row: row["top1"])
        if len(train) < protocol.batch_size:
            notes.append(
                f"the batch size {protocol.batch_size} exceeds the {len(train)} training images: each epoch is one step"
            )
        results[protocol.name] = {
            **accuracy(rank),
            "best_top1": best["top1"],
            "best_epoch": best["epoch"],
            "history": probe.history,
            "protocol": protocol.name,
            "source": protocol.source,
            "epochs": protocol.epochs,
            "batch_size": protocol.batch_size,
            "lr": protocol.lr,
            "momentum": protocol.momentum,
            "weight_decay": protocol.weight_decay,
            "seed": seed,
            "pixels": pixels,
            "n_train": probe.history[-1]["images"],
            "n_val": len(labels),
            "classes": len(train.classes),
            "feature_dim": features.shape[1],
            "per_class": per_class(rank, labels, train.classes),
            "notes": [*few_classes(len(train.classes)), *feature_warnings, *notes],
        }
    return results


def check(protocols: Sequence[str], *, epochs: int | None, batch_size: int | None, lr: float | None) -> None:
    """Raises RequestError if a protocol is unknown or a number is invalid."""
    for name in protocols:
        _settings(name, epochs=epochs, batch_size=batch_size, lr=lr)


def _settings(name: str, *, epochs: int | None, batch_size: int | None, lr: float | None) -> tuple[ProbeProtocol, list[str]]:
    """The protocol with the given settings, and a note for each change."""
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


def _train(
    model: Model,
    probes: Sequence[Probe],
    train: ImageSource,
    val: tuple[Float32Array, Int64Array],
    *,
    pixels: int,
    seed: int,
    workers: int,
    progress: bool,
    skipped: set[str] | None,
) -> None:
    """Trains all probes to their last epochs, on the same batches of features."""
    last = max(probe.protocol.epochs for probe in probes)
    learning = {
        epoch: learners
        for epoch in range(last)
        if (learners := [probe for probe in probes if len(probe.history) <= epoch < probe.protocol.epochs])
    }
    at_once = min(MAX_FORWARD, *(probe.protocol.batch_size for probe in probes))
    labels = torch.from_numpy(train.labels)
    order = _Order(len(train), list(learning), at_once, seed)
    names = ", ".join(probe.protocol.name for probe in probes)
    total, before = last * len(train), (last - len(learning)) * len(train)
    with tqdm(total=total, initial=before, unit="img", file=sys.stderr, disable=bar_disabled(show=progress)) as bar:
        batches = load(_Drawn(train, pixels, seed), order, workers=workers, skipped=skipped, bar=bar)
        for epoch, learners in learning.items():
            bar.set_description(f"{names} epoch {epoch + 1}/{last}")
            for views, indices in islice(batches, math.ceil(len(train) / at_once)):
                if not len(indices):
                    continue
                with torch.no_grad():
                    features = checked(model(views), train, indices)
                    features = features.clone()  # autograd refuses tensors made in inference mode
                target = labels[indices].to(features.device)
                for probe in learners:
                    probe.learn(features, target)
                bar.set_postfix(learners[0].so_far(), refresh=False)
                bar.update(len(indices))
            for probe in learners:
                probe.end_epoch(*val)
                if progress:
                    bar.write(_line(probe.history[-1], probe.protocol), file=sys.stderr)


def _line(row: dict[str, Any], probe: ProbeProtocol) -> str:
    return (
        f"{probe.name} epoch {row['epoch']}/{probe.epochs}: lr {row['lr']:g}, loss {row['loss']:.4f}, "
        f"train top1 {row['train_top1']:.1f}, val top1 {row['top1']:.1f}"
    )


class _Order:
    """Batches of (epoch, image): a new permutation for each epoch, in one loader for the whole training."""

    def __init__(self, images: int, epochs: Sequence[int], batch_size: int, seed: int) -> None:
        self.images, self.epochs, self.batch_size, self.seed = images, epochs, batch_size, seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(self.epochs[-1] + 1 if self.epochs else 0):
            order = torch.randperm(self.images, generator=generator)
            if epoch in self.epochs:
                for start in range(0, self.images, self.batch_size):
                    yield [(epoch, row) for row in order[start : start + self.batch_size].tolist()]


class _Drawn(Dataset[View]):
    def __init__(self, images: ImageSource, pixels: int, seed: int) -> None:
        self.images, self.pixels, self.seed = images, pixels, seed

    def __getitem__(self, key: tuple[int, int]) -> View:
        epoch, index = key
        image = image_key(self.seed, self.images.names[index])
        return view(self.images, index, self.pixels, lambda height, width: draw(RECIPE, image, height, width, epoch, 1))
