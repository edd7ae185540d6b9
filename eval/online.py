"""kNN and a linear probe while anything trains: Lightning callbacks for any LightningModule.

Both look at what the module computes anyway: they take features out of its own forward pass by a hook on a submodule, so
nothing is computed twice and the module's code stays as it is. `OnlineKNN` keeps the training epoch's last features as
neighbours and scores the validation batches; `OnlineLinear` trains one layer on detached features with an optimiser of its
own, so no gradient reaches the module.

Legend: `B` images in a batch, `D` feature dimension, `C` classes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval import knn
from fkd_ssl.eval.probe import WEIGHT_DEVIATION

Labels = Callable[[Any], Tensor]


def second(batch: Any) -> Tensor:
    """The labels of a batch (images, labels, ...), as torchvision's and lightly's data sets give it."""
    labels: Tensor = batch[1]
    return labels


class _Watching(pl.Callback):
    """Sees the features of each batch: the output of submodule `module`, and of several views the first B rows.

    Args:
        module: Name of a submodule of the LightningModule, as in `named_modules`, whose output is the features.
        labels: A batch to its labels, int64 [B].
    """

    def __init__(self, module: str = "backbone", *, labels: Labels = second) -> None:
        self.module, self.labels = module, labels
        self._seen: Tensor | None = None
        self._hook: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watches the submodule; raises RequestError where the module has none of that name."""
        parts = dict(pl_module.named_modules())
        if self.module not in parts:
            raise RequestError(
                f"{type(pl_module).__name__} has no submodule {self.module!r}; it has {', '.join(list(parts)[1:9])}, ..."
            )
        self._hook = parts[self.module].register_forward_hook(self._see)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watches no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._seen is None:  # of several views the first
            self._seen = output

    def _taken(self, batch: Any) -> tuple[Tensor, Tensor] | None:
        """Detached features float32 [B, D] of the batch and its labels [B]; None where the module did not run."""
        seen, self._seen = self._seen, None
        if seen is None:
            return None
        labels = self.labels(batch)
        if not isinstance(seen, Tensor):
            raise FkdError(f"{self.module} returned a {type(seen).__name__}, expected a tensor of features")
        features = seen.detach().float().flatten(1)
        if len(features) % len(labels):
            raise FkdError(f"{self.module} returned {len(features)} features for {len(labels)} labels")
        return features[: len(labels)], labels.to(features.device)


class OnlineKNN(_Watching):
    """Logs `knn_top1` of every validation epoch: its images against the features of the training epoch before it.

    The neighbours are features as training saw them, augmented and of weights that were changing: lower than `fkd-ssl knn`
    by a little, and free. The sanity check and a validation before any training log nothing.

    Args:
        module: Name of the submodule whose output is the features.
        k: Neighbours.
        temperature: T.
        most: Training features that are kept, the latest; 0 for all.
        labels: A batch to its labels.
    """

    def __init__(
        self,
        module: str = "backbone",
        *,
        k: int = knn.K,
        temperature: float = knn.TEMPERATURE,
        most: int = 50_000,
        labels: Labels = second,
    ) -> None:
        super().__init__(module, labels=labels)
        knn.check_search([k], [temperature])
        self.k, self.temperature, self.most = k, temperature, most
        self.bank: list[tuple[Tensor, Tensor]] = []
        self._queries: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch's features on the CPU."""
        if (taken := self._taken(batch)) is not None:
            self.bank.append((taken[0].cpu(), taken[1].cpu()))
        while self.most and sum(len(labels) for _, labels in self.bank[1:]) >= self.most:
            self.bank.pop(0)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets the last epoch."""
        self._seen = None
        self.bank.clear()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins anew."""
        self._seen = None
        self._queries.clear()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the batch's features."""
        if (taken := self._taken(batch)) is not None:
            self._queries.append((taken[0].cpu(), taken[1].cpu()))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Scores and logs."""
        if trainer.sanity_checking or not self.bank or not self._queries:
            return
        train, known, queries, labels = (
            torch.cat(part).numpy() for part in (*zip(*self.bank, strict=True), *zip(*self._queries, strict=True))
        )
        classes = int(max(known.max(), labels.max())) + 1
        scores = knn.knn_predict(train, known, queries, min(self.k, len(train)), self.temperature, num_classes=classes)
        top1 = 100.0 * float(np.mean(scores.argmax(axis=1) == labels))
        pl_module.log("knn_top1", top1, prog_bar=True, sync_dist=True, batch_size=len(labels))


class OnlineLinear(_Watching):
    """Trains one layer on the features of each training batch and logs `linear_loss`, and `linear_top1` in validation.

    The layer and its SGD live in the callback, apart from the module: they are in its checkpoints and in nothing else.

    Args:
        num_classes: C.
        module: Name of the submodule whose output is the features.
        lr: Of SGD with momentum 0.9.
        labels: A batch to its labels.
    """

    def __init__(self, num_classes: int, module: str = "backbone", *, lr: float = 0.1, labels: Labels = second) -> None:
        super().__init__(module, labels=labels)
        if num_classes < 2:
            raise RequestError(f"num_classes {num_classes}: a probe needs two to tell apart")
        self.num_classes, self.lr = num_classes, lr
        self.layer: nn.Linear | None = None
        self._optimizer: torch.optim.SGD | None = None
        self._saved: dict[str, Tensor] | None = None
        self._hits = [0, 0]

    def state_dict(self) -> dict[str, Any]:
        """The layer, for a checkpoint."""
        return {} if self.layer is None else {key: value.cpu() for key, value in self.layer.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a checkpoint."""
        self._saved = state_dict or None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step of the layer."""
        taken = self._taken(batch)
        if taken is None:
            return
        features, labels = taken
        layer = self._ready(features)
        assert self._optimizer is not None
        with torch.enable_grad():
            loss = functional.cross_entropy(layer(features.clone()), labels)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        pl_module.log("linear_loss", loss.detach(), batch_size=len(labels))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets what validation left."""
        self._seen = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins anew."""
        self._seen = None
        self._hits = [0, 0]

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the batch's hits."""
        taken = self._taken(batch)
        if taken is not None and self.layer is not None:
            with torch.no_grad():
                right = self._ready(taken[0])(taken[0]).argmax(dim=1) == taken[1]
            self._hits = [self._hits[0] + int(right.sum()), self._hits[1] + len(right)]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the accuracy."""
        if self._hits[1] and not trainer.sanity_checking:
            top1 = 100.0 * self._hits[0] / self._hits[1]
            pl_module.log("linear_top1", top1, prog_bar=True, sync_dist=True, batch_size=self._hits[1])

    def _ready(self, features: Tensor) -> nn.Linear:
        """The layer, made when the first features say how wide it is."""
        if self.layer is None:
            generator = torch.Generator().manual_seed(0)
            layer = nn.Linear(features.shape[1], self.num_classes, device="meta").to_empty(device="cpu")
            with torch.no_grad():
                layer.weight.normal_(0, WEIGHT_DEVIATION, generator=generator)
                layer.bias.zero_()
            if self._saved is not None:
                layer.load_state_dict(self._saved)
            self.layer = layer.to(features.device)
            self._optimizer = torch.optim.SGD(self.layer.parameters(), lr=self.lr, momentum=0.9)
        return self.layer
