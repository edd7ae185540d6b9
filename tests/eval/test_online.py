import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval import knn
from fkd_ssl.eval.online import OnlineKNN, OnlineLinear


class Module(pl.LightningModule):
    """A self-supervised module with two views, without labels or probes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, _):
        return ((self(batch[0]) - self(batch[0] + 0.1)) ** 2).mean()

    def validation_step(self, batch, _):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.fixture
def loaders():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.randn(3, 1, 3, 4, generator=generator)[labels] + 0.3 * torch.randn(60, 1, 3, 4, generator=generator)
    return DataLoader(TensorDataset(images[:40], labels[:40]), 8), DataLoader(TensorDataset(images[40:], labels[40:]), 8)


def train(module, loaders, callbacks, epochs: int = 3, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, *loaders)
    return trainer


def test_probes_are_logged_and_the_training_is_bit_for_bit_the_same(loaders) -> None:
    watched, alone = Module(), Module()
    probe = OnlineLinear(3, lr=0.5)
    logged = train(watched, loaders, [OnlineKNN(k=5), probe], epochs=20).callback_metrics
    train(alone, loaders, [], epochs=20)
    for key, value in alone.state_dict().items():
        assert torch.equal(watched.state_dict()[key], value)
    assert logged["knn_top1"] > 90
    assert logged["linear_top1"] > 90
    assert logged["linear_loss"] < 1
    assert not any(module._forward_hooks for module in watched.modules())
    assert probe.layer is not None
    assert set(watched.state_dict()) == set(alone.state_dict())


def test_the_knn_is_of_the_epochs_features(loaders) -> None:
    module, callback, frozen = Module(), OnlineKNN(k=3), []
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    logged = train(module, loaders, [callback], epochs=2).callback_metrics
    for loader in loaders:
        images, labels = loader.dataset.tensors
        frozen += [module.backbone(images).detach(), labels]
    torch.testing.assert_close(torch.cat([part for part, _ in callback.bank]), frozen[0])
    scores = knn.knn_predict(*frozen[:3], k=3, num_classes=3)
    assert logged["knn_top1"] == pytest.approx(100 * np.mean(scores.argmax(1) == frozen[3].numpy()))


def test_the_bank_keeps_the_latest(loaders) -> None:
    callback = OnlineKNN(k=3, max_features=20)
    train(Module(), loaders, [callback], epochs=1)
    labels = torch.cat([part for _, part in callback.bank])
    assert labels.tolist() == loaders[0].dataset.tensors[1][16:].tolist()


def test_the_linear_probe_is_in_the_checkpoint(loaders) -> None:
    probe = OnlineLinear(3)
    train(Module(), loaders, [probe], epochs=1)
    again = OnlineLinear(3)
    again.load_state_dict(probe.state_dict())
    torch.testing.assert_close(again._ready(torch.zeros(1, 8)).weight, probe.layer.weight)


def test_labels_come_from_anywhere(loaders) -> None:
    logged = train(Module(), loaders, [OnlineKNN(k=3, labels=lambda batch: batch[1] * 0)], epochs=1).callback_metrics
    assert logged["knn_top1"] == 100


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: OnlineKNN("encoder"), RequestError, "Module has no submodule 'encoder'; it has backbone, "),
        (lambda: OnlineKNN(k=0), RequestError, "k must be at least 1, got 0"),
        (lambda: OnlineLinear(1), RequestError, "num_classes 1: a probe needs at least two"),
        (lambda: OnlineKNN(labels=lambda batch: batch[1][:3]), FkdError, "backbone returned 8 features for 3 labels"),
    ],
)
def test_mistakes_are_named(loaders, make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        train(Module(), loaders, [make()], epochs=1)


def test_a_tuple_is_refused(loaders) -> None:
    module = Module()

    class Pair(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :8], x

    module.pair = Pair()
    module.validation_step = lambda batch, batch_idx: module.pair(batch[0])
    with pytest.raises(FkdError, match="pair returned a tuple, expected a tensor of features"):
        train(module, loaders, [OnlineKNN("pair")], epochs=1, num_sanity_val_steps=1)
