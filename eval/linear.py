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

import hashlib
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm import tqdm

from fkd_ssl import files
from fkd_ssl.crops import RECIPES, draw, image_key
from fkd_ssl.errors import FkdError, RequestError, did_you_mean
from fkd_ssl.eval.features import Model, View, check_counts, checked, extract, frozen, load, match_classes, view
from fkd_ssl.eval.scores import Float32Array, Int64Array, accuracy, few_classes, per_class, ranks
from fkd_ssl.images import ImageSet
from fkd_ssl.progress import hidden

RECIPE = RECIPES["fkd"]
WEIGHT_DEVIATION = 0.01  # of the layer's initial weights in moco, swav and simsiam; the bias starts at 0
DECAY = 0.1  # at each milestone
TRUST = 0.001  # of LARS
_SAMPLE, _NEAR = 16, 1e-2  # validation features that are kept with a layer, and how near they must come out again
MOST_AT_ONCE = 256  # images that the model gets; a larger batch is made of their features


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


def evaluate(*, protocol: str = "moco", **options: Any) -> dict[str, Any]:
    """`evaluate_together` of one protocol: its result."""
    return evaluate_together([protocol], **options)[protocol]


def evaluate_together(
    protocols: Sequence[str],
    *,
    model: Model,
    train: ImageSet,
    val: ImageSet,
    pixels: int,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: bool = True,
    kept: Mapping[str, Path] | None = None,
    identity: str = "",
) -> dict[str, dict[str, Any]]:
    """Trains linear probes on `train` and scores them on `val`; classes are matched by folder name.

    The images of an epoch, their order and their crops are drawn from the seed alone, so that several protocols learn from
    one pass of images through the backbone, which is nearly all of the work, what each would learn from a pass of its own.

    The backbone is never changed: an `nn.Module` is in eval mode throughout, any other callable sees to that itself,
    and no gradient is computed through it. The layers live on the device that the features come on.

    Args:
        protocols: Names in PROTOCOLS.
        model: uint8 [B, 3, P, P] -> float [B, D].
        train: The images that the layers learn from.
        val: The images that are scored.
        pixels: P, of the random crops and of the evaluation crop.
        epochs: Instead of a protocol's; its milestones move in proportion.
        batch_size: Instead of a protocol's; the learning rate of simsiam and simclr is published in proportion to it.
        lr: Instead of a protocol's.
        seed: Of the initial weights, the order and the crops.
        workers: Processes that decode.
        progress: Show a bar on standard error.
        kept: Of each protocol a file that holds its layer and all else after every epoch; where it is there, that
            protocol continues after its last epoch and comes to what it would have come to.
        identity: What tells model and images from others; a file of others is refused.

    Returns:
        Of each protocol: `top1`, `top5` in percent after the last epoch, the headline; `best_top1` and `best_epoch` (from 1),
        chosen on `val` and so only to be printed beside it; `correct` bool [n] after the last epoch; `history`, each epoch's
        `epoch`, `lr`, `loss`, `train_top1` (of the random crops, while learning), `top1`; `protocol`, `source`,
        `epochs`, `batch_size`, `lr`, `momentum`, `weight_decay`, `seed`, `pixels`, `n_train`, `n_val`, `classes`,
        `feature_dim`; `per_class`, top-1 of each; `notes`, among them every departure from the protocol.

    Raises:
        RequestError: An unknown protocol, an image without a class, a class that `train` lacks, a wrong number, or a kept
            file that is damaged or another training's.
        FkdError: Images or features that cannot be used, or a loss that is not finite.
    """
    chosen = {name: _settings(name, epochs=epochs, batch_size=batch_size, lr=lr) for name in protocols}
    if not chosen:
        raise RequestError("no linear protocol was asked for")
    labels = match_classes(train, val)
    features, _ = extract(model, val, pixels=pixels, workers=workers, progress=progress, desc="features of val")
    probes = []
    for name, (protocol, _) in chosen.items():
        file = None if kept is None else kept[name]
        about = json.dumps([identity, asdict(protocol), seed, pixels, train.digest(), val.digest()])
        digest = hashlib.sha256(about.encode()).hexdigest()
        probes.append(_Probe(protocol, features, train, seed, file, digest))
    with frozen(model):
        _train(model, probes, train, (features, labels), pixels=pixels, seed=seed, workers=workers, progress=progress)
    results = {}
    for probe, (protocol, notes) in zip(probes, chosen.values(), strict=True):
        rank = probe.ranks(features, labels)
        best = max(probe.history, key=lambda row: row["top1"])
        if len(train) < protocol.batch_size:
            notes.append(f"a batch of {protocol.batch_size} is all {len(train)} training images: one step an epoch")
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
            "n_train": len(train),
            "n_val": len(val),
            "classes": len(train.classes),
            "feature_dim": features.shape[1],
            "per_class": per_class(rank, labels, train.classes),
            "notes": [*few_classes(len(train.classes)), *notes],
        }
    return results


