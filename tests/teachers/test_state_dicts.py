"""Layouts of checkpoints that common training scripts write: each gives the same features, or a clear error."""

import argparse
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from fkd_ssl import checkpoints
from fkd_ssl.errors import CheckpointError, RequestError
from fkd_ssl.teachers import load_teacher, state_dicts

State = dict[str, Tensor]
SHUFFLE, VIT, LIGHTLY = "torchvision/shufflenet_v2_x0_5", "timm/test_vit.r160_in1k", "lightly"


def before(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def without(start: str, state: State) -> State:
    return {key: value for key, value in state.items() if not key.startswith(start)}


def zeros(state: State) -> State:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def compiled_blocks(state: State) -> State:
    return {key.replace("stage2.", "stage2._orig_mod."): value for key, value in state.items()}


def checkpointed_blocks(state: State) -> State:
    return {key.replace("stage3.", "stage3._checkpoint_wrapped_module."): value for key, value in state.items()}


def doubled(state: State) -> State:
    return {key: value.double() if value.is_floating_point() else value for key, value in state.items()}


def parameters(state: State) -> dict[str, Any]:
    return {key: nn.Parameter(value, requires_grad=False) for key, value in state.items()}


def fine_tuned(head: str, state: State) -> State:
    return {
        **without(head, state),
        f"{head}weight": torch.ones(7, state[f"{head}weight"].shape[1]),
        f"{head}bias": torch.ones(7),
    }


LAYOUTS: list[tuple[str, str, Callable[[State], Any]]] = [
    ("plain", SHUFFLE, lambda s: s),
    ("ordered", SHUFFLE, OrderedDict),
    ("state_dict", SHUFFLE, lambda s: {"state_dict": s, "epoch": 3, "arch": "x"}),
    ("model", SHUFFLE, lambda s: {"model": s, "optimizer": {"state": {0: torch.ones(1)}}, "args": argparse.Namespace()}),
    ("model_ema", SHUFFLE, lambda s: {"model": zeros(s), "model_ema": {"n_averaged": torch.tensor(3), **before("module.", s)}}),
    ("state_dict_ema", SHUFFLE, lambda s: {"state_dict": zeros(s), "state_dict_ema": s}),
    ("model_ema_none", SHUFFLE, lambda s: {"state_dict": s, "model_ema": None}),
    ("ddp", SHUFFLE, lambda s: before("module.", s)),
    ("compiled", SHUFFLE, lambda s: before("_orig_mod.", s)),
    ("ddp_of_compiled", SHUFFLE, lambda s: before("module._orig_mod.", s)),
    ("compiled_ddp", SHUFFLE, lambda s: before("_orig_mod.module.", s)),
    ("compiled_blocks", SHUFFLE, compiled_blocks),
    ("fsdp", SHUFFLE, lambda s: before("_fsdp_wrapped_module.", s)),
    ("activation_checkpointing", SHUFFLE, checkpointed_blocks),
    ("headless", SHUFFLE, lambda s: without("fc.", s)),
    ("fine_tuned", SHUFFLE, lambda s: fine_tuned("fc.", s)),
    ("mlp_head", SHUFFLE, lambda s: {**without("fc.", s), "fc.0.weight": torch.ones(3, 1024), "fc.2.weight": torch.ones(2, 3)}),
    ("headless_ddp", SHUFFLE, lambda s: {"state_dict": before("module.", without("fc.", s))}),
    ("backbone", SHUFFLE, lambda s: {"state_dict": {**before("backbone.", s), "head.weight": torch.ones(2)}}),
    ("backbone_compiled", SHUFFLE, lambda s: {"state_dict": before("backbone._orig_mod.", s)}),
    ("backbone_ddp", SHUFFLE, lambda s: {"state_dict": before("backbone.module.", without("fc.", s))}),
    ("encoder", SHUFFLE, lambda s: {"state_dict": {**before("encoder.", s), "projector.0.weight": torch.ones(2)}}),
    ("without_counters", SHUFFLE, lambda s: {k: v for k, v in s.items() if "num_batches" not in k}),
    ("double", SHUFFLE, doubled),
    ("parameters", SHUFFLE, parameters),
    ("defaultdict", SHUFFLE, lambda s: {"state_dict": s, "log": defaultdict(list, {"loss": [1.0]}), "out": Path("runs/1")}),
    ("timm_plain", VIT, lambda s: s),
    ("timm_headless", VIT, lambda s: without("head.", s)),
    ("timm_fine_tuned", VIT, lambda s: fine_tuned("head.", s)),
    ("timm_training", VIT, lambda s: {"state_dict": zeros(s), "state_dict_ema": s, "args": argparse.Namespace(), "epoch": 1}),
    ("timm_ddp_ema", VIT, lambda s: {"state_dict": zeros(s), "state_dict_ema": before("module.", s)}),
    ("timm_model", VIT, lambda s: {"model": s}),
    ("timm_backbone", VIT, lambda s: {"state_dict": before("backbone.", without("head.", s))}),
    ("lightly", LIGHTLY, lambda s: {"state_dict": {**before("backbone.", without("fc.", s)), "head.0.w": torch.ones(1)}}),
    ("lightly_with_fc", LIGHTLY, lambda s: {"state_dict": before("backbone.", s)}),
    ("lightly_fine_tuned", LIGHTLY, lambda s: {"state_dict": before("backbone.", fine_tuned("fc.", s))}),
    ("lightly_compiled", LIGHTLY, lambda s: {"state_dict": before("backbone._orig_mod.", s)}),
    ("lightly_ddp", LIGHTLY, lambda s: {"state_dict": before("backbone.module.", s)}),
    ("lightly_compiled_module", LIGHTLY, lambda s: {"state_dict": before("_orig_mod.backbone.", s)}),
    ("solo_learn", LIGHTLY, lambda s: {"state_dict": {**before("encoder.", s), "classifier.weight": torch.ones(2)}}),
    ("solo_learn_new", LIGHTLY, lambda s: {"state_dict": {**before("backbone.", s), "momentum_backbone.w": torch.ones(2)}}),
]
AVERAGES = {"model_ema": "model_ema", **dict.fromkeys(("state_dict_ema", "timm_training", "timm_ddp_ema"), "state_dict_ema")}


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """The networks behind the names above, with random weights."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    made = {
        SHUFFLE: models.shufflenet_v2_x0_5(weights=None),
        VIT: timm.create_model(VIT.partition("/")[2], pretrained=False),
        LIGHTLY: models.resnet18(weights=None),
    }
    return {name: network.eval() for name, network in made.items()}


@pytest.mark.parametrize(("layout", "name", "save"), LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_layouts(layout: str, name: str, save: Any, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    network = networks[name]
    torch.save(save(network.state_dict()), tmp_path / "w.pth")
    teacher = load_teacher(name, checkpoint=tmp_path / "w.pth")
    side = 160 if name == VIT else 64
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = (images / 255 - torch.tensor(teacher.info.mean).view(3, 1, 1)) / torch.tensor(teacher.info.std).view(3, 1, 1)
    whole: Any = network
    with torch.inference_mode():
        if name == VIT:
            expected = whole.forward_head(whole.forward_features(x), pre_logits=True)
        elif name == SHUFFLE:
            x = whole.stage4(whole.stage3(whole.stage2(whole.maxpool(whole.conv1(x)))))
            expected = whole.conv5(x).mean(dim=(2, 3))
        else:
            expected = nn.Sequential(*list(whole.children())[:-1])(x).flatten(1)
    torch.testing.assert_close(teacher.features(images), expected, rtol=1e-4, atol=1e-5)
    assert ("moving average" in teacher.info.network) == (layout in AVERAGES)
    assert AVERAGES.get(layout, "") in teacher.info.network


@pytest.mark.parametrize(
    ("name", "save", "said"),
    [
        (SHUFFLE + "@probabilities", lambda s: without("fc.", s), r"missing \(fc\.weight, fc\.bias\)"),
        (SHUFFLE + "@probabilities", lambda s: fine_tuned("fc.", s), r"misshapen \(fc\.weight"),
        (SHUFFLE, lambda s: without("conv5.", s), r"missing \(conv5"),
        (SHUFFLE, lambda s: {**s, "extra.weight": torch.ones(1)}, r"unexpected \(extra\.weight"),
        (SHUFFLE, lambda s: {"student": s, "teacher": s}, r"if its weights are under 'student', save those alone"),
        (
            SHUFFLE,
            lambda s: {**s, "conv1._orig_mod.0.weight": s["conv1.0.weight"]},
            r"the same weight with and without a wrapper",
        ),
        (SHUFFLE, lambda s: {}, r"holds no weights"),
        (SHUFFLE, lambda s: [s], r"holds a list, expected a dict of weights"),
        (SHUFFLE, lambda s: {"state_dict": [1]}, r"its state_dict is a list"),
        (SHUFFLE, lambda s: {"weights": s, "epoch": 3}, r"holds no weights.*weights, epoch hold something else"),
        (SHUFFLE, lambda s: {**s, "conv1.0.weight": s["conv1.0.weight"].to_sparse()}, r"calls torch\._utils\._rebuild_sparse"),
        (LIGHTLY, lambda s: s, r"not lightly's layout: no keys backbone\.\* or encoder\.\*"),
    ],
)
def test_layouts_that_are_refused(name: str, save: Any, said: str, networks: dict[str, nn.Module], tmp_path: Path) -> None:
    torch.save(save(networks[name.partition("@")[0]].state_dict()), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=said):
        load_teacher(name, checkpoint=tmp_path / "w.pth")


def test_a_prefix_that_only_some_names_have_stays() -> None:
    weights = {"module.weight": torch.ones(1), "bias": torch.ones(1)}
    assert list(state_dicts.find(weights, "file")) == ["module.weight", "bias"]


@pytest.mark.parametrize(
    "odd", [torch.eye(2).to_sparse(), torch.empty(2, device="meta"), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]
)
def test_tensors_without_plain_values_are_refused(odd: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"x: b is sparse, nested or without values"):
        state_dicts.find({"a": torch.ones(1), "b": odd}, "x")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.pth: not found"):
        load_teacher("mocov2", checkpoint=tmp_path / "none.pth")
    with pytest.raises(RequestError, match=r"a folder, not a checkpoint"):
        load_teacher("swav", checkpoint=tmp_path)


@pytest.mark.parametrize("name", ["teacher.safetensors", "teacher.bin"])
def test_safetensors_are_known_by_suffix_or_content(name: str, tmp_path: Path, moco18: Any, crops: Any) -> None:
    path, state = moco18
    save_file({key: value for key, value in state.items() if "encoder_q" in key}, tmp_path / name)
    got = load_teacher("mocov2", checkpoint=tmp_path / name).embed(crops)
    torch.testing.assert_close(got, load_teacher("mocov2", checkpoint=path).embed(crops), rtol=0, atol=0)


@pytest.mark.parametrize("cut", [0, 3, 200, 5000])
def test_truncated_files_are_refused(cut: int, tmp_path: Path, kit: SimpleNamespace) -> None:
    whole = kit.save(tmp_path / "whole.pth", {"encoder_q.conv1.weight": torch.ones(64, 3, 7, 7)}).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint"):
        checkpoints.load(tmp_path / "cut.pth")


def test_loading_draws_no_random_numbers(moco18: Any) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_teacher("mocov2", checkpoint=moco18[0])
    assert torch.equal(torch.rand(3), expected)
