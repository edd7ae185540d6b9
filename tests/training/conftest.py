"""Training runs of a few steps on the CPU: 24 small images, 16 crops in a batch, targets of the tiny teacher."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fkd_ssl.data import Crops, StoredCrops
from fkd_ssl.store import Store
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.engine import train
from fkd_ssl.training.metrics import read_metrics

STUDENT = "squeezenet1_1"  # fast, without BatchNorm, which would amplify rounding

Losses = list[float | None]


class Run:
    """A finished or interrupted training and its files."""

    def __init__(self, folder: Path, config: TrainConfig, data: Crops) -> None:
        self.folder = folder
        self.config = config
        self.data = data
        self.results: dict[str, Any] = {}

    def train(self, **options: Any) -> "Run":
        self.folder.mkdir(exist_ok=True)
        embed = options.pop("embed", None)
        given = {
            "targets": [TeacherInfo(name="tiny", spec=TargetSpec("embedding", (16,)))],
            "embeds": None if embed is None else [embed],
            **options,
        }
        self.results = train(self.config, self.data, self.folder, **given)
        return self

    @property
    def metrics(self) -> list[dict[str, float | None]]:
        return read_metrics(self.folder / "metrics.csv")

    def column(self, name: str) -> Losses:
        return [line[name] for line in self.metrics]

    def checkpoint(self, name: str = "last") -> dict[str, Any]:
        saved: dict[str, Any] = torch.load(self.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        return saved

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = self.checkpoint()["state_dict"]
        return weights


MakeRun = Callable[..., Run]


@pytest.fixture
def flat_store(make_store: Callable[..., Store], tmp_path: Path) -> Store:
    """Lossless, C = 4, D = 16, 24 pictures."""
    return make_store(tmp_path / "store", codec="Flat")


@pytest.fixture
def make_run(flat_store: Store, image_folder: Path, tmp_path: Path) -> MakeRun:
    """make_run(name, data=None, **options) -> a Run before training; 9 steps on stored targets by default."""

    def make(name: str = "run", data: Crops | None = None, **options: Any) -> Run:
        defaults: dict[str, Any] = {
            "images": str(image_folder),
            "store": str(flat_store.folder),
            "student": STUDENT,
            "epochs": 6,
            "pixels": 32,
            "crops_per_image": 2,
            "batch_size": 16,
            "lr": 1e-3,
            "workers": 0,
            "log_every": 1,
            "checkpoint_interval": 0,
        }
        config = TrainConfig(**{**defaults, **options}, out=str(tmp_path / name))
        if data is None:
            data = StoredCrops(
                flat_store,
                image_folder,
                crops_per_image=config.crops_per_image,
                pixels=config.pixels,
                seed=config.seed,
                with_targets=config.targets == "stored",
            )
        return Run(tmp_path / name, config, data)

    return make
