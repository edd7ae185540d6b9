"""Options that follow from the data: the rule, and that given options win."""

from typing import Any

import pytest

from fkd_ssl.comparison.config import CompareConfig
from fkd_ssl.errors import RequestError
from fkd_ssl.objectives import OBJECTIVES
from fkd_ssl.training import defaults
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.engine import check_batch


def resolved(images: int = 7000, **options: Any) -> TrainConfig:
    return defaults.resolve(TrainConfig(**{"images": "i", "out": "o", "store": "s", **options}), images=images, pixels=64)


@pytest.mark.parametrize(
    ("images", "batch_size", "lr", "warmup"), [(7000, 128, 3e-3, 1), (50_000, 128, 3e-3, 1), (50_001, 256, 3e-4, 0)]
)
def test_small_and_large_sets(images: int, batch_size: int, lr: float, warmup: float) -> None:
    config = resolved(images, epochs=30)
    assert (config.pixels, config.batch_size, config.lr, config.warmup_epochs) == (64, batch_size, lr, warmup)
    assert defaults.resolve(config, images=10, pixels=32) == config


def test_given_options_win() -> None:
    given = {"pixels": 96, "batch_size": 64, "lr": 0.5, "warmup_epochs": 0.0}
    config = resolved(**given)
    assert {name: getattr(config, name) for name in given} == given
    partly = resolved(batch_size=64)
    assert (partly.batch_size, partly.lr) == (64, 3e-3)


def test_a_sum_of_objectives_uses_the_smallest_rate() -> None:
    rates = {"feature_kl": 3e-3, "relational": 1e-3, "feature_kl + 0.5*relational(temperature=0.1)": 1e-3, "cosine": 3e-3}
    assert {objective: resolved(objective=objective).lr for objective in rates} == rates
    assert set(defaults.RATES) < set(OBJECTIVES)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_other_optimizers_need_a_learning_rate(optimizer: str) -> None:
    with pytest.raises(RequestError, match=rf"^optimizer {optimizer}: has no default learning rate; give --lr"):
        resolved(optimizer=optimizer, weight_decay=1e-4)
    assert resolved(optimizer=optimizer, weight_decay=1e-4, lr=0.1).lr == 0.1


@pytest.mark.parametrize(
    "options", [{}, {"crops_per_image": 1}, {"accumulate": 2}, {"crops_per_image": 2, "single_crop_epochs": 1}]
)
@pytest.mark.parametrize("images", [2, 5, 20, 33, 200])
def test_a_batch_fits_a_tiny_set(images: int, options: dict[str, Any]) -> None:
    config = resolved(images, **options)
    check_batch(config, images)
    assert config.batch_size <= 128


def test_compare_has_the_same_defaults() -> None:
    config = CompareConfig(images="i", val="v", teacher="t", out="o", objective="cosine", epochs=30)
    same = defaults.resolve(config, images=7000, pixels=64)
    train = resolved(objective="cosine", epochs=30)
    for name in ("pixels", "batch_size", "lr", "warmup_epochs"):
        assert getattr(same, name) == getattr(train, name)


def test_the_line_names_what_was_filled_in() -> None:
    given = TrainConfig(images="i", out="o", store="s", lr=0.1, epochs=30)
    used = defaults.resolve(given, images=7000, pixels=64)
    assert defaults.describe(given, used, 7000) == (
        "defaults for 7,000 images and feature_kl: pixels 64, batch_size 128, warmup_epochs 1"
    )
    assert defaults.describe(used, used, 7000) is None


def test_few_steps_are_reported() -> None:
    assert defaults.warn_of_few(500) is None
    assert "a training of 499 steps is short" in (defaults.warn_of_few(499) or "")


@pytest.mark.parametrize(
    ("batch_size", "m", "images", "warned"),
    [
        (32, 4, 1000, True),
        (128, 8, 1000, True),
        (128, 4, 1000, False),
        (32, 1, 1000, False),
        (8, 1, 1000, False),
        (32, 4, 8, False),
    ],
)
def test_several_crops_of_few_images_are_reported(batch_size: int, m: int, images: int, warned: bool) -> None:
    config = TrainConfig(images="i", out="o", store="s", lr=0.1, batch_size=batch_size, crops_per_image=m)
    line = defaults.warn_of_few_images(config, images)
    assert (line is not None) == warned
    if line is not None:
        assert f"a batch of {batch_size} crops has only {batch_size // m} different images" in line
