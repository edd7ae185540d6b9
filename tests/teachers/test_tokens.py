"""Teachers of tokens compared with the library's own maps, pooled cell by cell; what they refuse."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.targets.sharing import embed_all
from fkd_ssl.teachers import Teacher, load_teacher
from fkd_ssl.teachers.ensemble import Ensemble
from fkd_ssl.teachers.own import as_teacher
from fkd_ssl.teachers.tokens import as_tokens, set_grid

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def file_of(network: nn.Module, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def cells(found: Tensor, grid: int) -> Tensor:
    """Means of a map [B, F, h, w] over equal cells, each normalised, in a loop."""
    side = found.shape[2] // grid
    out = torch.empty(len(found), grid, grid, found.shape[1])
    for row in range(grid):
        for column in range(grid):
            mean = found[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side].mean((2, 3))
            out[:, row, column] = mean / mean.norm(dim=1, keepdim=True)
    return out


def test_a_cnn_of_torchvision(images: Tensor, tmp_path: Path) -> None:
    network = models.resnet18().eval()
    teacher = load_teacher("torchvision/resnet18@tokens", checkpoint=file_of(network, tmp_path))
    assert str(teacher.info.spec) == "7 x 7 tokens, D = 512"
    assert teacher.info.name == "resnet18-tokens"
    body = nn.Sequential(*list(network.children())[:-2])
    with torch.no_grad():
        expected = body((images / 255 - MEAN) / STD)
    torch.testing.assert_close(teacher.map(images), expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher.embed(images), cells(expected, 7), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher.features(images), expected.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_a_named_layer(images: Tensor, tmp_path: Path) -> None:
    network = models.resnet18().eval()
    teacher = load_teacher("torchvision/resnet18@layer3@tokens", checkpoint=file_of(network, tmp_path), grid=14)
    body = nn.Sequential(*list(network.children())[:-3])
    with torch.no_grad():
        expected = cells(body((images / 255 - MEAN) / STD), 14)
    torch.testing.assert_close(teacher.embed(images), expected, rtol=1e-4, atol=1e-5)
    assert teacher.info.name == "resnet18-layer3-tokens"


@pytest.mark.parametrize(("name", "grid"), [("vit_tiny_patch16_224", 7), ("vit_small_patch16_dinov3", 14)])
def test_a_vision_transformer_of_timm(name: str, grid: int, images: Tensor, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    teacher = load_teacher(f"timm/{name}@tokens", checkpoint=file_of(network, tmp_path), grid=grid)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (teacher.info.mean, teacher.info.std))
    with torch.no_grad():
        tokens = network.forward_features((images / 255 - mean) / std)[:, network.num_prefix_tokens :]
    expected = cells(tokens.reshape(2, 14, 14, -1).permute(0, 3, 1, 2), grid)
    torch.testing.assert_close(teacher.embed(images), expected, rtol=1e-4, atol=1e-4)


def test_families_and_presets(tmp_path: Path, images: Tensor) -> None:
    """The head of a MoCo checkpoint does not belong to its map."""
    network = models.resnet18()
    network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16))
    state = {f"module.encoder_q.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "moco.pth.tar")
    teacher = load_teacher("mocov2@tokens", checkpoint=tmp_path / "moco.pth.tar")
    assert teacher.embed(images).shape == (2, 7, 7, 512)
    assert not teacher.info.arrays


def counting(teacher: Teacher) -> list[int]:
    calls: list[int] = []
    teacher.backbone.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    return calls


@pytest.mark.parametrize("kind", ["embedding", "distribution"])
def test_global_targets_and_tokens_come_from_one_forward_pass(kind: str, images: Tensor) -> None:
    """And have the same bits as those of separate passes."""
    network = models.resnet18(num_classes=8).eval()
    teacher = Teacher(network, nn.Identity(), name="mine", shape=(8,), kind=kind)
    tokens, fine = as_tokens(teacher), as_tokens(teacher, name="coarse")
    set_grid([fine], 3)
    alone = [each.embed(images) for each in (teacher, tokens, fine)]
    calls = counting(teacher)
    found = embed_all([each.embed for each in (teacher, tokens, fine)], images)
    assert calls == [2]
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_teachers_that_see_other_pixels_do_not_share(images: Tensor) -> None:
    network = models.resnet18(num_classes=8).eval()
    teachers = [Teacher(network, nn.Identity(), name="a", shape=(8,), mean=mean) for mean in ((0, 0, 0), (0.5, 0.5, 0.5))]
    calls = counting(teachers[0])
    one, other = embed_all([teacher.embed for teacher in teachers], images)
    assert calls == [2, 2]
    assert not torch.allclose(one, other)


@dataclass
class Scaled:
    """A teacher that can be compared, and so has no hash."""

    factor: int
    calls: int = field(default=0, compare=False)

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * images.float().mean((2, 3))


def test_a_callable_without_a_hash_runs_once(images: Tensor) -> None:
    one, other = Scaled(2), Scaled(2)
    found = embed_all([one, other, one, one.__call__, one.__call__], images)
    assert all(torch.equal(targets, 2 * images.float().mean((2, 3))) for targets in found)
    assert (one.calls, other.calls) == (2, 1)  # an object and its method are two functions


def test_own_modules(images: Tensor) -> None:
    """A module that returns its map, and one whose map is found."""
    body = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.ReLU())
    whole = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in (body, whole):
        module.kind = "tokens"
        teacher = as_teacher(module, "mine:net", "net")
        with torch.no_grad():
            expected = cells(body((images / 255 - MEAN) / STD), 7)
        torch.testing.assert_close(teacher.embed(images), expected, rtol=1e-4, atol=1e-5)
        assert teacher.info.name == "net"
    del whole.kind
    torch.testing.assert_close(as_tokens(as_teacher(whole, "mine:net", "net")).embed(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_tokens_are_normalised_floats_in_any_precision(precision: Any, images: Tensor) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.ReLU())
    module.kind = "tokens"
    found = as_teacher(module, "mine:net", "net", precision=precision).embed(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 7, 7), rtol=1e-4, atol=1e-4)


def test_a_mirrored_map_is_not_the_map_of_the_mirrored_image(images: Tensor) -> None:
    """So the flip belongs to the crop that the teacher sees, and a stored map must not be mirrored later."""
    teacher = as_tokens(Teacher(models.resnet18().eval(), nn.Identity(), name="net", shape=(1000,)))
    of_mirrored, mirrored = teacher.embed(images.flip(3)), teacher.embed(images).flip(2)
    assert (of_mirrored * mirrored).sum(-1).mean() < 0.9


def test_a_grid_that_is_too_fine(images: Tensor) -> None:
    teacher = as_tokens(Teacher(models.resnet18().eval(), nn.Identity(), name="net", shape=(1000,)))
    with pytest.raises(
        RequestError,
        match="teacher net-tokens: its feature map has 3 x 3 positions for crops of 96 x 96 px; a grid of 7 x 7 is too fine: "
        "choose --grid 3, or larger crops",
    ):
        teacher.embed(images[:, :, :96, :96])


def test_teachers_without_a_map(images: Tensor, tmp_path: Path) -> None:
    flat = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 4)), nn.Identity(), name="flat", shape=(4,))
    with pytest.raises(RequestError, match="teacher flat: Sequential: has no feature map for images of 224 x 224 px"):
        as_tokens(flat)
    labels = [Teacher(models.resnet18(), nn.Identity(), name=name, shape=(1000,), kind="distribution") for name in "ab"]
    with pytest.raises(RequestError, match="an ensemble has no feature map; name one network"):
        as_tokens(Ensemble(labels))
    with pytest.raises(RequestError, match="an ensemble has no feature map"):
        Ensemble(labels).map(images)
    with pytest.raises(FkdError, match="fails on"):
        as_tokens(Teacher(nn.Linear(3, 4), nn.Identity(), name="odd", shape=(4,)))


@pytest.mark.parametrize("grid", [0, -1])
def test_an_invalid_grid(grid: int, tmp_path: Path) -> None:
    path = file_of(models.resnet18(), tmp_path)
    with pytest.raises(RequestError, match=f"--grid {grid}: must be at least 1"):
        load_teacher("torchvision/resnet18@tokens", checkpoint=path, grid=grid)


def test_a_grid_without_tokens(tmp_path: Path) -> None:
    path = file_of(models.resnet18(), tmp_path)
    with pytest.raises(RequestError, match=r"--grid 3: no teacher gives tokens \(resnet18\): name one NAME@tokens"):
        load_teacher("torchvision/resnet18", checkpoint=path, grid=3)
