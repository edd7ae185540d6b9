"""Nearest stored crops, compared with a loop over every pair."""

import numpy as np
import pytest

from fkd_ssl.errors import RequestError
from fkd_ssl.store import manifest
from fkd_ssl.store.maintain.nearest import nearest


@pytest.fixture
def column(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 5)
    return make_store(tmp_path / "store", codec="Flat").column()


def by_hand(column, target, row, count, crops):
    """Returns the nearest crop of every other image, nearest images first."""
    found = []
    for other in column.rows.tolist():
        if other != row:
            stored = column.store.targets(column.name, other, slice(0, crops)).astype(np.float64)
            cosines = stored @ target / (np.linalg.norm(stored, axis=1) * np.linalg.norm(target))
            found.append((cosines.max(), other, int(cosines.argmax())))
    return sorted(found, reverse=True)[:count]


@pytest.mark.parametrize("crops", [1, 4])
def test_they_are_those_of_a_loop(column, crops):
    targets = column.store.targets(column.name, 7, slice(0, 3))
    looked = []
    found = nearest(column, targets, count=6, crops=crops, without=7, done=looked.append)
    assert sum(looked) == len(column.rows) - 1
    for target, line in zip(targets, found, strict=True):
        expected = by_hand(column, target.astype(np.float64), 7, 6, crops)
        assert [(n.row, n.crop) for n in line] == [(row, crop) for _, row, crop in expected]
        np.testing.assert_allclose([n.cosine for n in line], [cosine for cosine, _, _ in expected], atol=1e-5)


def test_a_stored_crop_is_its_own_nearest(column):
    targets = column.store.targets(column.name, 3, slice(2, 3))
    (line,) = nearest(column, targets, count=1, crops=4, without=7)
    assert (line[0].row, line[0].crop) == (3, 2)
    assert line[0].cosine == pytest.approx(1, abs=1e-6)


def test_fewer_images_than_neighbours(column):
    (line,) = nearest(column, column.store.targets(column.name, 0, slice(0, 1)), count=99, crops=1, without=0)
    assert len(line) == len(column.rows) - 1


@pytest.mark.parametrize("crops", [0, 5])
def test_crops_that_are_not_stored(column, crops):
    with pytest.raises(RequestError, match=f"crops {crops}: .* holds 4 crops of each image"):
        nearest(column, np.ones((1, 16), dtype=np.float32), count=1, crops=crops, without=0)
