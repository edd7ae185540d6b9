"""Tiny image sets whose classes are colours, and a backbone that distinguishes them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fkd_ssl import images

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40), "sand": (200, 190, 120)}

MakeSet = Callable[..., images.Folder]


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    def make(name: str, per_class: int = 6, classes: tuple[str, ...] = tuple(COLOURS), seed: int = 0) -> images.Folder:
        generator = np.random.default_rng(seed)
        for label in classes:
            folder = tmp_path / name / label
            folder.mkdir(parents=True)
            for i in range(per_class):
                height, width = generator.integers(20, 50, size=2)
                noise = generator.normal(0, 40, size=(height, width, 3)) + np.array(COLOURS[label])
                Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        return images.scan(tmp_path / name)

    return make


class Backbone(nn.Module):
    """Pooled features [B, 16] with a BatchNorm, whose statistics reveal a forward pass in train mode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.body(pixels.float() / 127.5 - 1).mean(dim=(2, 3))


@pytest.fixture
def backbone() -> Backbone:
    return Backbone()


SHAPES = {0: (70, 70, 70), 1: (200, 60, 50), 2: (50, 190, 70), 3: (60, 70, 210)}
"""Label -> colour: background, squares, discs, bars."""


def write_shapes(folder: Path, count: int, seed: int = 0, height: int = 60, width: int = 80) -> None:
    """Writes `images/N.png`, shapes whose colour is their class under noise, and `masks/N.png` with a void frame of 255."""
    generator = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        labels = np.zeros((height, width), dtype=np.uint8)
        top, left = generator.integers(2, height - 30), generator.integers(2, width - 30)
        labels[top : top + 26, left : left + 26] = 1
        labels[(y - generator.integers(15, 45)) ** 2 + (x - generator.integers(15, 65)) ** 2 < 13**2] = 2
        bar = generator.integers(0, width - 14)
        labels[:, bar : bar + 14] = 3
        pixels = np.array([SHAPES[label] for label in range(4)])[labels] + generator.normal(0, 40, (height, width, 3))
        labels[:2] = labels[-2:] = 255
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray(labels).save(folder / "masks" / f"{i}.png")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` (16 images) and `val` (6), each with `images` and `masks` of four classes and 255; to be read only."""
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder / "train", 16)
    write_shapes(folder / "val", 6, seed=1)
    return folder
