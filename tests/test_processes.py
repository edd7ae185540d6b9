"""A process ends with its parent, however the parent ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fkd_ssl import processes
from fkd_ssl.errors import RequestError

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=sys.stdout)
time.sleep(60)
"""
CHILD = """
import os, sys, time
from fkd_ssl import processes
{before}
processes.end_with_parent()
print(os.getpid(), flush=True)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("before", ["", "sys.platform = 'other'"], ids=["by the kernel", "by a thread"])
def test_it_ends_with_a_killed_parent(before: str) -> None:
    command = [sys.executable, "-c", PARENT, CHILD.format(before=before)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.kill()
    end = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(child)


def test_it_ends_at_once_where_the_parent_is_gone_already() -> None:
    script = f"import time; from fkd_ssl import processes; processes.end_with_parent({os.getpid() + 10**6}); time.sleep(60)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=30).returncode == -signal.SIGKILL


def test_rank_is_that_of_torchrun_or_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes.rank() == (0, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.rank() == (1, 4)
    monkeypatch.setenv("RANK", "3")
    assert processes.rank() == (3, 4)
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(RequestError, match="RANK='x': must be a number"):
        processes.rank()