def check(protocols: Sequence[str], *, epochs: int | None, batch_size: int | None, lr: float | None) -> None:
    """Raises RequestError where a protocol is unknown, or a number impossible."""
    for name in protocols:
        _settings(name, epochs=epochs, batch_size=batch_size, lr=lr)


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
    probes: Sequence["_Probe"],
    train: ImageSet,
    val: tuple[Float32Array, Int64Array],
    *,
    pixels: int,
    seed: int,
    workers: int,
    progress: bool,
) -> None:
    """Trains every probe to its last epoch, on the same batches of features."""
    last = max(probe.protocol.epochs for probe in probes)
    learning = {
        epoch: learners
        for epoch in range(last)
        if (learners := [probe for probe in probes if len(probe.history) <= epoch < probe.protocol.epochs])
    }
    at_once = min(MOST_AT_ONCE, *(probe.protocol.batch_size for probe in probes))
    labels = torch.from_numpy(train.labels)
    batches = load(_Drawn(train, pixels, seed), _Order(len(train), list(learning), at_once, seed), workers=workers)
    names = ", ".join(probe.protocol.name for probe in probes)
    total, before = last * len(train), (last - len(learning)) * len(train)
    with tqdm(total=total, initial=before, unit="img", file=sys.stderr, disable=hidden(show=progress)) as bar:
        for epoch, learners in learning.items():
            bar.set_description(f"{names} epoch {epoch + 1}/{last}")
            seen = 0
            while seen < len(train):
                views, indices = next(batches)
                with torch.no_grad():
                    features = checked(model(views), train, indices)
                    features = features.clone()  # a model that runs in inference mode returns what autograd refuses
                target = labels[indices].to(features.device)
                for probe in learners:
                    probe.learn(features, target)
                seen += len(indices)
                bar.set_postfix(learners[0].so_far(), refresh=False)
                bar.update(len(indices))
            for probe in learners:
                probe.end_epoch(*val)
                if progress:
                    bar.write(_line(probe.history[-1], probe.protocol), file=sys.stderr)


