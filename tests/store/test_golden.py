"""A store of format 1, written once and kept: every later version reads it."""

import json
from pathlib import Path

import numpy as np
import pytest

from fkd_ssl.crops import draw, image_key
from fkd_ssl.store import Store, open_store
from fkd_ssl.store.maintain.verify import verify

GOLDEN = Path(__file__).with_name("golden")
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def store() -> Store:
    return open_store(GOLDEN / "format1")


def test_its_crops_are_read(store: Store) -> None:
    assert list(store.paths) == EXPECTED["paths"]
    for row, crops in enumerate(EXPECTED["crops"]):
        assert [[float(value) for value in record.item()] for record in store.crops(row, slice(0, 3))] == crops


@pytest.mark.parametrize("name", ["flat", "sq8"])
def test_its_targets_are_read(store: Store, name: str) -> None:
    for row, targets in enumerate(EXPECTED["targets"][name]):
        np.testing.assert_allclose(store.targets(name, row, slice(0, 3)), np.array(targets), rtol=0, atol=1e-6)


def test_its_crops_are_still_what_is_drawn(store: Store) -> None:
    for row in range(len(store)):
        size = store.sizes[row]
        key = image_key(store.manifest.seed, store.paths[row])
        drawn = draw(store.manifest.recipe, key, int(size["height"]), int(size["width"]), 0, 3)
        np.testing.assert_array_equal(drawn, store.crops(row, slice(0, 3)))


def test_it_is_whole(store: Store) -> None:
    problems = [
        problem for problem in verify(store).problems if "another version of OpenCV" not in problem
    ]  # another machine's
    assert not problems
