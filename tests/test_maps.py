"""Maps compared with what each library itself gives, from one forward pass, and what has no map."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from fkd_ssl import maps
from fkd_ssl.errors import RequestError
from fkd_ssl.maps import arrange, feature_map, features_and_map, to_grid
from fkd_ssl.students import Student

PIXELS = 64


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def noise(height: int = PIXELS, width: int = PIXELS, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


TORCHVISION = {
    "resnet18": ("layer4", 512),
    "mobilenet_v3_small": ("features", 576),
    "efficientnet_b0": ("features", 1280),
    "convnext_tiny": ("features", 768),
    "regnet_y_400mf": ("trunk_output", 440),
    "swin_t": ("permute", 768),
    "densenet121": ("relu", 1024),
    "shufflenet_v2_x0_5": ("conv5", 1024),
    "mnasnet0_5": ("layers", 1280),
}


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_torchvision_networks(name: str, size: tuple[int, int]) -> None:
    node, channels = TORCHVISION[name]
    network = seeded(lambda: models.get_model(name))
    images = noise(*size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's own, about layers after the node
        expected = create_feature_extractor(network, {node: "map"})(images)["map"]
    features, found = features_and_map(network, images)
    assert found.shape[1] == channels
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(features, network(images), rtol=0, atol=0)


def test_torchvision_vit() -> None:
    network = seeded(lambda: models.vit_b_32(image_size=96))
    tokens = create_feature_extractor(network, {"encoder": "tokens"})(noise(96, 96))["tokens"]
    expected = tokens[:, 1:].reshape(2, 3, 3, 768).permute(0, 3, 1, 2)
    torch.testing.assert_close(feature_map(network, noise(96, 96)), expected, rtol=0, atol=0)


TIMM_TOKENS = {
    "vit_tiny_patch16_224": (1, 192),
    "vit_small_patch14_reg4_dinov2": (5, 384),
    "vit_small_patch16_dinov3": (5, 384),
    "vit_base_patch32_siglip_256": (0, 768),
    "eva02_tiny_patch14_224": (1, 192),
    "deit_tiny_distilled_patch16_224": (2, 192),
}


@pytest.mark.parametrize("name", TIMM_TOKENS)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_timm_vision_transformers(name: str, grid: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm")
    prefix, width = TIMM_TOKENS[name]
    network = seeded(lambda: timm.create_model(name, num_classes=0, dynamic_img_size=True))
    (patch, _) = network.patch_embed.patch_size
    images = noise(grid[0] * patch, grid[1] * patch)
    tokens = network.forward_features(images)
    assert tokens.shape == (2, prefix + grid[0] * grid[1], width)
    assert network.num_prefix_tokens == prefix
    features, found = features_and_map(network, images)
    torch.testing.assert_close(features, network(images), rtol=0, atol=0)
    for row in range(grid[0]):
        for column in range(grid[1]):
            expected = tokens[:, prefix + row * grid[1] + column]
            torch.testing.assert_close(found[:, :, row, column], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "efficientnet_lite0"])
def test_timm_convolutional_networks(name: str) -> None:
    timm = pytest.importorskip("timm")
    network = seeded(lambda: timm.create_model(name, num_classes=0))
    features, found = features_and_map(network, noise())
    torch.testing.assert_close(found, network.forward_features(noise()), rtol=0, atol=0)
    torch.testing.assert_close(features, network(noise()), rtol=0, atol=0)
    assert found.shape == (2, network.num_features, 2, 2)


def test_timm_channels_last() -> None:
    """Even if the number of channels equals a side, as nothing but the declared format then tells them apart."""
    timm = pytest.importorskip("timm")
    network = seeded(lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=96))
    expected = network.forward_features(noise(96, 96)).permute(0, 3, 1, 2)
    assert expected.shape == (2, 768, 3, 3)
    torch.testing.assert_close(feature_map(network, noise(96, 96)), expected, rtol=0, atol=0)


def patches(image: Tensor, patch: int) -> Tensor:
    """Swaps the top left patch of the image for the bottom right one."""
    other = image.clone()
    other[..., :patch, :patch], other[..., -patch:, -patch:] = image[..., -patch:, -patch:], image[..., :patch, :patch]
    return other


def test_tokens_are_where_their_patches_are() -> None:
    """Without positions and attention between patches, swapped patches give swapped tokens."""
    timm = pytest.importorskip("timm")
    network = seeded(lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, depth=0))
    nn.init.zeros_(network.pos_embed)
    images = noise(48, 80)
    found, swapped = feature_map(network, images), feature_map(network, patches(images, 16))
    expected = patches(found, 1)
    assert not torch.allclose(found, expected)
    torch.testing.assert_close(swapped, expected, rtol=0, atol=0)


class Own(nn.Module):
    """A convolution to 4 x 4 patches of 8 channels, and an own way to one vector."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, stride=16)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.conv(images))


