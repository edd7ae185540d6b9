"""Lists of names: their order, repeated names and checks, without Python strings; classes from texts."""

import numpy as np
import pytest

from fkd_ssl.data.sampler import mixed
from fkd_ssl.images import Names
from fkd_ssl.images import names as module
from fkd_ssl.images.names import has_bad_parts, is_line, is_plain
from fkd_ssl.images.patterns import classes_of, folder_of

ODD = ["b", "a", "ab", "a/b", "a.b", "a-b", "é", "z", "日本", "\U0001f600", "\uffff", "A", "a" * 300, "a" * 299, "0"]


@pytest.mark.parametrize("names", [[], ["a"], ["b", "a"], ODD, sorted(ODD), [f"{k:05d}" for k in range(50_000)]])
def test_the_order_is_that_of_python(names: list[str]) -> None:
    order, repeated = Names(names).order()
    assert len(repeated) == 0
    assert (order is None) == (names == sorted(names))
    if order is not None:
        assert [names[k] for k in order] == sorted(names)
        assert list(Names(names).take(order)) == sorted(names)


def test_random_names_with_repeated_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in small pieces, and with a name that is too long for an array of one size."""
    generator = np.random.default_rng(0)
    names = ["".join(generator.choice([*"abü/日"], size=generator.integers(1, 6))) for _ in range(3000)]
    expected = sorted(range(len(names)), key=names.__getitem__)
    first = {name: names.index(name) for name in names}
    for rows, limit in ((2**14, 2**28), (7, 2**28), (7, 0)):
        monkeypatch.setattr(module, "_ROWS", rows)
        monkeypatch.setattr(module, "_MAX_PADDED", limit)
        for given in (names, [*names, "x" * 10_000]):
            order, repeated = Names(given).order()
            assert order is not None
            assert [k for k in order.tolist() if k < 3000] == expected
            assert sorted(repeated.tolist()) == [k for k in range(3000) if first[names[k]] != k]


def test_repeated_names_at_the_border_of_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 2)
    for border in range(1, 9):
        names = sorted([*(f"{k}" for k in range(9)), f"{border}"])
        assert Names(names).order()[1].tolist() == [border + 1]


def test_take() -> None:
    names = Names(ODD)
    assert list(names.take(np.array([2, 2, 0, 14]))) == [ODD[k] for k in (2, 2, 0, 14)]
    assert len(names.take(np.zeros(0, dtype=np.int64))) == 0
    assert len(Names([]).take(np.zeros(0, dtype=np.int64))) == 0


@pytest.mark.parametrize("name", ["", "/a", "a//b", "a/", ".", "..", "./a", "../a", "a/.", "a/..", "a/./b", "a/../b"])
def test_bad_parts(name: str) -> None:
    for names in ([name], ["x", name], [name, "x"], ["x"] * 100_000 + [name]):
        assert has_bad_parts(Names(names).lines)


@pytest.mark.parametrize("name", ["a", "a.b", ".a", "a/.b", "..a", "a/..b", "a../b", "a./b", "..."])
def test_good_parts(name: str) -> None:
    assert not has_bad_parts(Names(["x", name, "y/z.jpg"]).lines)


def test_plain_names() -> None:
    assert is_plain(Names(["a b~!", "x" * 10**6]).lines)
    for character in ("é", "\t", "\x7f", "\x1b", "\0"):
        assert not is_plain(Names(["x" * 10**6, character]).lines)
    assert all(is_line(chr(code)) for code in range(32, 127))


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["a/b", "a/c/d"], ["a", "a"]),
        (["a/b", "c/d", "e"], ["a", "c", ""]),
        (["a", "b"], ["", ""]),
        (["a", "b/c"], ["", "b"]),
        (["a/b", "ab/c"], ["a", "ab"]),
    ],
)
def test_folders(names: list[str], folders: list[str]) -> None:
    assert [folder.decode() for folder in folder_of(Names(names).lines)] == folders


def test_classes_come_in_alphabetical_order_over_all_parts() -> None:
    labels, classes = classes_of([[b"b", b""], [], [b"c", b"b", b"a"]])
    assert (labels.tolist(), classes) == ([1, -1, 2, 1, 0], ["a", "b", "c"])
    assert [part if isinstance(part, list) else part.tolist() for part in classes_of([[b"2", b"0"]])] == [
        [2, 0],
        ["0", "1", "2"],
    ]
    assert classes_of([[b"x", b"y"]], ["y", "z"])[0].tolist() == [-1, 0]


@pytest.mark.parametrize("mix", [1, 2, 7, 100])
def test_mixed_groups_against_a_loop(mix: int) -> None:
    generator = np.random.default_rng(mix)
    groups, order = generator.integers(0, 20, 500), generator.permutation(500)
    groups[groups == 3] = 4  # a group without images
    by_first = list(dict.fromkeys(groups[order].tolist()))
    expected = [
        i for first in range(0, len(by_first), mix) for i in order.tolist() if groups[i] in by_first[first : first + mix]
    ]
    assert mixed(order, groups, mix).tolist() == expected
