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
