"""Invalid configs of a training."""

from typing import Any

import pytest

from fkd_ssl.errors import RequestError
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.groups import checkpoints_of


def make(**options: Any) -> TrainConfig:
    return TrainConfig(**{"images": "i", "out": "o", "store": "s", **options})


def test_defaults_are_s2bnns_or_follow_from_the_data() -> None:
    config = make()
    assert (config.objective, config.optimizer, config.weight_decay) == (None, "adam", 0.0)
    assert (config.epochs, config.crops_per_image) == (100, 4)
    assert (config.pixels, config.batch_size, config.lr, config.warmup_epochs) == (None, None, None, None)


@pytest.mark.parametrize("name", ["epochs", "crops_per_image", "batch_size", "pixels", "lr", "knn_every", "knn_k", "log_every"])
@pytest.mark.parametrize("value", [0, -1])
def test_these_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(RequestError, match=rf"^{name} {value}: must be positive"):
        make(**{name: value})


@pytest.mark.parametrize("name", ["weight_decay", "warmup_epochs", "workers", "momentum", "mixup", "cutmix"])
def test_these_must_not_be_negative(name: str) -> None:
    with pytest.raises(RequestError, match=rf"^{name} -1: must be at least 0, and finite"):
        make(**{name: -1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10}, r"batch_size 10: counts crops, and must be a multiple of crops_per_image 4"),
        ({"store": None}, r"targets stored: --store is needed; make one with fkd-ssl precompute"),
        ({"targets": "online"}, r"targets online: --teacher is needed"),
        ({"epochs": 2, "warmup_epochs": 2}, r"warmup_epochs 2: must be fewer than epochs 2"),
        ({"lr": float("nan")}, r"lr nan: must be positive and finite"),
        ({"clip": float("inf")}, r"clip inf: must be positive and finite"),
        ({"mixup": float("nan")}, r"mixup nan: must be at least 0, and finite"),
        ({"lr_decay": "30,20"}, r"lr_decay '30,20': expected cosine, linear, or increasing epochs such as 120,240"),
        ({"lr_decay": "30,x"}, r"lr_decay '30,x': expected cosine, linear, or increasing epochs"),
        ({"lr_decay": "0,30"}, r"lr_decay '0,30': expected cosine, linear, or increasing epochs"),
        ({"lr_decay": "nan"}, r"lr_decay 'nan': expected cosine, linear, or increasing epochs"),
        ({"lr_decay": "30,100"}, r"lr_decay 30,100: the last one must come before epochs 100"),
        ({"label_smoothing": 0.1}, r"label_smoothing 0.1: is for --targets labels, or --calibrate_below"),
        ({"label_smoothing": 1.0, "targets": "labels"}, r"label_smoothing 1.0: must be at least 0 and below 1"),
        ({"calibrate_below": 0.0}, r"calibrate_below 0.0: must be between 0 and 1"),
        (
            {"targets": "labels", "calibrate_below": 0.5},
            r"calibrate_below 0.5: is not used with --targets labels; leave it out",
        ),
        ({"targets": "labels", "teacher": "a"}, r"teacher a: is not used with --targets labels; leave it out"),
        ({"teacher": "a"}, r"teacher a: is not used with --targets stored; name a column of the store with --column"),
        ({"targets": "online", "teacher": "a", "column": "b"}, r"column b: is not used with --targets online; leave it out"),
        ({"targets": "relabel", "store": None}, r"targets relabel: --label_maps is needed; make them with fkd-ssl label-maps"),
        ({"label_maps": "m"}, r"label_maps m: is for --targets relabel"),
        ({"targets": "relabel", "label_maps": "m"}, r"store s: is not used with --targets relabel; leave it out"),
        (
            {"targets": "relabel", "label_maps": "m", "store": None, "teacher": "a"},
            r"teacher a: is not used with --targets relabel",
        ),
        ({"targets": "labels", "record": "new", "store": None}, r"record new: needs --targets online"),
        ({"column": "a", "teacher_weights": "1"}, r"teacher_weights '1': there is only one teacher; leave it out"),
        ({"teacher_weights": "1"}, r"teacher_weights '1': there is only one teacher"),
        ({"column": "a,,b"}, r"'a,,b': has an empty part; write A,B"),
        (
            {"column": "a,b", "teacher_weights": "1"},
            r"teacher_weights '1': expected a positive number for each of the 2 teachers",
        ),
        ({"column": "a,b", "teacher_weights": "1,0"}, r"expected a positive number for each of the 2 teachers \(a,b\)"),
        ({"column": "a,b", "teacher_weights": "1,x"}, r"expected a positive number for each"),
        ({"column": "a,b", "teacher_weights": "1,inf"}, r"expected a positive number for each"),
        (
            {"targets": "online", "teacher": "a,b", "checkpoint": "F"},
            r"checkpoint 'F': 1 for 2 teachers \(a,b\); pass one for each",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make(**options)


def test_weights_sum_to_one_and_are_equal_by_default() -> None:
    assert make().weights(1) == [1.0]
    assert make(column="a,b").weights(2) == [0.5, 0.5]
    assert make(column="a, b,c", teacher_weights="2, 1, 1").weights(3) == [0.5, 0.25, 0.25]


def test_each_teacher_has_its_checkpoint() -> None:
    assert checkpoints_of("a", None) == [None]
    assert checkpoints_of("a", "with,comma.pth") == ["with,comma.pth"]
    assert checkpoints_of("a,b", None) == [None, None]
    assert checkpoints_of("a,b", "F, G") == ["F", "G"]
    assert checkpoints_of("a,b", ",G") == [None, "G"]
