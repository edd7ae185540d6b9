from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fkd_ssl.errors import RequestError
from fkd_ssl.teachers.layers import AtLayer, pool


class Loud(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("what comes after the layer is not run")


def test_a_layer_ends_the_forward() -> None:
    convolution = nn.Conv2d(3, 5, 3)
    network = nn.Sequential(nn.Sequential(convolution, nn.ReLU()), Loud())
    images = torch.rand(2, 3, 8, 8)
    got = AtLayer(network, "0.1", "mine")(images)
    torch.testing.assert_close(got, convolution(images).clamp(min=0).mean(dim=(2, 3)))


def test_layers_that_are_not_there_or_not_run() -> None:
    network = nn.ModuleDict({"body": nn.Conv2d(3, 5, 3), "unused": nn.Identity()})
    with pytest.raises(
        RequestError, match=r"teacher x: has no layer 'bodi'; did you mean body\? \(top-level layers: body, unu"
    ):
        AtLayer(network, "bodi", "x")

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"its layer unused was not reached"):
        AtLayer(Half(), "unused", "x")(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("shape", "mean"),
    [
        ((2, 7), lambda x: x),
        ((2, 9, 7), lambda x: x.sum(dim=1) / 9),
        ((2, 7, 4, 4), lambda x: x.sum(dim=(2, 3)) / 16),
        ((2, 4, 4, 7), lambda x: x.sum(dim=(1, 2)) / 16),
    ],
)
def test_outputs_become_one_vector_an_image(shape: tuple[int, ...], mean: Callable[[Tensor], Tensor]) -> None:
    output = torch.rand(shape)
    torch.testing.assert_close(pool(output), mean(output))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.rand(2, 4, 4, 4), r"gives \[2, 4, 4, 4\]: the dimension of the channels is ambiguous"),
        (torch.rand(2, 4, 5, 6), r"is ambiguous"),
        (torch.rand(2), r"gives \[2\], expected a tensor \[B, F\]"),
        ((torch.rand(2, 4),), r"gives tuple, expected a tensor"),
    ],
)
def test_outputs_of_unclear_layout_are_refused(output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pool(output)
