from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fkd_ssl.errors import CheckpointError
from fkd_ssl.teachers import load_teacher

STD = (0.229, 0.224, 0.225)


def test_embedding_and_features_are_the_forward_written_out(kit: SimpleNamespace, crops: Any, moco18: tuple[Path, Any]) -> None:
    path, state = moco18
    teacher = load_teacher("mocov2", checkpoint=path)
    expected = kit.forward(state, "module.encoder_q.", crops, STD, swav_stem=False)
    torch.testing.assert_close(teacher.embed(crops).double(), kit.moco_target(state, crops), rtol=0, atol=1e-5)
    scale = float(expected.abs().max())
    torch.testing.assert_close(teacher.features(crops).double() / scale, expected / scale, rtol=0, atol=1e-5)
    assert (teacher.info.spec.size, teacher.feature_dim, teacher.info.name) == (128, 512, "mocov2")
    assert teacher.info.network == "resnet18, MLP 512-512-128"
    assert teacher.info.std == STD


def test_the_linear_head_of_version_1_without_module(kit: SimpleNamespace, crops: Any, write: Any) -> None:
    state = kit.fill(kit.moco(version=1, prefix=""))
    teacher = load_teacher("mocov2", checkpoint=write(state))
    features = kit.forward(state, "encoder_q.", crops, STD, swav_stem=False)
    target = F.linear(features, state["encoder_q.fc.weight"].double(), state["encoder_q.fc.bias"].double())
    torch.testing.assert_close(teacher.embed(crops).double(), F.normalize(target, dim=1), rtol=0, atol=1e-5)
    assert teacher.info.network == "resnet18, linear 512-128"


def test_a_wide_resnet_of_torchvision_is_known_by_its_shapes(kit: SimpleNamespace, write: Any) -> None:
    teacher = load_teacher("mocov2", checkpoint=write(kit.hollow(kit.moco("resnet50", inner=2))))
    assert teacher.info.network == "wide_resnet50_2, MLP 2048-2048-128"


def test_swavs_layout_is_refused_and_named(kit: SimpleNamespace, write: Any) -> None:
    with pytest.raises(CheckpointError, match=r"not MoCo's layout.*looks like SwAV's: pass --teacher swav"):
        load_teacher("mocov2", checkpoint=write(kit.hollow(kit.swav())))


def test_a_supervised_resnet_is_refused(kit: SimpleNamespace, write: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no keys module\.encoder_q\.\*; the first key is 'conv1\.weight'"):
        load_teacher("mocov2", checkpoint=write(kit.hollow(kit.body("resnet18"))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer2.0.conv1.weight": None, "layer3.1.bn2.bias": None}, r"2 missing \(layer2\.0\.conv1\.weight, layer3\.1\.bn2"),
        ({"layer1.0.extra.weight": (3,)}, r"1 unexpected \(layer1\.0\.extra\.weight\)"),
        ({"layer4.1.conv2.weight": (512, 512, 1, 1)}, r"1 misshapen \(layer4\.1\.conv2\.weight float32 \[512, 512, 1, 1\]"),
        ({"fc.2.bias": (64,)}, r"encoder_q\.fc: its keys do not fit: 1 misshapen \(2\.bias float32 \[64\], expected .*128"),
        ({"fc.0.weight": (512, 256)}, r"1 misshapen \(0\.weight float32 \[512, 256\], expected float32 \[512, 512\]\)"),
        ({"fc.0.weight": (512,)}, r"its head's 0\.weight is float32 \[512\], expected a matrix"),
        ({"fc.2.weight": None}, r"its head's 2\.weight is missing"),
        ({"fc.4.weight": (1, 1)}, r"its head has keys .* expected one linear layer, layers 0 and 2"),
        ({"conv1.weight": None}, r"not a ResNet in torchvision's layout \('conv1\.weight' is missing\)"),
        ({"conv1.weight": (64, 3, 3, 3)}, r"not one of resnet18.* stem \[64, 3, 3, 3\]"),
        ({"layer2.2.conv1.weight": (1,)}, r"not one of resnet18.*found BasicBlocks \[2, 3, 2, 2\]"),
    ],
)
def test_keys_that_do_not_fit_are_named(change: dict[str, Any], message: str, kit: SimpleNamespace, write: Any) -> None:
    shapes = kit.moco()
    for key, shape in change.items():
        shapes = {**shapes, f"module.encoder_q.{key}": shape}
    shapes = {key: shape for key, shape in shapes.items() if shape is not None}
    with pytest.raises(CheckpointError, match=message):
        load_teacher("mocov2", checkpoint=write(kit.hollow(shapes)))


def test_keys_outside_the_encoders_are_refused(kit: SimpleNamespace, write: Any) -> None:
    with pytest.raises(CheckpointError, match=r"1 unexpected \(predictor\.weight\)"):
        load_teacher("mocov2", checkpoint=write(kit.hollow({**kit.moco(), "module.predictor.weight": (2, 2)})))


def test_keys_of_the_key_encoder_that_no_encoder_has_are_refused(kit: SimpleNamespace, write: Any) -> None:
    with pytest.raises(CheckpointError, match=r"encoder_k: its keys do not fit: 1 unexpected \(rubbish\)"):
        load_teacher("mocov2", checkpoint=write(kit.hollow({**kit.moco(), "module.encoder_k.rubbish": (2, 2)})))


def test_counters_may_be_absent_and_integers_are_no_weights(kit: SimpleNamespace, moco18: tuple[Path, Any], write: Any) -> None:
    state = {key: value for key, value in moco18[1].items() if not key.endswith("num_batches_tracked")}
    assert load_teacher("mocov2", checkpoint=write(state)).info.spec.size == 128
    state["module.encoder_q.conv1.weight"] = state["module.encoder_q.conv1.weight"].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"conv1\.weight int8 \[64, 3, 7, 7\], expected float32"):
        load_teacher("mocov2", checkpoint=write(state))
