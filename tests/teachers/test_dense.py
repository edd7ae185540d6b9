"""Logits at each place compared with the last layer written out, and errors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.teachers import Teacher
from fkd_ssl.teachers.dense import DenseTeacher


def classifier(network: nn.Module, *, pixels: int = 64, dim: int = 10, **options: Any) -> Teacher:
    asked: dict[str, Any] = {"name": "mine", "network": "test", "kind": "distribution", **options}
    return Teacher(network, asked.pop("head", nn.Identity()), shape=(dim,), pixels=pixels, **asked)


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = make()
    return network


class Body(nn.Module):
    """Two convolutions, whose 24 channels are pooled by `pool` and classified by `last`."""

    def __init__(self, pool: Any = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 5, stride=4), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2), nn.ReLU())
        self.pool = pool or (lambda x: x.mean((2, 3)))
        self.last = last or nn.Linear(24, 10)

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.last(self.pool(self.body(images)))
        return answer


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_each_place_has_the_last_layer_of_its_features(images: Tensor) -> None:
    """The oracle loops over places in float64, with the normalisation written out."""
    network = seeded(Body)
    dense = DenseTeacher(classifier(network, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    found = dense(images)
    assert (found.dtype, found.shape, (dense.height, dense.width)) == (torch.float32, (3, 10, 7, 7), (7, 7))
    mean = torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1)
    std = torch.tensor((0.5, 0.6, 0.7)).view(3, 1, 1)
    with torch.no_grad():
        features = network.body((images / 255 - mean) / std).double()
        weight, bias = network.last.weight.double(), network.last.bias.double()
        for b in range(3):
            for y in range(7):
                for x in range(7):
                    expected = weight @ features[b, :, y, x] + bias
                    torch.testing.assert_close(found[b, :, y, x].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_the_mean_over_places_is_what_the_network_says(name: str, images: Tensor) -> None:
    """Pooled by a module, by a function and by Tensor.mean."""
    teacher = classifier(seeded(lambda: models.get_model(name, num_classes=10)))
    found = DenseTeacher(teacher)(images)
    assert found.shape == (3, 10, 2, 2)
    assert found.std(dim=(2, 3)).min() > 0
    torch.testing.assert_close(found.mean(dim=(2, 3)).softmax(dim=1), teacher.embed(images), rtol=1e-3, atol=1e-5)


def test_a_head_of_its_own_and_a_layer_without_bias(images: Tensor) -> None:
    network = seeded(lambda: Body(last=nn.Identity()))
    head = seeded(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(24, 10, bias=False)))
    teacher = classifier(network, head=head)
    torch.testing.assert_close(DenseTeacher(teacher)(images).mean(dim=(2, 3)).softmax(dim=1), teacher.embed(images))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_runs_in_the_teachers_precision(images: Tensor, precision: Any) -> None:
    network = seeded(Body)
    exact = DenseTeacher(classifier(network))(images)
    found = DenseTeacher(classifier(network, precision=precision))(images)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.01)


def test_other_sizes_give_other_maps(images: Tensor) -> None:
    dense = DenseTeacher(classifier(seeded(Body)), pixels=32)
    assert (dense.pixels, dense.height, dense.width) == (32, 3, 3)
    assert dense(images[:, :, :32, :32]).shape == (3, 10, 3, 3)


@pytest.mark.parametrize(
    ("network", "what"),
    [
        (lambda: models.mobilenet_v3_small(num_classes=10), "is not the mean of a map"),
        (lambda: models.squeezenet1_1(num_classes=10), "do not come from a linear layer"),
        (lambda: models.vit_b_32(image_size=64, num_classes=10), "is not the mean of a map"),
        (lambda: Body(last=nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 10))), "differs by up to "),
        (lambda: Body(pool=lambda x: x.amax((2, 3))), "differs by up to "),
        (lambda: Body(last=nn.Sequential(nn.Linear(24, 10), nn.Softplus())), "differs by up to "),
        (lambda: models.resnet18(num_classes=10), "images .here 32 px. large enough"),
    ],
    ids=["mobilenet_v3", "squeezenet", "vit", "norm behind the pooling", "maximum", "behind the logits", "one place"],
)
def test_another_network_is_refused(network: Any, what: str) -> None:
    pixels = 32 if "32 px" in what else 64
    with pytest.raises(RequestError, match=what):
        DenseTeacher(classifier(seeded(network), pixels=pixels))


def test_it_is_checked_in_every_call(images: Tensor) -> None:
    """A network may behave differently for another image."""
    network = seeded(Body)
    dense = DenseTeacher(classifier(network, precision="bf16"))
    network.pool = lambda x: x.mean((2, 3)).square()
    with pytest.raises(RequestError, match=r"from its logits of the image.*try --precision fp32"):
        dense(images)


def test_embeddings_are_refused() -> None:
    with pytest.raises(RequestError, match="gives embeddings; label maps need a classifier's logits"):
        DenseTeacher(classifier(seeded(Body), kind="embedding"))


def test_what_fails_is_the_teachers_error() -> None:
    with pytest.raises(FkdError, match="fails on crops of 2 x 2 px"):
        DenseTeacher(classifier(seeded(Body)), pixels=2)
    dense = DenseTeacher(classifier(seeded(Body)))
    with pytest.raises(FkdError, match="expected uint8"):
        dense(torch.zeros(1, 3, 64, 64))
