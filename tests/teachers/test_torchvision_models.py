"""Random torchvision classifiers against torchvision called directly, with the normalisation written out."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from fkd_ssl.checkpoints import digest
from fkd_ssl.errors import CheckpointError, FkdError, RequestError
from fkd_ssl.teachers import load_teacher


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def saved(name: str, path: Path, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = models.get_model(name, weights=None, **options).eval()
    torch.save(network.state_dict(), path)
    return network


def normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize(
    ("name", "last", "dim", "options"),
    [
        ("resnet18", "fc", 512, {}),
        ("vit_b_32", "heads.head", 768, {}),
        ("convnext_tiny", "classifier.2", 768, {}),
        ("mobilenet_v3_small", "classifier.3", 1024, {}),
        ("googlenet", "fc", 1024, {"transform_input": True, "aux_logits": True, "init_weights": False}),
    ],
)
def test_features_are_what_the_last_linear_layer_is_given(
    name: str, last: str, dim: int, options: Any, images: Tensor, tmp_path: Path
) -> None:
    network = saved(name, tmp_path / "w.pth", **options)
    teacher = load_teacher(f"torchvision/{name}", checkpoint=tmp_path / "w.pth")
    preset = models.get_model_weights(name).DEFAULT.transforms()
    assert (teacher.info.mean, teacher.info.std, teacher.info.pixels) == (
        tuple(preset.mean),
        tuple(preset.std),
        preset.crop_size[0],
    )
    assert preset.interpolation.value in teacher.info.network
    assert (teacher.info.name, teacher.info.spec.size, teacher.feature_dim, teacher.info.source) == (
        name,
        dim,
        dim,
        f"torchvision/{name}",
    )
    assert (teacher.info.checkpoint, teacher.info.checkpoint_sha256) == ("w.pth", digest(tmp_path / "w.pth"))
    given: list[Tensor] = []
    network.get_submodule(last).register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    with torch.inference_mode():
        network(normalised(images, preset.mean, preset.std))
    torch.testing.assert_close(teacher.features(images), given[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher.embed(images), nn.functional.normalize(given[0], dim=1), rtol=0, atol=1e-5)


def test_a_named_layer(images: Tensor, tmp_path: Path) -> None:
    network: Any = saved("resnet18", tmp_path / "w.pth")
    teacher = load_teacher("torchvision/resnet18@layer3", checkpoint=tmp_path / "w.pth")
    assert (teacher.info.name, teacher.info.spec.size) == ("resnet18-layer3", 256)
    assert "layer3" in teacher.info.network
    with torch.inference_mode():
        x = normalised(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        x = network.maxpool(network.bn1(network.conv1(x)).relu())
        x = network.layer3(network.layer2(network.layer1(x)))
    torch.testing.assert_close(teacher.features(images), x.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_its_own_weights_only_when_asked_and_never_unpickled(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = models.ResNet18_Weights.DEFAULT
    with pytest.raises(
        RequestError, match=rf"--checkpoint is needed: .*or pretrained, which lets torchvision download {weights.url}"
    ):
        load_teacher("torchvision/resnet18")
    place = tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2]  # torch.hub's cache folder
    place.parent.mkdir(parents=True)
    saved("resnet18", place)
    teacher = load_teacher("torchvision/resnet18", checkpoint="pretrained")
    same = load_teacher("torchvision/resnet18", checkpoint=place)
    assert torch.equal(teacher.embed(images), same.embed(images))
    assert (teacher.info.checkpoint, teacher.info.source) == (
        "pretrained",
        "torchvision/resnet18 (ResNet18_Weights.IMAGENET1K_V1)",
    )

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "boom"),)

    torch.save({"fc.weight": Bomb()}, place)
    with pytest.raises(FkdError, match=r"could not download its weights"):
        load_teacher("torchvision/resnet18", checkpoint="pretrained")
    assert not (tmp_path / "boom").exists()


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    with pytest.raises(
        FkdError, match=r"could not download.*Without a network: download https://\S+ .* pass the file as --check"
    ):
        load_teacher("torchvision/resnet18", checkpoint="pretrained")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet19", r"torchvision has no such classifier; did you mean resnet1"),
        ("torchvision/fasterrcnn_resnet50_fpn", r"torchvision has no such classifier"),
        ("torchvision/", r"expected torchvision/NAME or torchvision/NAME@LAYER"),
        ("torchvision/resnet18@", r"expected torchvision/NAME or torchvision/NAME@LAYER"),
        ("torchvison/resnet18", r"teacher 'torchvison/resnet18' is unknown; did you mean torchvision/resnet18\?"),
        ("torchvision/resnet18@layer9", r"has no layer 'layer9'; did you mean layer"),
        ("torchvision/squeezenet1_1", r"its classifier is not a linear layer: name the layer, torchvision/squeezenet1_1@LAYER"),
    ],
)
def test_what_is_refused(name: str, message: str, tmp_path: Path) -> None:
    network = name.partition("/")[2].partition("@")[0]
    saved(network if network == "squeezenet1_1" else "resnet18", tmp_path / "w.pth")
    with pytest.raises(RequestError, match=message):
        load_teacher(name, checkpoint=tmp_path / "w.pth")


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    saved("resnet34", tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"not the state_dict of torchvision/resnet18: .*unexpected \(layer1\.2\.conv1\.w"
    ):
        load_teacher("torchvision/resnet18", checkpoint=tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "vit_b_32"])
def test_probabilities_are_the_softmax_of_the_whole_classifier(name: str, images: Tensor, tmp_path: Path) -> None:
    network = saved(name, tmp_path / "w.pth")
    teacher = load_teacher(f"torchvision/{name}@probabilities", checkpoint=tmp_path / "w.pth")
    assert (teacher.info.spec.kind, teacher.info.spec.size, teacher.info.name) == (
        "distribution",
        1000,
        f"{name}-probabilities",
    )
    preset = models.get_model_weights(name).DEFAULT.transforms()
    with torch.inference_mode():
        expected = network(normalised(images, preset.mean, preset.std)).softmax(dim=1)
    torch.testing.assert_close(teacher.embed(images), expected, rtol=1e-4, atol=1e-7)
