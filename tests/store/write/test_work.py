"""Work files: what is kept after a kill, what is discarded, and the cost of saving."""

import hashlib
from contextlib import suppress

import numpy as np
import pytest

from fkd_ssl import files
from fkd_ssl.errors import StoreError
from fkd_ssl.store.write import work


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".work-codes-00000"


SIZES = {"unit": 5, "crops": 200, "per_row": 4}


def rows(n, first=0):
    return (np.arange(first, first + n)[:, None] + np.zeros(5)).astype(np.uint8)


class PulledError(Exception):
    pass


def leave(path, counts, owner="me"):
    """Adds chunks and is stopped."""
    with suppress(PulledError), work.open_work(path, owner, **SIZES) as progress:
        for n in counts:
            progress.add(rows(n, progress.crops))
            progress.checksums.append(f"image {progress.crops}")
        raise PulledError


def test_what_was_saved_is_there_again(path):
    leave(path, [3, 4])
    with work.open_work(path, "me", **SIZES) as progress:
        assert (progress.crops, progress.checksums) == (7, ["image 3", "image 7"])
        assert progress.read() == rows(7).tobytes()
        progress.add(rows(2, 7))
        header = files.npy_header(np.dtype(np.uint8), (9, 5))
        digest = progress.finish(path.with_name("codes.npy"), np.dtype(np.uint8), (9, 5))
    np.testing.assert_array_equal(np.load(path.with_name("codes.npy")), rows(9))
    assert digest == hashlib.sha256(header + rows(9).tobytes()).hexdigest()
    assert [entry.name for entry in path.parent.iterdir()] == ["codes.npy"]


def test_work_of_another_owner_does_not_count(path):
    leave(path, [3])
    with work.open_work(path, "somebody else", **SIZES) as progress:
        assert (progress.crops, progress.checksums, progress.read()) == (0, [], b"")


def test_bytes_after_the_journal_do_not_count(path):
    leave(path, [3])
    with path.open("ab") as file:
        file.write(b"half a chunk")
    with work.open_work(path, "me", **SIZES) as progress:
        assert (progress.crops, progress.read()) == (3, rows(3).tobytes())


def test_only_one_at_a_time(path):
    with work.open_work(path, "me", **SIZES) as progress, work.open_work(path, "me", **SIZES) as other:
        assert progress is not None
        assert other is None


def test_bytes_that_another_wrote_into_it_are_not_written(path):
    """As can happen on a file system without locks."""

    def finish():
        with work.open_work(path, "me", **SIZES) as progress:
            progress.add(rows(3))
            progress.save()
            with path.open("r+b") as file:
                file.write(b"\xff")
            progress.finish(path.with_name("codes.npy"), np.dtype(np.uint8), (3, 5))

    with pytest.raises(StoreError, match=r"work-codes-00000: its content differs from what was written: another process"):
        finish()
    assert not path.with_name("codes.npy").exists()


def test_saving_does_not_read_again_what_was_written(path, monkeypatch):
    """A large shard is read once, however often its progress is saved."""
    monkeypatch.setattr(work, "SECONDS_BETWEEN_JOURNALS", -1.0)
    with work.open_work(path, "me", **SIZES) as progress:
        monkeypatch.setattr(progress, "_file", Writing(progress._file))
        for _ in range(50):
            progress.add(rows(3))
    assert not path.exists()


class Writing:
    """A file that cannot be read."""

    def __init__(self, file):
        self.write, self.flush, self.fileno, self.tell = file.write, file.flush, file.fileno, file.tell


def test_clear_leaves_what_is_held(path):
    with work.open_work(path, "me", **SIZES):
        work.clear(path)
        assert path.exists()
    leave(path, [3])
    work.clear(path)
    work.clear(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "forged",
    [
        {"crops": 640, "codes": hashlib.sha256(b"").hexdigest(), "images": ["0" * 64] * 160},  # and a file of no bytes
        {"crops": 201},  # more than there will be
        {"crops": 6},
        {"crops": 8, "codes": hashlib.sha256(rows(8).tobytes()).hexdigest()},
        {"crops": -1},
        {"crops": "7"},
        {"crops": True},
        {"images": []},
        {"images": [1, 2]},
        {"images": "ab"},
        {"codes": "0" * 64},
    ],
)
def test_a_journal_that_does_not_fit_its_file_does_not_count(path, forged):
    leave(path, [3, 4])
    journal = path.with_name(f"{path.name}.json")
    values = files.read_json(journal)
    journal.write_bytes(files.with_checksum({**values, **forged}))
    if forged.get("crops") == 640:
        path.write_bytes(b"")
    with work.open_work(path, "me", **SIZES) as progress:
        assert (progress.crops, progress.checksums, progress.read()) == (0, [], b"")
        progress.add(rows(4))
        progress.finish(path.with_name("codes.npy"), np.dtype(np.uint8), (4, 5))
    np.testing.assert_array_equal(np.load(path.with_name("codes.npy")), rows(4))


def test_an_array_of_another_size_is_not_written(path):
    with work.open_work(path, "me", **SIZES) as progress:
        progress.add(rows(3))
        with pytest.raises(AssertionError):
            progress.finish(path.with_name("codes.npy"), np.dtype(np.uint8), (4, 5))
    assert not path.with_name("codes.npy").exists()
