"""Exported backbones: loaded with one line in each library, the same features, nothing overwritten."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fkd_ssl.errors import CheckpointError, RequestError, StoreError
from fkd_ssl.maps import feature_map
from fkd_ssl.students import STUDENT_KEY, Student, load_student
from fkd_ssl.students.export import export, library

EXACT = 1e-6  # of the largest feature


def student(name: str, **options: Any) -> Student:
    """With running statistics that differ from the initial ones."""
    torch.manual_seed(0)
    one = Student(name, 8, **options)
    with torch.no_grad():
        one.train()(torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8))
    return one.eval()


def same(one: nn.Module, other: nn.Module) -> bool:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = one.eval()(images), other.eval()(images)
    return bool((a - b).abs().max() <= EXACT * a.abs().max())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm/resnet18"])
def test_torchvision_loads_it_with_one_line(name: str, tmp_path: Path) -> None:
    import torchvision

    one = student(name)
    line = export(one, tmp_path / "f.safetensors", layout="torchvision", pixels=64)
    bare = name.removeprefix("timm/")
    assert line.startswith(f'model = torchvision.models.{bare}(); model.load_state_dict(safetensors.torch.load_file("')
    model = getattr(torchvision.models, bare)()
    missing, unexpected = model.load_state_dict(load_file(tmp_path / "f.safetensors"), strict=False)
    assert unexpected == []
    assert {key.partition(".")[0] for key in missing} <= {"fc", "classifier"}
    setattr(model, "fc" if hasattr(model, "fc") else "classifier", nn.Identity())
    assert same(one.backbone, model)


def test_torchvision_detectors_load_it(tmp_path: Path) -> None:
    """Backbones with a feature pyramid take the whole file; a detector runs on them."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

    for name in ("resnet18", "mobilenet_v3_large"):
        one = student(name)
        export(one, tmp_path / f"{name}.safetensors", layout=None, pixels=64)
        weights = load_file(tmp_path / f"{name}.safetensors")
        if name == "resnet18":
            backbone = resnet_fpn_backbone(backbone_name=name, weights=None)
        else:
            backbone = mobilenet_backbone(backbone_name=name, weights=None, fpn=True)
            weights = {key.removeprefix("features."): value for key, value in weights.items()}
        backbone.body.load_state_dict(weights)
        images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            *_, last = backbone.body.eval()(images).values()
            torch.testing.assert_close(last, feature_map(one.backbone, images), rtol=1e-4, atol=1e-5)
            anchors = AnchorGenerator(((32,),) * len(backbone(images)), ((1.0,),) * len(backbone(images)))
            found = FasterRCNN(backbone, 3, min_size=64, rpn_anchor_generator=anchors).eval()([images[0]])
        assert set(found[0]) == {"boxes", "labels", "scores"}


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_timm_loads_it_for_features_only(name: str, tmp_path: Path) -> None:
    import timm

    one = student(f"timm/{name}")
    file = tmp_path / "f.safetensors"
    export(one, file, layout=None, pixels=64)
    model = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
    own = one.backbone.state_dict()
    for key, value in model.state_dict().items():
        theirs = key.removeprefix("model.").replace("stages_", "stages.").replace("stem_", "stem.")
        assert torch.equal(value, own[theirs]), key
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = model.eval()(images)
        expected = feature_map(one.backbone, images)
    assert maps[-1].shape == expected.shape
    if "vit" not in name:  # timm's maps of a vision transformer are those before the last norm
        torch.testing.assert_close(maps[-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("resnet18", "resnet18"), ("mobilenet_v2", "mobilenetv2_100"), ("timm/mobilenetv3_small_050", "mobilenetv3_small_050")],
)
def test_timm_loads_it_with_one_line(name: str, theirs: str, tmp_path: Path) -> None:
    import timm

    one = student(name)
    line = export(one, tmp_path / "f.safetensors", layout="timm", pixels=64)
    assert line == f'model = timm.create_model("{theirs}", num_classes=0, checkpoint_path="{tmp_path}/f.safetensors")'
    model = timm.create_model(theirs, num_classes=0, checkpoint_path=str(tmp_path / "f.safetensors"))
    assert same(one.backbone, model)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet18", None),
        ("mobilenet_v2", None),
        ("efficientnet_b0", None),
        ("densenet121", None),
        ("vit_b_32", None),
        ("googlenet", None),
        ("timm/vit_tiny_patch16_224", None),
        ("timm/convnext_atto", None),
        ("resnet18", "timm"),
        ("timm/resnet18", "torchvision"),
    ],
)
def test_a_classifier_takes_its_last_layer_along(name: str, layout: Any, tmp_path: Path) -> None:
    import timm
    import torchvision

    torch.manual_seed(0)
    one = Student(name, 7, head="classifier").eval()
    line = export(one, tmp_path / "f.safetensors", layout=layout, pixels=224)
    assert "7" in line
    names: dict[str, Any] = {"torchvision": torchvision, "timm": timm, "safetensors": __import__("safetensors.torch")}
    exec(line, names)  # noqa: S102  (the very line that users are given)
    images = torch.randn(2, 3, 224, 224) if name == "vit_b_32" else torch.randn(2, 3, 64, 64)
    again, _ = load_student(tmp_path / "f.safetensors")
    with torch.no_grad():
        expected = one.head(one.backbone(images))
        for got in (names["model"].eval()(images), again.head(again.backbone(images))):
            assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert again.spec["head"] == "classifier"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mobilenet_v3_small", {}),
        ("squeezenet1_1", {}),
        ("mnasnet0_5", {}),
        ("resnet18", {"stem": "small"}),
        ("mobilenet_v2", {"width": 0.5}),
    ],
)
def test_a_classifier_that_its_library_cannot_hold_is_a_student(name: str, options: Any, tmp_path: Path) -> None:
    one = student(name, head="classifier", **options)
    line = export(one, tmp_path / "f.safetensors", layout=None, pixels=64)
    assert line == f'student, pixels = fkd_ssl.load_student("{tmp_path}/f.safetensors")'
    again, _ = load_student(tmp_path / "f.safetensors")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(one.to(memory_format=torch.channels_last)(images), again(images))


