"""A small real network as classifier, and its label maps of the shared images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fkd_ssl.images import scan
from fkd_ssl.relabel import LabelMaps, generate
from fkd_ssl.teachers import Teacher
from fkd_ssl.teachers.dense import DenseTeacher

PIXELS, CLASSES = 48, 12  # a map of 5 x 5 places


class Counting(DenseTeacher):
    """Counts its calls, and can be stopped in one of them."""

    calls = 0
    stop_at: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        return super().__call__(images)


def make_dense(seed: int = 0, classes: int = CLASSES, pixels: int = PIXELS, **about: Any) -> Counting:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=4),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, classes),
        )
        network[-1].weight.data *= 20  # larger logits
    teacher = Teacher(
        network,
        nn.Identity(),
        name="small",
        shape=(classes,),
        network="convolutions",
        pixels=pixels,
        kind="distribution",
        **{"checkpoint_sha256": f"{seed:064x}", "licence": "none", **about},
    )
    dense = Counting(teacher, pixels=pixels)
    dense.calls = 0
    return dense


@pytest.fixture(scope="session")
def new_dense() -> Callable[..., Counting]:
    """new_dense(seed=0, classes=12, pixels=48) -> a classifier with maps of 5 x 5 places."""
    return make_dense


@pytest.fixture(scope="session")
def maps_folder(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """Label maps of the shared images, k = 5 of 12 classes; to be read only."""
    folder = tmp_path_factory.mktemp("maps") / "maps"
    generate(scan(image_folder), folder, make_dense(), batch_size=7, progress=False)
    return folder


@pytest.fixture
def maps(maps_folder: Path) -> LabelMaps:
    return LabelMaps(maps_folder)
