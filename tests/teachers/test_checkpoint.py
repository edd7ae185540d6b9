import argparse
import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fkd_ssl.errors import CheckpointError, RequestError
from fkd_ssl.teachers import checkpoint, load_teacher


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "bad.pth.tar"
    torch.save({"state_dict": Bomb(tmp_path / "boom")}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"mkdir.*nothing in a checkpoint is executed.*save its state_dict alone"):
        checkpoint.read(file)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_scripts_leave_beside_the_weights_is_inert(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "training.pth.tar"
    weight = torch.arange(6.0).view(2, 3)
    left = {
        "args": argparse.Namespace(lr=0.1, names=["a"]),
        "optimizer": {"param_groups": [{"lr": np.float64(0.3)}], "state": {0: {"momentum_buffer": weight}}},
        "best": np.array([1.0, 2.0]),
        "epoch": np.int64(3),
    }
    torch.save({"state_dict": OrderedDict({"module.w": weight}), **left}, file, _use_new_zipfile_serialization=zipped)
    before = set(torch.serialization.get_safe_globals())
    saved, digest = checkpoint.read(file)
    assert set(torch.serialization.get_safe_globals()) == before
    assert type(saved["args"]) is type(saved["epoch"]) is checkpoint._Inert
    assert torch.equal(checkpoint.weights_of(saved, "file")["w"], weight)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module.", "module.module."])
def test_what_wrappers_put_before_names_is_taken_off(prefix: str) -> None:
    weights = {f"{prefix}conv.weight": torch.ones(1), f"{prefix}module.bias": torch.ones(1)}
    assert list(checkpoint.weights_of({"state_dict": weights}, "file")) == ["conv.weight", "module.bias"]


def test_a_prefix_that_only_some_names_have_stays() -> None:
    weights = {"module.weight": torch.ones(1), "bias": torch.ones(1)}
    assert list(checkpoint.weights_of(weights, "file")) == ["module.weight", "bias"]


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
        checkpoint.read(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    "content", [b"not a checkpoint at all", b"\xff" * 64, b"PK\x03\x04 no zip", b"\x08" + b"\0" * 7 + b"{oops!!!"]
)
def test_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"foreign: cannot be read as a checkpoint"):
        checkpoint.read(tmp_path / "foreign")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.pth: no such checkpoint"):
        load_teacher("mocov2", checkpoint=tmp_path / "none.pth")
    with pytest.raises(RequestError, match=r"a folder, not a checkpoint"):
        load_teacher("swav", checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], r"holds a list, expected a dict"),
        ({"state_dict": [1]}, r"its state_dict is a list"),
        ({"state_dict": {}}, r"holds no weights"),
        ({"model": {"conv1.weight": torch.ones(2)}, "epoch": 3}, r"holds no weights.*model, epoch hold something else"),
    ],
)
def test_files_without_weights_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        load_teacher("mocov2", checkpoint=tmp_path / "x.pth")


def test_loading_draws_no_random_numbers(moco18: Any) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_teacher("mocov2", checkpoint=moco18[0])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html><p>please log in", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a pointer of Git LFS"),
        (b"oh no", "no file of PyTorch's"),
    ],
)
def test_what_is_no_checkpoint_is_said_and_unpickling_is_not_advised(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as error:
        checkpoint.read(tmp_path / "file")
    assert "weights_only" not in str(error.value)


def test_want_of_memory_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pth")

    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(MemoryError, match="can't allocate memory"):
        checkpoint.read(tmp_path / "w.pth")


@pytest.mark.parametrize("odd", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_tensors_without_plain_values_are_refused(odd: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"x: b is sparse or without values"):
        checkpoint.weights_of({"a": torch.ones(1), "b": odd}, "x")


def test_weights_one_level_too_deep_are_pointed_at() -> None:
    with pytest.raises(CheckpointError, match=r"if its weights lie under 'model', save those alone"):
        checkpoint.weights_of({"model": {"a": torch.ones(1), "b": torch.ones(1)}, "epoch": 3}, "x")
