"""kNN and a linear probe during training: Lightning callbacks for any LightningModule.

Both take features from the module's own forward pass with a hook on a submodule, so nothing is computed twice and the module's
code does not change. `OnlineKNN` keeps the last features of the training epoch as neighbours and scores the validation batches.
`OnlineLinear` trains one layer on detached features with its own optimiser, so no gradient reaches the module.

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
from fkd_ssl.eval.probe import initial_layer

Labels = Callable[[Any], Tensor]


def second(batch: Any) -> Tensor:
    """Returns the labels of a batch (images, labels, ...), as in torchvision's and lightly's data sets."""
    labels: Tensor = batch[1]
    return labels


class _FeatureCallback(pl.Callback):
    """Takes the features of each batch: the output of the submodule `module`, or its first B rows if there are several views.

    Args:
        module: Name of a submodule of the LightningModule, as in `named_modules`, whose output is the features.
        labels: Maps a batch to its labels, int64 [B].
    """

    def __init__(self, module: str = "backbone", *, labels: Labels = second) -> None:
        self.module, self.labels = module, labels
        self._seen: Tensor | None = None
        self._hook: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adds the hook; raises RequestError if there is no such submodule."""
        parts = dict(pl_module.named_modules())
        if self.module not in parts:
            raise RequestError(
                f"{type(pl_module).__name__} has no submodule {self.module!r}; it has {', '.join(list(parts)[1:9])}, ..."
            )
        self._hook = parts[self.module].register_forward_hook(self._keep_first)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Removes the hook."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _keep_first(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._seen is None:  # the first of several views
            self._seen = output

    def _pop_features(self, batch: Any) -> tuple[Tensor, Tensor] | None:
        """Detached features float32 [B, D] of the batch and its labels [B]; None if the submodule did not run."""
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


class OnlineKNN(_FeatureCallback):
    """Logs `knn_top1` of each validation epoch, with features of the last training epoch as neighbours.

    These are features of augmented images by changing weights, so the score is slightly lower than that of `fkd-ssl knn`, but
    costs almost nothing. The sanity check, and a validation before any training, log nothing.

    Args:
        module: Name of the submodule whose output is the features.
        k: Number of neighbours.
        temperature: T.
        max_features: Number of training features to keep, the latest; 0 keeps all.
        labels: Maps a batch to its labels.
    """

    def __init__(
        self,
        module: str = "backbone",
        *,
        k: int = knn.K,
        temperature: float = knn.TEMPERATURE,
        max_features: int = 50_000,
        labels: Labels = second,
    ) -> None:
        super().__init__(module, labels=labels)
        knn.check_search([k], [temperature])
        self.k, self.temperature, self.max_features = k, temperature, max_features
        self.bank: list[tuple[Tensor, Tensor]] = []
        self._queries: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch's features on the CPU."""
        if (taken := self._pop_features(batch)) is not None:
            self.bank.append((taken[0].cpu(), taken[1].cpu()))
        while self.max_features and sum(len(labels) for _, labels in self.bank[1:]) >= self.max_features:
            self.bank.pop(0)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clears the features of the last epoch."""
        self._seen = None
        self.bank.clear()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clears the features of the last validation."""
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
        if (taken := self._pop_features(batch)) is not None:
            self._queries.append((taken[0].cpu(), taken[1].cpu()))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the accuracy."""
        if trainer.sanity_checking or not self.bank or not self._queries:
            return
        train, known, queries, labels = (
            torch.cat(part).numpy() for part in (*zip(*self.bank, strict=True), *zip(*self._queries, strict=True))
        )
        classes = int(max(known.max(), labels.max())) + 1
        scores = knn.knn_predict(
            train,
            known,
            queries,
            min(self.k, len(train)),
            self.temperature,
            num_classes=classes,
            device=pl_module.device if pl_module.device.type == "cuda" else "cpu",
        )
        top1 = 100.0 * float(np.mean(scores.argmax(axis=1) == labels))
        pl_module.log("knn_top1", top1, prog_bar=True, sync_dist=True, batch_size=len(labels))


class OnlineLinear(_FeatureCallback):
    """Trains one layer on the features of each training batch; logs `linear_loss`, and `linear_top1` in validation.

    The layer and its optimiser belong to the callback, not to the module. Checkpoints have the layer's weights.

    Args:
        num_classes: C.
        module: Name of the submodule whose output is the features.
        lr: Learning rate of SGD with momentum 0.9.
        labels: Maps a batch to its labels.
    """

    def __init__(self, num_classes: int, module: str = "backbone", *, lr: float = 0.1, labels: Labels = second) -> None:
        super().__init__(module, labels=labels)
        if num_classes < 2:
            raise RequestError(f"num_classes {num_classes}: a probe needs at least two")
        self.num_classes, self.lr = num_classes, lr
        self.layer: nn.Linear | None = None
        self._optimizer: torch.optim.SGD | None = None
        self._saved: dict[str, Tensor] | None = None
        self._hits = [0, 0]

    def state_dict(self) -> dict[str, Any]:
        """The layer's weights, for a checkpoint."""
        return {} if self.layer is None else {key: value.cpu() for key, value in self.layer.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the layer's weights from a checkpoint."""
        self._saved = state_dict or None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Trains the layer for one step."""
        taken = self._pop_features(batch)
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
        """Clears the features of the last validation."""
        self._seen = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clears the counts of the last validation."""
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
        taken = self._pop_features(batch)
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
        """The layer, which is created when the size of the features is known."""
        if self.layer is None:
            layer = initial_layer(features.shape[1], self.num_classes, seed=0)
            if self._saved is not None:
                layer.load_state_dict(self._saved)
            self.layer = layer.to(features.device)
            self._optimizer = torch.optim.SGD(self.layer.parameters(), lr=self.lr, momentum=0.9)
        return self.layer
