import math
from typing import Any

import pytest

from fkd_ssl.errors import RequestError
from fkd_ssl.pretraining.config import METHODS, PretrainConfig


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_its_published_settings_and_none_of_the_others(method: Any) -> None:
    config = PretrainConfig(images="i", out="o", method=method)
    for other, own in METHODS.items():
        for name, value in own.items():
            if other == method:
                assert getattr(config, name) == value
            elif name not in METHODS[method]:
                assert getattr(config, name) is None


def test_what_is_given_stands() -> None:
    config = PretrainConfig(images="i", out="o", method="swav", lr=0.3, prototypes=100, queue=0)
    assert (config.lr, config.prototypes, config.queue, config.temperature) == (0.3, 100, 0, 0.1)


def test_adamw_has_the_settings_of_moco_v3() -> None:
    config = PretrainConfig(images="i", out="o", optimizer="adamw")
    assert (config.lr, config.weight_decay, config.temperature) == (1.5e-4, 0.1, 0.2)
    assert PretrainConfig(images="i", out="o", optimizer="adamw", weight_decay=0.0).weight_decay == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "swav", "optimizer": "adamw"}, r"optimizer adamw: is for mocov2; swav always uses LARS"),
        ({"warmup_epochs": -1}, r"warmup_epochs -1: must be at least 0"),
        ({"epochs": 3, "warmup_epochs": 3}, r"warmup_epochs 3: must be fewer than epochs 3"),
        ({"epochs": 0}, r"epochs 0: must be positive"),
        ({"workers": -1}, r"workers -1: must be at least 0, and finite"),
        ({"lr": math.nan}, r"lr nan: must be positive and finite"),
        ({"epochs": math.inf}, r"epochs inf: must be positive and finite"),
        ({"batch_size": 1}, r"BatchNorm needs at least 2"),
        ({"momentum": 1.0}, r"momentum 1\.0: must be positive and below 1"),
        ({"queue": 0}, r"queue 0: must be positive"),
        ({"prototypes": 300}, r"prototypes 300: mocov2 has no such option; it belongs to swav"),
        ({"method": "swav", "momentum": 0.99}, r"momentum 0\.99: swav has no such option; it belongs to mocov2"),
        ({"method": "swav", "prototypes": 0}, r"prototypes 0: must be positive"),
        ({"method": "swav", "queue": -1}, r"queue -1: must be at least 0, and finite"),
        ({"method": "swav", "small_crops": -1}, r"small_crops -1: must be at least 0, and finite"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        PretrainConfig(images="i", out="o", **changes)
