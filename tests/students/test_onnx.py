"""Exported ONNX files give the student's outputs in onnxruntime."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.options import Named
from fkd_ssl.students import STUDENT_KEY, Student, onnx_export
from fkd_ssl.students.onnx_export import export_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).mean(dim=(2, 3))


class Flat(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 4, 4] + images[:, :, 7, 2]


def student(name: Any, **options: Any) -> Student:
    """With running statistics that differ from the initial ones."""
    torch.manual_seed(0)
    one = Student(name, 8, **options)
    with torch.no_grad():
        one.train()(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    return one.eval()


def outputs(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path))
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, {"images": images.numpy()}), strict=True))


def assert_same(path: Path, one: Student, pixels: int = 64) -> dict[str, np.ndarray]:
    """For batches of several sizes."""
    for count in (1, 5):
        images = torch.randint(
            0, 256, (count, 3, pixels, pixels), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
        )
        found = outputs(path, images)
        with torch.no_grad():
            expected = {"features": one.features(images)}
            if "map" in found:
                expected["map"] = one.map(images).permute(0, 3, 1, 2)
            if "logits" in found:
                expected["logits"] = one(images)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert np.abs(found[name] - value.numpy()).max() <= 1e-4 * value.abs().max().item(), name
    return found


def test_features_and_map_for_any_batch_size(tmp_path: Path) -> None:
    one = student(Named("object:Small", Small(), 64))
    modes = [part.training for part in one.modules()]
    line, compared = export_onnx(one, tmp_path / "s.onnx", pixels=64)
    assert compared
    assert [part.training for part in one.modules()] == modes
    found = assert_same(tmp_path / "s.onnx", one)
    assert found["map"].shape == (5, 6, 15, 15)
    model = onnx.load(tmp_path / "s.onnx")
    onnx.checker.check_model(model)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about[STUDENT_KEY]) == {"name": "object:Small", "pixels": 64}
    assert about["preprocessing"].startswith("images: RGB, uint8 [batch, 3, height, width], not normalised")
    data = (tmp_path / "s.onnx").read_bytes()
    assert not [path for path in (torch.__file__, __file__) if str(Path(path).parent).encode() in data]
    assert b"stack_trace" not in data
    images = np.zeros((2, 3, 64, 64), dtype=np.uint8)
    names = {"onnxruntime": onnxruntime, "images": images}
    exec(line, names)  # noqa: S102
    assert names["features"].shape == (2, 6)


def test_an_existing_file_is_refused_before_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.onnx").write_bytes(b"mine")
    monkeypatch.setattr(onnx_export, "_converted", lambda *given: pytest.fail("converted"))
    with pytest.raises(RequestError, match=r"s\.onnx: the file exists; remove it or choose another file"):
        export_onnx(student(Named("object:Small", Small(), 64)), tmp_path / "s.onnx", pixels=64)
    assert (tmp_path / "s.onnx").read_bytes() == b"mine"


def test_a_network_without_a_map(tmp_path: Path) -> None:
    line, _ = export_onnx(student(Named("object:Flat", Flat(), 64)), tmp_path / "s.onnx", pixels=64)
    assert line.startswith("features, = ")
    assert set(outputs(tmp_path / "s.onnx", torch.zeros(2, 3, 64, 64, dtype=torch.uint8))) == {"features"}


def test_a_size_that_the_network_does_not_accept(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"student timm/vit_tiny_patch16_224: fails on images of 37 px: .*divisible"):
        export_onnx(student("timm/vit_tiny_patch16_224"), tmp_path / "s.onnx", pixels=37)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("mobilenet_v3_small", {"head": "classifier"}),
        ("timm/vit_tiny_patch16_224", {}),
        ("timm/convnext_atto", {}),
        ("reactnet", {"width": 0.25}),
    ],
)
def test_named_students(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    one = student(name, **options)
    export_onnx(one, tmp_path / "s.onnx", pixels=64)
    found = assert_same(tmp_path / "s.onnx", one)
    assert ("logits" in found) == (options.get("head") == "classifier")
    assert found["map"].shape[2] == found["map"].shape[3] > 1


def test_other_outputs_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = onnx_export._converted

    def spoiled(*given: Any) -> Any:
        model = convert(*given)
        weights = next(one for one in model.graph.initializer if len(one.dims) == 4)
        weights.raw_data = (np.frombuffer(weights.raw_data, np.float32) * np.float32(1.01)).tobytes()
        return model

    monkeypatch.setattr(onnx_export, "_converted", spoiled)
    with pytest.raises(FkdError, match=r"onnxruntime's features differ from torch's by .* nothing was written"):
        export_onnx(student(Named("object:Small", Small(), 64)), tmp_path / "s.onnx", pixels=64)
    assert list(tmp_path.iterdir()) == []


def test_what_torch_cannot_export_is_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([image.mean(dim=(1, 2)) * float(image.sum().item() > 0) for image in images])

    with pytest.raises(
        RequestError, match=r"student object:Odd: torch cannot export it to ONNX: its computation depends on .*; export \.safet"
    ):
        export_onnx(student(Named("object:Odd", Odd(), 64)), tmp_path / "s.onnx", pixels=64)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"onnx and onnxscript not installed: pip install 'fkd_ssl\[onnx\]'"):
        export_onnx(student(Named("object:Small", Small(), 64)), tmp_path / "s.onnx", pixels=64)
