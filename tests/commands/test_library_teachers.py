"""A teacher of a library through the commands: its column, its preprocessing in the store, its checks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import resnet18

LINE = "precompute --images train --store lib --crops 2 --pixels 32 --chunk_size 16 --codec SQ8"


@pytest.fixture
def weights(work: Path) -> Path:
    torch.manual_seed(0)
    torch.save(resnet18(weights=None).state_dict(), work / "w.pth")
    return work


def test_torchvisions_network_fills_a_column_and_is_verified(weights: Path, call: Any) -> None:
    assert call(f"{LINE} --teacher torchvision/resnet18 --checkpoint w.pth").status == 0
    assert call(f"{LINE} --teacher torchvision/resnet18@layer2 --checkpoint w.pth").status == 0
    columns = json.loads(call("inspect lib --json").out)["columns"]
    shapes = {name: column["teacher"]["shape"] for name, column in columns.items()}
    assert shapes == {"resnet18": [512], "resnet18-layer2": [128]}
    assert columns["resnet18"]["teacher"]["source"] == "torchvision/resnet18"
    for name in ("torchvision/resnet18", "torchvision/resnet18@layer2"):
        status, out, _ = call(f"verify lib --images train --teacher {name} --checkpoint w.pth --sample 8 --json")
        assert status == 0
        assert json.loads(out)["cosine"]["min"] > 0.99


def test_a_model_to_be_scored(weights: Path, call: Any) -> None:
    line = "knn --model teacher:torchvision/resnet18 --checkpoint w.pth --train train --val val --pixels 32 --k 5 --json"
    assert json.loads(call(line).out)["feature_dim"] == 512


def test_large_targets_are_told(weights: Path, call: Any) -> None:
    status, _, err = call(f"{LINE.replace('SQ8', 'Flat')} --teacher torchvision/resnet18 --checkpoint w.pth")
    assert status == 0
    assert "note: targets of D = 512 take 2048 bytes per crop" in err
    assert "--codec RR256,SQ8" in err


def test_timms_dinov2_fills_a_column(work: Path, call: Any) -> None:
    timm = pytest.importorskip("timm")
    name = "vit_small_patch14_dinov2.lvd142m"
    torch.save(timm.create_model(name, pretrained=False).state_dict(), work / "d.pth")
    status, _, err = call(f"{LINE.replace('32', '28')} --teacher timm/{name} --checkpoint d.pth")
    assert status == 0, err
    column = json.loads(call("inspect lib --json").out)["columns"][name]
    assert (column["teacher"]["shape"], column["teacher"]["pixels"]) == ([384], 28)
    assert (column["teacher"]["mean"], column["teacher"]["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
