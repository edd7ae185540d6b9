"""A pretraining of six steps on sixteen small images, by every method."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fkd_ssl.pretraining.config import PretrainConfig
from fkd_ssl.pretraining.engine import pretrain

OWN: dict[str, dict[str, Any]] = {
    "mocov2": {"lr": 0.01, "queue": 8},
    "swav": {"lr": 0.5, "queue": 8, "queue_epoch": 1, "prototypes": 12, "frozen_epochs": 0.5, "small_crops": 2},
}

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images of smooth random colours; 64 under `more`."""
    folder = tmp_path_factory.mktemp("pretrain")
    generator = np.random.default_rng(0)
    for name, count in (("images", 16), ("more", 64)):
        (folder / name).mkdir()
        for i in range(count):
            small = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            small.resize((24, 24), Image.Resampling.BICUBIC).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def make_config(folder: Path) -> MakeConfig:
    """make_config(out="run", method="mocov2", **changes) -> PretrainConfig."""

    def make(out: str = "run", method: str = "mocov2", **changes: Any) -> PretrainConfig:
        options: dict[str, Any] = {
            "epochs": 3,
            "checkpoint_interval": 0,
            "batch_size": 8,
            "pixels": 16,
            "dim": 32,
            "workers": 0,
            "log_every": 1,
            "method": method,
            **OWN[method],
        }
        return PretrainConfig(images=str(folder / "images"), out=str(folder / out), **{**options, **changes})

    return make


@pytest.fixture(scope="session")
def trained(folder: Path, make_config: MakeConfig) -> Callable[[str], Path]:
    """trained(method) -> the checkpoint of that method's run, trained once."""
    done: dict[str, Path] = {}

    def train(method: str) -> Path:
        if method not in done:
            done[method] = pretrain(make_config(f"run-{method}", method))
        return done[method]

    return train
