"""Options in groups: sections of YAML files, flat names elsewhere."""

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest

from fkd_ssl import options
from fkd_ssl.errors import RequestError
from fkd_ssl.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Left:
    a: int = 1
    EXECUTION: ClassVar[tuple[str, ...]] = ("a",)


@dataclass(frozen=True, kw_only=True)
class Right:
    b: int = 2
    c: int = 3
    EXECUTION: ClassVar[tuple[str, ...]] = ("c",)


@dataclass(frozen=True, kw_only=True)
class Both(Left, Right):
    GROUPS: ClassVar = {"left": Left, "right": Right}


def test_values_go_into_sections_and_back() -> None:
    values = {"b": 5, "a": 4}
    assert options.nested(values, Both) == {"left": {"a": 4}, "right": {"b": 5}}
    assert options.flat({"left": {"a": 4}, "right": {"b": 5}}, Both) == values
    assert options.flat({"left": None}, Both) == {}
    assert options.nested(values, Right) == options.flat(values, Right) == values


def test_what_groups_declare_is_joined() -> None:
    assert options.declared(Both, "EXECUTION") == {"a", "c"}
    assert options.declared(Both, "PATHS") == set()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"b": 1}, r"key 'b': belongs in the section 'right'; indent it below right:"),
        ({"left": 1}, r"section 'left': expected options below it, found 1"),
        ({"middle": {}}, r"no section 'middle'; there are left, right"),
        ({"left": {"b": 1}}, r"key 'b': belongs in the section 'right', not in 'left'"),
        ({"left": {"d": 1}}, r"no key 'd' in the section 'left'"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        options.flat(values, Both)


def test_every_option_of_a_training_is_in_one_group() -> None:
    names = [name for group in options.groups_of(TrainConfig).values() for name in group]
    assert sorted(names) == sorted(field.name for field in fields(TrainConfig))
    assert len(names) == len(set(names))


@pytest.mark.parametrize("group", TrainConfig.GROUPS.values())
def test_a_group_checks_itself(group: type) -> None:
    needed = {"images": "i", "out": "o", "store": "s"}
    given = {field.name: needed[field.name] for field in fields(group) if field.name in needed}
    group(**given)
    wrong = {"DataConfig": "pixels", "StudentConfig": "width", "OptimizerConfig": "lr", "EngineConfig": "devices"}
    wrong |= {"LoggingConfig": "knn_k", "TargetsConfig": "teacher_pixels"}
    if name := wrong.get(group.__name__):
        with pytest.raises(RequestError, match=rf"^{name} 0: must"):
            group(**given, **{name: 0})
