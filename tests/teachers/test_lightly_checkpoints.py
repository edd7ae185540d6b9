"""Checkpoints that Lightning wrote of modules made with lightly, as in lightly's own examples."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from fkd_ssl.errors import CheckpointError
from fkd_ssl.teachers import load_teacher


class Module(pl.LightningModule):
    def __init__(self, backbone: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="backbone")
        self.backbone = backbone
        self.projection_head = MoCoProjectionHead(512, 512, 128)
        self.backbone_momentum = nn.Linear(2, 2)
        deactivate_requires_grad(self.backbone_momentum)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        embedding: Tensor = self.projection_head(self.backbone(batch[0]).flatten(1))
        return embedding.square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=0.9)


def numbered(network: nn.Module) -> nn.Module:
    return nn.Sequential(*list(network.children())[:-1])


def headless(network: Any) -> nn.Module:
    network.fc = nn.Identity()
    return network


@pytest.mark.parametrize("form", [numbered, headless])
def test_a_checkpoint_of_a_training_with_lightly(form: Any, crops: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Module(form(resnet18(weights=None)))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(4, 3, 32, 32)), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    teacher = load_teacher("lightly", checkpoint=tmp_path / "last.ckpt")
    assert (teacher.info.name, teacher.info.spec.size, teacher.feature_dim) == ("lightly", 512, 512)
    assert teacher.info.network == "resnet18, pooled features"
    mean, std = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
    module.eval()
    with torch.inference_mode():
        expected = module.backbone((crops / 255 - mean) / std).flatten(1)
    torch.testing.assert_close(teacher.embed(crops), F.normalize(expected, dim=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.layer2.0.conv1.weight": None}, r"backbone: its keys do not fit: 1 missing \(layer2\.0\.conv1\.weight\)"),
        ({"backbone.other.weight": (1000, 512)}, r"1 unexpected \(other\.weight\)"),
        ({"backbone.conv1.weight": (64, 3, 3, 3)}, r"not one of resnet18.*stem \[64, 3, 3, 3\]"),
        ({"backbone.conv1.weight": None}, r"not a ResNet in torchvision's layout"),
    ],
)
def test_keys_that_do_not_fit_are_named(change: dict[str, Any], message: str, kit: SimpleNamespace, write: Any) -> None:
    shapes = {f"backbone.{key}": shape for key, shape in kit.body("resnet18").items()} | change
    with pytest.raises(CheckpointError, match=message):
        load_teacher("lightly", checkpoint=write(kit.hollow({key: s for key, s in shapes.items() if s is not None})))


def test_other_layouts_are_refused(kit: SimpleNamespace, write: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"not lightly's layout: no keys backbone\.\* or encoder\.\*; the first key is 'encoder_q\.conv1"
    ):
        load_teacher("lightly", checkpoint=write(kit.hollow(kit.moco())))
