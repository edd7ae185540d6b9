"""Crops read by position: equal to a memory map, with few open files, and with errors instead of a killed process."""

import errno
import os
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fkd_ssl import files
from fkd_ssl.errors import StoreError
from fkd_ssl.store import shards
from fkd_ssl.store.shards import ShardFiles

COUNT, ROWS, CROPS, SIZE = 12, 3, 7, 5


def contents(shard: int) -> np.ndarray:
    return np.random.default_rng(shard).integers(0, 256, (ROWS, CROPS, SIZE), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(COUNT):
        files.write_npy(folder / f"{shard}.npy", contents(shard))
    return folder


def reader(folder: Path) -> ShardFiles:
    return ShardFiles(lambda shard: (folder / f"{shard}.npy", ROWS), np.dtype(np.uint8), (CROPS, SIZE))


def descriptors(folder: Path) -> int:
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    return sum(link.is_symlink() and str(link.readlink()).startswith(str(folder)) for link in links)


INDICES = (
    st.slices(CROPS)
    | st.lists(st.integers(-CROPS, CROPS - 1), max_size=12).map(lambda values: np.array(values, dtype=np.int64))
    | st.lists(st.booleans(), min_size=CROPS, max_size=CROPS).map(np.array)
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, COUNT - 1), st.integers(0, ROWS - 1), INDICES)
def test_any_index_reads_what_numpy_reads(folder, shard, within, index):
    found = reader(folder).read(shard, within, index)
    np.testing.assert_array_equal(found, contents(shard)[within, index])
    assert found.dtype == np.uint8
    assert found.shape[1:] == (SIZE,)


@pytest.mark.parametrize("index", [np.array([7]), np.array([-8]), np.array([0, 100])])
def test_crops_that_are_not_there(folder, index):
    with pytest.raises(IndexError, match="out of bounds"):
        reader(folder).read(0, 0, index)


def test_records_are_read_as_records(tmp_path):
    dtype = np.dtype([("a", "<u2"), ("b", "<f2")])
    values = np.arange(12, dtype="<u2").reshape(2, 6).astype(dtype)
    files.write_npy(tmp_path / "0.npy", values)
    read = ShardFiles(lambda shard: (tmp_path / "0.npy", 2), dtype, (6,)).read(0, 1, np.array([5, 0, 1]))
    np.testing.assert_array_equal(read, values[1, [5, 0, 1]])


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_few_files_are_open_at_once_and_none_when_the_reader_is_gone(folder, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 4)
    read = reader(folder)
    for shard in [*range(COUNT), *range(COUNT), 3, 3, 0]:
        np.testing.assert_array_equal(read.read(shard, 2, slice(1, 3)), contents(shard)[2, 1:3])
        assert descriptors(folder) <= 4
    assert descriptors(folder) == 4
    del read
    assert descriptors(folder) == 0


def test_threads_read_what_is_theirs_while_files_are_let_go(folder, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 2)
    read, wrong = reader(folder), []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for shard in generator.integers(0, COUNT, 400).tolist():
            if not np.array_equal(read.read(shard, 1, slice(None)), contents(shard)[1]):
                wrong.append(shard)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not wrong


def test_a_file_that_becomes_shorter_is_an_error_and_kills_nothing(tmp_path):
    files.write_npy(tmp_path / "0.npy", contents(0))
    read = reader(tmp_path)
    read.read(0, 0, slice(None))
    os.truncate(tmp_path / "0.npy", 140)
    with pytest.raises(StoreError, match=r"0\.npy: became shorter since it was opened; run fkd-ssl verify"):
        read.read(0, 2, slice(None))


def test_a_file_of_another_size_when_opened_again_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 1)
    for shard in range(2):
        files.write_npy(tmp_path / f"{shard}.npy", contents(shard))
    read = reader(tmp_path)
    read.read(0, 0, slice(None)), read.read(1, 0, slice(None))
    with (tmp_path / "0.npy").open("ab") as file:
        file.write(b"more")
    with pytest.raises(StoreError, match=r"0\.npy: its size changed since it was first read"):
        read.read(0, 0, slice(None))
    (tmp_path / "1.npy").unlink()
    read.read(1, 0, slice(None))  # still open
    read = reader(tmp_path)
    with pytest.raises(StoreError, match=r"1\.npy: cannot be read: No such file"):
        read.read(1, 0, slice(None))


def test_a_disk_that_fails_is_an_error(folder, monkeypatch):
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shards.os, "pread", fail)
    with pytest.raises(StoreError, match=r"3\.npy: cannot be read: Input/output error"):
        reader(folder).read(3, 0, slice(None))


def test_links_and_pipes_are_not_opened(tmp_path):
    files.write_npy(tmp_path / "real.npy", contents(0))
    (tmp_path / "0.npy").symlink_to(tmp_path / "real.npy")
    os.mkfifo(tmp_path / "1.npy")
    (tmp_path / "2.npy").mkdir()
    for shard, message in (
        (0, "a symbolic link, which is not followed inside a store"),
        (1, "not a regular file"),
        (2, "not a regular file"),
    ):
        with pytest.raises(StoreError, match=rf"{shard}\.npy: {message}"):
            reader(tmp_path).read(shard, 0, slice(None))
        with pytest.raises(StoreError, match=rf"{shard}\.npy: {message}"):
            reader(tmp_path).map(shard)


def test_maps_are_whole_shards(folder):
    np.testing.assert_array_equal(reader(folder).map(4), contents(4))


def test_a_column_goes_to_another_process_with_its_store(tmp_path, make_store):
    store = make_store(tmp_path / "store")
    column = store.column()
    column.codes(3, slice(0, 2))
    data = pickle.dumps((store, column))
    assert len(data) < 500
    copy, other = pickle.loads(data)  # noqa: S301
    assert other.store is copy
    np.testing.assert_array_equal(other.codes(3, slice(0, 2)), column.codes(3, slice(0, 2)))


@pytest.mark.parametrize("row", [-1, 24])
def test_rows_that_are_not_there(tmp_path, make_store, row):
    store = make_store(tmp_path / "store")
    with pytest.raises(IndexError, match=rf"row {row} of 24"):
        store.crops(row, slice(0, 2))
    with pytest.raises(IndexError, match=rf"row {row} of 24"):
        store.targets("tiny", row, slice(0, 2))
