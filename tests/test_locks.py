"""Locks between processes: exclusive, released by the kernel, not inherited, lost with their file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fkd_ssl import locks

HOLD = """
import os, sys, time
from pathlib import Path
from fkd_ssl import locks
with locks.locked(Path(sys.argv[1])) as ours:
    if len(sys.argv) > 2 and not os.fork():  # as a DataLoader's worker, which outlives a killed parent
        os.close(1)
        time.sleep(10)
        os._exit(0)
    print(ours, flush=True)
    time.sleep(60)
"""


def hold(path: Path, *more: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), *more], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_one_holds_it_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.locked(path) as first, locks.locked(path) as second:
        assert (first, second) == (True, False)
    assert not path.exists()
    with locks.locked(path) as third:
        assert third


@pytest.mark.parametrize("more", [(), ("fork",)], ids=["alone", "with a forked child"])
def test_a_killed_process_drops_it(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Even if a process that it forked is still running."""
    path = tmp_path / "lock"
    with hold(path, *more) as process:
        try:
            with locks.locked(path) as ours:
                assert not ours
            process.kill()
            process.wait()
            with locks.locked(path, seconds=1) as ours:
                assert ours
        finally:
            process.kill()


def test_it_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold(path) as process:
        began = time.monotonic()
        with locks.locked(path, seconds=0.3) as ours:
            assert not ours
        assert 0.3 <= time.monotonic() - began < 5
        os.kill(process.pid, signal.SIGSTOP)  # it still holds it
        with locks.locked(path) as ours:
            assert not ours
        process.kill()
        with locks.locked(path, seconds=10) as ours:
            assert ours


def test_a_file_that_was_removed_or_replaced_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not locks.is_lost(path)
    with locks.locked(path):
        assert not locks.is_lost(path)
        path.unlink()
        assert locks.is_lost(path)
        path.write_text("another's")
        assert locks.is_lost(path)
    assert path.read_text() == "another's"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"), locks.locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()