def with_class_tokens(x: Tensor) -> Tensor:
    return torch.cat([x.flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2)[:, :3]], dim=1).roll(3, dims=1)


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.mean((2, 3)),
        lambda x: nn.functional.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: x.permute(0, 2, 3, 1).mean((1, 2)),
        lambda x: x.amax((2, 3)),
        lambda x: nn.AdaptiveAvgPool2d(1)(nn.AdaptiveAvgPool2d(1)(x)).flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: nn.Flatten()(x),
        lambda x: x.flatten(2).mean(2),
        lambda x: x.flatten(2).transpose(1, 2).mean(1),
        lambda x: nn.AdaptiveAvgPool1d(1)(x.flatten(2)).flatten(1),
        lambda x: with_class_tokens(x)[:, 0],
        lambda x: with_class_tokens(x)[:, 3:].mean(1),
    ],
)
def test_own_modules(pool: Any) -> None:
    network = seeded(lambda: Own(pool))
    features, found = features_and_map(network, noise())
    torch.testing.assert_close(found, network.conv(noise()), rtol=0, atol=0)
    torch.testing.assert_close(features, network(noise()), rtol=0, atol=0)


def test_a_module_can_say_itself() -> None:
    class Says(nn.Module):
        def features_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images.mean((2, 3)), images[:, :, ::8, ::8]

    features, found = features_and_map(Says(), noise())
    assert (features.shape, found.shape) == ((2, 3), (2, 3, 8, 8))


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (lambda images: images.mean((2, 3)), r"returned \[\[2, 3\]\]; expected features \[B, F\] and a map"),
        (lambda images: (images.mean((2, 3)), images.flatten(1)), r"returned \[\[2, 3\], \[2, 12288\]\]"),
        (lambda images: (images.mean((2, 3)), [images]), r"returned \[\[2, 3\], 'list'\]"),
    ],
)
def test_a_method_that_returns_something_else(outputs: Any, said: str) -> None:
    network = nn.Identity()
    network.features_and_map = outputs
    with pytest.raises(RequestError, match=r"Identity.features_and_map: " + said):
        features_and_map(network, noise())


@pytest.mark.parametrize("name", ["reactnet", "squeezenet1_1", "vgg11", "timm/vit_tiny_patch16_224", "convnext_tiny"])
def test_students(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    backbone = seeded(lambda: Student(name, 8)).backbone
    features, found = features_and_map(backbone, noise())
    assert (features.ndim, found.ndim, len(found)) == (2, 4, 2)
    assert found.shape[2] > 1


@pytest.mark.parametrize("layers", [(nn.Flatten(), nn.Linear(12288, 4)), (nn.Conv2d(3, 8, 64), nn.Flatten())])
def test_without_a_map(layers: tuple[nn.Module, ...]) -> None:
    with pytest.raises(RequestError, match=r"Sequential: has no feature map for images of 64 x 64 px.*features_and_map"):
        features_and_map(nn.Sequential(*layers), noise())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_one_position_is_no_map(name: str) -> None:
    """Not even if an earlier map of several positions was pooled, as by squeeze-and-excitation."""
    with pytest.raises(RequestError, match="has no feature map for images of 32 x 32 px, or only one position"):
        features_and_map(seeded(lambda: models.get_model(name)), noise(32, 32))


@pytest.mark.parametrize("name", ["resnet18", "timm/vit_tiny_patch16_224", "torch_vit"])
def test_gradients_autocast_double_and_train_mode(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    make = (lambda: models.vit_b_32(image_size=64)) if name == "torch_vit" else lambda: Student(name, 8).backbone
    network = seeded(make).train()
    features, found = features_and_map(network, noise())
    (features.sum() + found.square().sum()).backward()
    first = next(network.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, low = features_and_map(network.eval(), noise())
    exact = feature_map(network.double(), noise().double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(feature_map(network.float(), noise()).double(), exact, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(low.double(), exact, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("name", ["own", "timm/vit_tiny_patch16_224"])
def test_compiled_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    make = (lambda: Own(lambda x: x.mean((2, 3)))) if name == "own" else lambda: Student(name, 8).backbone
    network = seeded(make)
    features, found = features_and_map(network, noise())
    frames: list[str] = []
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args: compiler(*args, backend=lambda graph, _: frames.append("") or graph))
    maps._compiled_read.cache_clear()
    network.compile()
    torch.testing.assert_close(features_and_map(network, noise()), (features, found), rtol=1e-4, atol=1e-5)
    assert (count := len(frames)) > 0
    torch.testing.assert_close(features_and_map(network, noise()), (features, found), rtol=1e-4, atol=1e-5)
    assert len(frames) == count
    maps._compiled_read.cache_clear()


def test_to_grid_averages_areas() -> None:
    found = to_grid(torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).reshape(2, 3, 4, 6), (2, 3))
    given = torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).reshape(2, 3, 4, 6)
    assert found.shape == (2, 2, 3, 3)
    for row in range(2):
        for column in range(3):
            cell = given[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((2, 3))
            torch.testing.assert_close(found[:, row, column], cell)


def test_tokens_that_fit_no_rectangle() -> None:
    assert arrange(torch.zeros(1, 17, 4), (64, 64)) is None
    assert arrange(torch.zeros(1, 17, 4), (64, 64), prefix=1).shape == (1, 4, 4, 4)
    assert arrange(torch.zeros(1, 12, 4), (63, 64)).shape == (1, 4, 3, 4)
