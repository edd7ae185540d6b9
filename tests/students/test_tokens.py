"""Heads for tokens: resizing against NumPy, positions, one forward pass, maps of the libraries' networks."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fkd_ssl.errors import RequestError
from fkd_ssl.options import Named
from fkd_ssl.students import Student, check_student
from fkd_ssl.students.student import resize

IMAGES = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def along(values: Any, length: int) -> Any:
    """Resizes the first axis, written out: linear between the centres of the cells, or means of the cells that overlap."""
    n = len(values)
    rows = []
    for k in range(length):
        if length > n:
            centre = min(max((k + 0.5) * n / length - 0.5, 0), n - 1)
            low = math.floor(centre)
            rows.append(values[low] + (centre - low) * (values[min(low + 1, n - 1)] - values[low]))
        else:
            rows.append(values[k * n // length : math.ceil((k + 1) * n / length)].mean(axis=0))
    return np.stack(rows)


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (7, 7), (14, 14), (8, 8), (4, 10)])
@pytest.mark.parametrize("grid", [(7, 7), (2, 5)])
def test_resize_is_linear_up_and_by_area_down(size: tuple[int, int], grid: tuple[int, int]) -> None:
    tokens = torch.randn(2, *size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = resize(tokens, grid).numpy()
    for image, expected in zip(found, tokens.numpy(), strict=True):
        rows = along(expected, grid[0])
        np.testing.assert_allclose(image, along(rows.swapaxes(0, 1), grid[1]).swapaxes(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "grid"), [(2, 8), (4, 7), (7, 14), (14, 7), (8, 4)])
def test_positions_do_not_shift(size: int, grid: int) -> None:
    """A map that contains each position's place in the crop is resized to the places of the grid's centres."""
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    found = resize(torch.stack([y, x], dim=-1)[None], (grid, grid))[0]
    expected = ((torch.arange(grid, dtype=torch.float64) + 0.5) / grid).clamp(0.5 / size, 1 - 0.5 / size)
    torch.testing.assert_close(found[:, :, 0], expected[:, None].expand(grid, grid))
    torch.testing.assert_close(found[:, :, 1], expected[None].expand(grid, grid))


@pytest.mark.parametrize("head", ["mocov2", "simreg", "classifier"])
def test_a_head_for_tokens_is_applied_at_each_position(head: str) -> None:
    student = Student("squeezenet1_1", 8, (3, 3, 5), head=head).eval()
    with torch.no_grad():
        vectors, tokens = student.embeddings(IMAGES)
        positions = student.map(IMAGES)
        assert positions.shape == (2, 3, 3, 512)
        assert positions.dtype == torch.float32
        for y, x in [(0, 0), (2, 1)]:
            expected = student.more_heads[0](positions[:, y, x])
            torch.testing.assert_close(tokens[:, y, x], nn.functional.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student(IMAGES), vectors)
        torch.testing.assert_close(positions.mean(dim=(1, 2)), student.features(IMAGES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 3, 3))


def test_all_heads_share_one_forward_pass() -> None:
    student = Student("squeezenet1_1", (2, 2, 5), 8, (3, 3, 4)).eval()
    calls = []
    first = next(part for part in student.backbone.modules() if isinstance(part, nn.Conv2d))
    first.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        outputs = student.embeddings(IMAGES)
    assert [output.shape[1:] for output in outputs] == [(2, 2, 5), (8,), (3, 3, 4)]
    assert len(calls) == 1
    assert torch.equal(student(IMAGES), outputs[0])


def test_a_head_for_tokens_changes_no_weight_of_the_backbone_and_the_first_head() -> None:
    states = []
    for dims in [(8,), (8, (2, 2, 4))]:
        torch.manual_seed(4)
        states.append(Student("squeezenet1_1", *dims).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        ("mobilenet_v3_small", 2, 576),
        ("shufflenet_v2_x0_5", 2, 1024),
        ("reactnet", 2, 1024),
        ("timm/mobilenetv3_small_050", 2, 288),  # its features have 1024 dimensions, after a layer behind the pooling
        ("timm/vit_tiny_patch16_224", 4, 192),
        ("timm/convnext_atto", 2, 320),
        ("timm/resnet10t", 2, 512),
    ],
)
def test_maps_of_the_libraries(name: str, size: int, channels: int) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    student = Student(name, (7, 7, 6)).train()
    tokens = student(IMAGES)
    assert tokens.shape == (2, 7, 7, 6)
    tokens[:, 3:].sum().backward()
    stem = next(p for p in student.backbone.parameters() if p.ndim == 4)
    assert stem.grad is not None
    assert stem.grad.abs().sum() > 0
    student.zero_grad(set_to_none=True)
    assert student.eval().map(IMAGES).shape == (2, size, size, channels)


def test_autocast_is_near_and_a_copy_is_independent() -> None:
    student = Student("squeezenet1_1", 8, (7, 7, 5)).eval()
    with torch.no_grad():
        expected = student.embeddings(IMAGES)[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = student.embeddings(IMAGES)[1]
        assert (found.float() * expected).sum(dim=-1).min() > 0.99
        copied = copy.deepcopy(student)
        assert torch.equal(copied.embeddings(IMAGES)[1], expected)


class Pooled(nn.Module):
    """A network without a map: pixels, pooled before the only layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(nn.functional.interpolate(images.mean(dim=1), 12).mean(dim=1))  # type: ignore[no-any-return]


def test_what_has_no_map_is_refused() -> None:
    check_student("squeezenet1_1", 64, (2, 2, 4))
    for name in ("squeezenet1_1", "mobilenet_v3_small"):
        check_student(name, 32, 4)
        with pytest.raises(RequestError, match=rf"student '{name}': .*no feature map for images of 32 x 32 px, or only one"):
            check_student(name, 32, (2, 2, 4))
    with pytest.raises(RequestError, match=r"student 'object:Pooled': .*has no feature map"):
        check_student(Named("object:Pooled", Pooled(), 64), 64, (2, 2, 4))