@pytest.mark.parametrize("layout", [None, "timm"])
def test_it_is_a_student_again(layout: Any, tmp_path: Path) -> None:
    one = student("resnet18", stem="small", head="simreg")
    line = export(one, tmp_path / "f.safetensors", layout=layout, pixels=64)
    assert line.startswith("student, pixels = fkd_ssl.load_student(")
    again, pixels = load_student(tmp_path / "f.safetensors")
    assert pixels == 64
    assert not again.training
    assert same(one.backbone, again.backbone)


def test_a_narrow_reactnet_is_its_own_layout(tmp_path: Path) -> None:
    one = student("reactnet", width=0.125)
    export(one, tmp_path / "f.safetensors", layout=None, pixels=32)
    again, _ = load_student(tmp_path / "f.safetensors")
    assert again.spec == {"name": "reactnet", "width": 0.125}
    assert same(one.backbone, again.backbone)
    assert library("reactnet") == "fkd_ssl"


def test_the_same_export_gives_the_same_bytes_and_another_does_not_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    export(student("squeezenet1_1"), path, layout=None, pixels=64)
    before = path.read_bytes()
    export(student("squeezenet1_1"), path, layout=None, pixels=64)
    with pytest.raises(StoreError, match=r"f\.safetensors: exists with other content; delete it or choose another place"):
        export(student("squeezenet1_1"), path, layout=None, pixels=32)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "layout", "said"),
    [
        ("squeezenet1_1", "timm", r"layout timm: timm has no network identical to squeezenet1_1; leave out --layout"),
        ("reactnet_step1", "torchvision", r"layout torchvision: torchvision has no network identical to reactnet_step1"),
        ("timm/mobilenetv3_small_050", "torchvision", r"torchvision has no network identical"),
    ],
)
def test_what_a_library_lacks_is_refused(name: str, layout: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=said):
        export(
            Student(name, 8, width=0.125 if name.startswith("reactnet") else 1.0),
            tmp_path / "f.safetensors",
            layout=layout,
            pixels=64,
        )
    assert list(tmp_path.iterdir()) == []


def test_networks_of_one_shape_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """convnext_tiny has other names and the same shapes, up to a factor that timm applies elsewhere."""
    from fkd_ssl.students import export as module

    monkeypatch.setattr(module, "_same", lambda one, other: False)
    with pytest.raises(RequestError, match=r"timm has no network identical to resnet18"):
        export(student("resnet18"), tmp_path / "f.safetensors", layout="timm", pixels=64)


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"expected a .safetensors or .onnx file; write --out .*f\.safetensors"):
        export(student("squeezenet1_1"), tmp_path / "f.pth", layout=None, pixels=64)


def test_somebody_elses_file_is_no_student(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=r"f\.safetensors: not a file of fkd-ssl export \(no '"):
        load_student(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"pixels": None},
        {"pixels": "64"},
        {"pixels": -5},
        {"pixels": 10**12},
        {"pixels": True},
        {"pixels": 1.5},
        {"last_layer": "layer1"},
        {"last_layer": 3},
        {"name": 5},
        {"head": []},
    ],
)
def test_impossible_metadata_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    export(Student("squeezenet1_1", 3, head="classifier").eval(), path, layout=None, pixels=64)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[STUDENT_KEY])
    save_file(load_file(path), path, {STUDENT_KEY: json.dumps({**about, **change})})
    with pytest.raises(CheckpointError, match=r"f\.safetensors: not a file of fkd-ssl export \("):
        load_student(path)


def test_a_dimension_in_metadata_asks_for_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    export(Student("squeezenet1_1", 3, head="classifier").eval(), path, layout=None, pixels=64)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[STUDENT_KEY])
    save_file(load_file(path), path, {STUDENT_KEY: json.dumps({**about, "dim": 10**13})})
    assert load_student(path)[0].dims == [3]


def test_a_dimension_in_a_checkpoint_asks_for_no_memory(tmp_path: Path) -> None:
    one = Student("squeezenet1_1", 3, 5, head="classifier")
    weights = {f"student.{key}": value for key, value in one.state_dict().items()}
    about = {"name": "squeezenet1_1", "head": "classifier", "pixels": 64, "dim": [3, 5]}
    torch.save({STUDENT_KEY: about, "state_dict": weights}, tmp_path / "last.ckpt")
    assert load_student(tmp_path / "last.ckpt")[0].dims == [3, 5]
    torch.save({STUDENT_KEY: {**about, "dim": [3, 2**20]}, "state_dict": weights}, tmp_path / "last.ckpt")
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt: not a checkpoint of fkd-ssl train \(dim \[3, 1048576\], but no head"
    ):
        load_student(tmp_path / "last.ckpt")
