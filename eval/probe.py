"""A linear probe trained on batches of features of any size: its protocol, its steps and its checkpoint.

Legend: `B` images in a batch, `n` images to score, `D` feature dimension.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fkd_ssl import checkpoints, files
from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.errors import FkdError, ImageError, RequestError
from fkd_ssl.eval.features import check_counts
from fkd_ssl.eval.scores import ranks
from fkd_ssl.images import ImageSource

WEIGHT_DEVIATION = 0.01  # of the layer's initial weights in moco, swav and simsiam; the bias starts at 0
DECAY = 0.1  # at each milestone
TRUST = 0.001  # trust coefficient of LARS
_SAMPLE, _TOLERANCE = 16, 1e-2  # validation features in a checkpoint, and their tolerance in a resumed run


@dataclass(frozen=True, kw_only=True)
class ProbeProtocol:
    """How a linear probe is trained."""

    name: str
    """Its name in PROTOCOLS."""
    source: str
    """Where its settings are published."""
    epochs: int
    """Passes over the training set."""
    batch_size: int
    """Images per step; the last batch of an epoch is smaller."""
    lr: float
    """Learning rate of SGD in the first epoch, for that batch size."""
    lr_follows_batch: bool = False
    """Whether the learning rate is proportional to the batch size."""
    momentum: float = 0.9
    """Momentum of SGD, not Nesterov's."""
    weight_decay: float = 0.0
    """Weight decay of SGD."""
    milestones: tuple[int, ...] = ()
    """Epochs, from 0, at which the learning rate drops to a tenth; cosine decay if empty."""
    every_step: bool = False
    """Whether the cosine changes at each step and ends at a thousandth, as in lightly; otherwise at each epoch, towards 0."""
    lars: bool = False
    """Whether to scale each gradient to TRUST times the length of its tensor (apex's LARC without clipping)."""
    small_start: bool = True
    """Whether to initialise weights from N(0, 0.01) and biases with 0; otherwise as torch.nn.Linear does."""

    def __post_init__(self) -> None:
        check_counts(epochs=self.epochs, batch_size=self.batch_size)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise RequestError(f"lr must be positive, got {self.lr}")

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        if self.milestones:
            return self.lr * DECAY ** sum(epoch >= milestone for milestone in self.milestones)
        return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of `steps` in total."""
        if not self.every_step:
            return self.rate(step * self.epochs // steps)
        done = step / (steps - 1) if steps > 1 else 1.0
        return self.lr * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * done)))


class Probe:
    """A layer in training: its optimiser, the features that wait for a full batch, and the history of its epochs.

    The checkpoint contains some validation features, so that a model whose code changed between two runs is detected.
    """

    def __init__(
        self, protocol: ProbeProtocol, features: Float32Array, train: ImageSource, seed: int, file: Path | None, identity: str
    ) -> None:
        self.protocol, self.file, self.identity = protocol, file, identity
        self.sample = torch.from_numpy(features[:_SAMPLE].copy())
        self.layer = initial_layer(features.shape[1], len(train.classes), seed, small=protocol.small_start)
        self.history: list[dict[str, Any]] = []
        self.steps_per_epoch = math.ceil(len(train) / protocol.batch_size)
        self._momentum: list[Tensor] | None = None
        self._optimizer: torch.optim.SGD | None = None  # once the features' device is known
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._begin_epoch()
        if file is not None and file.exists():
            self._load(file)

    def learn(self, features: Tensor, target: Tensor) -> None:
        """Adds features float [B, D] and labels int64 [B], and takes a step for each full batch."""
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
        """Loss and top-1 of the epoch so far, for the progress bar."""
        return {"loss": f"{self._loss / max(self._seen, 1):.4f}", "top1": f"{100 * self._hits / max(self._seen, 1):.1f}"}

    def end_epoch(self, features: Float32Array, labels: Int64Array) -> None:
        """Takes the last step of an epoch, scores the layer on validation features [n, D], and writes the checkpoint."""
        if self._waiting:
            self._step(*self._take())
        if not self._seen:
            raise ImageError("none of the training images can be read")
        assert self._optimizer is not None
        row = {
            "epoch": len(self.history) + 1,
            "lr": self._optimizer.param_groups[0]["lr"],
            "images": self._seen,
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
        """The rank of each image's class by the layer's scores, 0 for the highest: int64 [n]."""
        rank = np.empty(len(labels), dtype=np.int64)
        for start in range(0, len(labels), 4096):
            rows = slice(start, start + 4096)
            scores = self.layer(torch.from_numpy(features[rows]).to(self.layer.weight.device))
            if not scores.isfinite().all():
                raise self._diverged("its scores are not finite")
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
        done = len(self.history) * self.steps_per_epoch + self._steps
        rate = self.protocol.rate_at(done, self.protocol.epochs * self.steps_per_epoch)
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
        wrong = f"{file}: damaged; delete it to train from the start"
        try:
            saved = checkpoints.load(file)
            identity, sample, history = saved["identity"], saved["sample"], list(saved["history"])
            momentum = [part.float() for part in saved["momentum"]]
            keys = {"epoch", "lr", "images", "loss", "train_top1", "top1"}
            whole = 0 < len(history) <= self.protocol.epochs and all(row.keys() == keys for row in history)
            if identity == self.identity and sample.shape == self.sample.shape and whole:
                self.layer.load_state_dict(saved["layer"])
                whole = [part.shape for part in momentum] == [part.shape for part in self.layer.parameters()]
        except Exception as error:  # torch raises many kinds of errors for damaged files
            raise RequestError(wrong) from error
        near = sample.shape == self.sample.shape and torch.allclose(
            sample, self.sample, rtol=_TOLERANCE, atol=_TOLERANCE * float(sample.abs().max())
        )
        if identity != self.identity or not near:
            raise RequestError(
                f"{file}: made with another model, other images or other settings; choose another --out, or delete it"
            )
        if not whole:
            raise RequestError(wrong)
        self._momentum, self.history = momentum, history


@torch.no_grad()
def scale_gradients(layer: nn.Module, weight_decay: float = 0.0, *, epsilon: float = 1e-8) -> None:
    """LARS as in apex's LARC without clipping: scales each gradient to TRUST times the length of its tensor.

    You et al., arXiv 1708.03888, equation 6. A tensor or gradient of zeros, such as the initial bias, is not changed. lightly's
    LARS cannot be used: it does not scale tensors without weight decay, which are all tensors of this layer.
    """
    for part in layer.parameters():
        assert part.grad is not None
        length, slope = part.norm(), part.grad.norm()
        if length > 0 and slope > 0:
            part.grad.add_(part, alpha=weight_decay).mul_(TRUST * length / (slope + weight_decay * length + epsilon))


def initial_layer(dim: int, classes: int, seed: int, *, small: bool = True) -> nn.Linear:
    """Makes a layer. Its weights are drawn from N(0, WEIGHT_DEVIATION) and its bias is 0; without `small`, as in nn.Linear."""
    layer = nn.Linear(dim, classes, device="meta").to_empty(device="cpu")  # does not use the global generator
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if small:
            layer.weight.normal_(mean=0.0, std=WEIGHT_DEVIATION, generator=generator)
            layer.bias.zero_()
        else:
            for part in (layer.weight, layer.bias):
                part.uniform_(-1 / math.sqrt(dim), 1 / math.sqrt(dim), generator=generator)
    return layer
