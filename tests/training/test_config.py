"""What a training's config refuses."""

from typing import Any

import pytest

from fkd_ssl.errors import RequestError
from fkd_ssl.training.config import TrainConfig


def make(**options: Any) -> TrainConfig:
    return TrainConfig(**{"images": "i", "out": "o", "store": "s", **options})


def test_defaults_are_s2bnns() -> None:
    config = make()
    assert (config.objective, config.optimizer, config.lr, config.weight_decay) == ("feature_kl", "adam", 3e-4, 0.0)
    assert (config.epochs, config.crops_per_image, config.batch_size, config.pixels) == (100, 4, 256, 224)


@pytest.mark.parametrize("name", ["epochs", "crops_per_image", "batch_size", "pixels", "lr", "knn_every", "knn_k", "log_every"])
@pytest.mark.parametrize("value", [0, -1])
def test_these_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(RequestError, match=rf"^{name} {value}: must be positive"):
        make(**{name: value})


@pytest.mark.parametrize("name", ["weight_decay", "warmup_epochs", "workers", "momentum"])
def test_these_must_not_be_negative(name: str) -> None:
    with pytest.raises(RequestError, match=rf"^{name} -1: must not be negative"):
        make(**{name: -1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10}, r"batch_size 10: counts crops, and must be a multiple of crops_per_image 4"),
        ({"store": None}, r"targets stored: --store is needed; make one with fkd-ssl precompute"),
        ({"targets": "online"}, r"targets online: --teacher is needed"),
        ({"epochs": 2, "warmup_epochs": 2}, r"warmup_epochs 2: must be fewer than epochs 2"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make(**options)
