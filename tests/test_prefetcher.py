"""Files fetched ahead take at most a quarter of the cache until they are read."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fkd_ssl.fetching import RemoteFile, list_remote
from fkd_ssl.prefetcher import Prefetcher

SIZE = 1000


def wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RemoteFile]:
    """Four files; the cache holds seven of their size, so one of them is fetched ahead."""
    monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FKD_SSL_CACHE_BYTES", str(7 * SIZE))
    for k in range(4):
        (tmp_path / f"{k}").write_bytes(bytes([k]) * SIZE)
    return [list_remote((tmp_path / f"{k}").as_uri())[0] for k in range(4)]


def test_the_next_file_waits_until_one_is_read(remote: list[RemoteFile]) -> None:
    ahead = Prefetcher(lambda number: [remote[number]])
    ahead.expect([0])
    wait(lambda: remote[0].is_fetched)
    ahead.expect([1])
    time.sleep(0.5)
    assert not remote[1].is_fetched
    remote[0].open().close()
    wait(lambda: remote[1].is_fetched)


def test_a_file_that_is_read_while_it_waits_takes_no_room(remote: list[RemoteFile]) -> None:
    """It would take that room until the end, and nothing would be fetched ahead any more."""
    ahead = Prefetcher(lambda number: [remote[number]])
    ahead.expect([0])
    wait(lambda: remote[0].is_fetched)
    ahead.expect([1])  # waits
    remote[1].open().close()
    remote[0].open().close()
    ahead.expect([2])
    wait(lambda: remote[2].is_fetched)
    remote[2].open().close()
    ahead.expect([3])
    wait(lambda: remote[3].is_fetched)