class _Probe:
    """A layer in training: its optimiser, the features that wait until they are a batch, and what its epochs were like.

    Of features [n, D] of validation images a few are kept beside it: a function of the same name and weights that was rewritten
    gives others.
    """

    def __init__(
        self, protocol: ProbeProtocol, features: Float32Array, train: ImageSet, seed: int, file: Path | None, identity: str
    ) -> None:
        self.protocol, self.file, self.identity = protocol, file, identity
        self.sample = torch.from_numpy(features[:_SAMPLE].copy())
        self.layer = _layer(features.shape[1], len(train.classes), seed, small=protocol.small_start)
        self.history: list[dict[str, Any]] = []
        self.steps_an_epoch = math.ceil(len(train) / protocol.batch_size)
        self._momentum: list[Tensor] | None = None
        self._optimizer: torch.optim.SGD | None = None  # once the features' device is known
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._begin_epoch()
        if file is not None and file.exists():
            self._load(file)

    def learn(self, features: Tensor, target: Tensor) -> None:
        """Takes features float [B, D] and labels int64 [B], and a step for every batch that they fill up."""
        if features.shape[1] != self.layer.in_features:
            raise FkdError(
                f"the model returned {self.layer.in_features} dimensions, then {features.shape[1]}: expected one size"
            )
        self._waiting.append((features, target))
        size = self.protocol.batch_size
        while sum(len(target) for _, target in self._waiting) >= size:
            features, target = self._take()
            self._step(features[:size], target[:size])
            if len(target) > size:
                self._waiting.append((features[size:], target[size:]))

    def so_far(self) -> dict[str, str]:
        """What the progress bar says of the epoch."""
        return {"loss": f"{self._loss / max(self._seen, 1):.4f}", "top1": f"{100 * self._hits / max(self._seen, 1):.1f}"}

    def end_epoch(self, features: Float32Array, labels: Int64Array) -> None:
        """Takes the step of what still waits, scores the layer on validation features [n, D], and keeps all of it."""
        if self._waiting:
            self._step(*self._take())
        assert self._optimizer is not None
        row = {
            "epoch": len(self.history) + 1,
            "lr": self._optimizer.param_groups[0]["lr"],
            "loss": self._loss / self._seen,
            "train_top1": 100.0 * self._hits / self._seen,
            "top1": 100.0 * float((self.ranks(features, labels) < 1).mean()),
        }
        self.history.append(row)
        self._begin_epoch()
        if self.file is not None:
            kept = {
                "identity": self.identity,
                "sample": self.sample,
                "layer": {key: value.cpu() for key, value in self.layer.state_dict().items()},
                "momentum": [self._optimizer.state[part]["momentum_buffer"].cpu() for part in self.layer.parameters()],
                "history": self.history,
            }
            buffer = io.BytesIO()
            torch.save(kept, buffer)
            files.replace(self.file, buffer.getvalue())

    @torch.no_grad()
    def ranks(self, features: Float32Array, labels: Int64Array) -> Int64Array:
        """The rank of each image's own class among the layer's answers, 0 the best; int64 [n]."""
        rank = np.empty(len(labels), dtype=np.int64)
        for start in range(0, len(labels), 4096):
            rows = slice(start, start + 4096)
            scores = self.layer(torch.from_numpy(features[rows]).to(self.layer.weight.device))
            if not scores.isfinite().all():
                raise self._diverged("its last step left no finite answers")
            rank[rows] = ranks(scores.cpu().numpy(), labels[rows])
        return rank

    def _begin_epoch(self) -> None:
        self._loss, self._hits, self._seen, self._steps = 0.0, 0, 0, 0

    def _take(self) -> tuple[Tensor, Tensor]:
        features, target = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        return features, target

    def _start(self, device: torch.device) -> torch.optim.SGD:
        self.layer.to(device)
        optimizer = torch.optim.SGD(
            self.layer.parameters(),
            lr=self.protocol.lr,
            momentum=self.protocol.momentum,
            weight_decay=0.0 if self.protocol.lars else self.protocol.weight_decay,  # LARS scales it with the gradient
        )
        if self._momentum is not None:
            for part, momentum in zip(self.layer.parameters(), self._momentum, strict=True):
                optimizer.state[part]["momentum_buffer"] = momentum.to(device)
        return optimizer

    def _step(self, features: Tensor, target: Tensor) -> None:
        if self._optimizer is None:
            self._optimizer = self._start(features.device)
        done = len(self.history) * self.steps_an_epoch + self._steps
        rate = self.protocol.rate_at(done, self.protocol.epochs * self.steps_an_epoch)
        self._optimizer.param_groups[0]["lr"] = rate
        with torch.enable_grad():
            logits = self.layer(features)
            loss = functional.cross_entropy(logits, target)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        if self.protocol.lars:
            scale_gradients(self.layer, self.protocol.weight_decay)
        self._optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(
                f"loss {value}, learning rate {rate:g}, features of mean length {features.norm(dim=1).mean().item():.3g}"
            )
        self._loss += value * len(target)
        self._hits += int((logits.detach().argmax(dim=1) == target).sum())
        self._seen += len(target)
        self._steps += 1

    def _diverged(self, how: str) -> FkdError:
        return FkdError(f"the probe {self.protocol.name} diverged in epoch {len(self.history) + 1}: {how}; give a lower lr")

    def _load(self, file: Path) -> None:
        wrong = f"{file}: damaged; remove it to begin anew"
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            identity, sample, history = saved["identity"], saved["sample"], list(saved["history"])
            momentum = [part.float() for part in saved["momentum"]]
            keys = {"epoch", "lr", "loss", "train_top1", "top1"}
            whole = 0 < len(history) <= self.protocol.epochs and all(row.keys() == keys for row in history)
            if identity == self.identity and sample.shape == self.sample.shape and whole:
                self.layer.load_state_dict(saved["layer"])
                whole = [part.shape for part in momentum] == [part.shape for part in self.layer.parameters()]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise RequestError(wrong) from error
        near = sample.shape == self.sample.shape and torch.allclose(
            sample, self.sample, rtol=_NEAR, atol=_NEAR * float(sample.abs().max())
        )
        if identity != self.identity or not near:
            raise RequestError(f"{file}: of another model, other images or other settings; choose another --out, or remove it")
        if not whole:
            raise RequestError(wrong)
        self._momentum, self.history = momentum, history


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


def _line(row: dict[str, Any], probe: ProbeProtocol) -> str:
    return (
        f"{probe.name} epoch {row['epoch']}/{probe.epochs}: lr {row['lr']:g}, loss {row['loss']:.4f}, "
        f"train top1 {row['train_top1']:.1f}, val top1 {row['top1']:.1f}"
    )


class _Order:
    """Batches of (epoch, image), each epoch a fresh permutation; one loader serves the whole training."""

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
    def __init__(self, images: ImageSet, pixels: int, seed: int) -> None:
        self.images, self.pixels, self.seed = images, pixels, seed

    def __getitem__(self, key: tuple[int, int]) -> View:
        epoch, index = key
        image = image_key(self.seed, self.images.paths[index])
        return view(self.images, index, self.pixels, lambda height, width: draw(RECIPE, image, height, width, epoch, 1))
