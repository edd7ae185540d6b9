"""Only one process at a time uses a run folder; a killed one leaves no lock, temporary file or child."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fkd_ssl import locks, runs
from fkd_ssl.training.metrics import MetricsWriter, read_metrics

pytestmark = pytest.mark.slow

TRAIN = (
    "train --images train --store store --student squeezenet1_1 --batch_size 18 --crops_per_image 2 --pixels 32 --log_every 1 "
    "--checkpoint_interval 0"
)
COMPARE = (
    "compare --images train --val val --teacher own_teacher:make --student squeezenet1_1 --crops_per_image 2 --crops 2 "
    "--batch_size 18 --pixels 32 --workers 1 --knn_every 200"
)
COMMANDS = {
    "train": f"{TRAIN} --epochs 2 --workers 0",
    "pretrain": "pretrain --images train --arch squeezenet1_1 --epochs 2 --batch_size 9 --pixels 32 --queue 9 --workers 0 "
    "--checkpoint_interval 0",
    "linear": "linear --protocol moco --model own_teacher:make --train train --val val --epochs 2 --batch_size 9 --workers 0",
    "cache": "cache --images train --short_side 16 --threads 1",
    "compare": f"{COMPARE} --epochs 2",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fkd_ssl"]


def start(line: str, **options: Any) -> "subprocess.Popen[str]":
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": "."}
    command = [sys.executable, "-m", "fkd_ssl", *line.split()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def wait_for(what: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Waits until `what` is true; after a timeout it kills the process and fails."""
    end = time.monotonic() + 600
    while not what():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > end:
            process.kill()
            pytest.fail("waited for ten minutes")
        time.sleep(0.01)


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock. If none does, this one holds it for a moment."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        return not locks.try_lock(file.fileno())
    return False


def temporary(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_second_of_two_at_once_is_refused(work: Path, call: Any, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    line = f"{COMMANDS[verb]} --out run"
    folder = "run.cache" if verb == "cache" else "run"
    with start(line) as first:
        wait_for(lambda: is_locked(work / folder / runs.LOCK), first)
        first.send_signal(signal.SIGSTOP)
        try:
            second = call(line)
        finally:
            first.send_signal(signal.SIGCONT)
        if verb == "compare":  # which would take a minute
            first.kill()
        _, err = first.communicate(timeout=900)
    assert second.status == 2
    assert f"fkd-ssl {verb}: another process is using {folder}: wait until it ends, or choose another --out" in second.err
    if verb != "compare":
        assert first.returncode == 0, err
        assert (work / folder / "results.json").exists()
        assert temporary(work / folder) == []


def test_two_trainings_started_together_leave_one_whole_run(work: Path) -> None:
    line = f"{TRAIN} --epochs 6 --workers 1 --out run"
    processes = [start(line), start(line)]
    said = [process.communicate(timeout=900)[1] for process in processes]
    assert sorted(process.returncode for process in processes) in ([0, 0], [0, 2]), (
        said
    )  # the second may start when the first is done
    assert [line["step"] for line in read_metrics(work / "run/metrics.csv")] == list(range(1, 7))
    assert json.loads((work / "run/results.json").read_text())["steps"] == 6


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads Linux's /proc")
def test_a_killed_comparison_leaves_no_training(work: Path) -> None:
    with start(f"{COMPARE} --epochs 200 --out cmp") as process:
        run = work / "cmp/runs/stored-seed0"
        wait_for((run / "metrics.csv").exists, process)
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        families = [*children, *_grandchildren(children)]
        assert len(families) >= 2  # the training and its worker
        process.kill()
    end = time.monotonic() + 10
    while any(map(is_running, families)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, families))
    with start("train --config cmp/runs/stored-seed0.yaml") as process:
        _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert [line["step"] for line in read_metrics(run / "metrics.csv") if line["loss"] is not None] == list(range(20, 201, 20))
    assert temporary(run) == []


def _grandchildren(children: list[int]) -> list[int]:
    lists = [path.read_text().split() for pid in children for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(pid) for each in lists for pid in each]


def test_what_a_killed_training_left_is_removed(work: Path, call: Any) -> None:
    assert call(f"{TRAIN} --epochs 2 --workers 0 --out run").status == 0
    (work / "run/results.json").unlink()
    left = [
        work / "run/.tmp-metrics.csv-0123456789ab",
        work / "run/checkpoints/.tmp-last.ckpt-0123456789ab",
        work / "run/.lock",
    ]
    for path in left:
        path.write_text("half")
    assert call(f"{TRAIN} --epochs 2 --workers 0 --out run").status == 0
    assert temporary(work / "run") == []


@pytest.mark.parametrize("verb", ["train", "pretrain"])
def test_a_run_folder_that_is_removed_ends_the_run_with_an_error(work: Path, verb: str) -> None:
    with start(f"{COMMANDS[verb]} --epochs 300 --log_every 1 --out run") as process:
        wait_for((work / "run/metrics.csv").exists, process)
        shutil.rmtree(work / "run", ignore_errors=True)
        shutil.rmtree(work / "run", ignore_errors=True)
        _, err = process.communicate(timeout=900)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1].startswith(f"fkd-ssl {verb}: run")
    assert "Traceback" not in err
    assert not (work / "run/results.json").exists()


def test_a_full_disk_names_metrics_csv(work: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started, before = MetricsWriter.on_train_start, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self: MetricsWriter, *args: Any) -> None:
        started(self, *args)
        with self.path.open("a") as file:
            file.write("\n" * 100_000)  # so that the captured output, which is also a file, stays below the limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.path.stat().st_size + 10, before[1]))

    monkeypatch.setattr(MetricsWriter, "on_train_start", fill)
    try:
        answer = call(f"{TRAIN} --epochs 2 --workers 0 --out run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert answer.status == 1
    assert "fkd-ssl train: run/metrics.csv: File too large; finished work is kept" in answer.err
    monkeypatch.setattr(MetricsWriter, "on_train_start", started)
    assert call(f"{TRAIN} --epochs 2 --workers 0 --out run").status == 0
    assert [line["step"] for line in read_metrics(work / "run/metrics.csv")] == [1, 2]


@pytest.mark.parametrize("verb", ["pretrain", "linear", "cache", "compare"])
def test_torchrun_is_refused_where_one_process_does_the_work(
    work: Path, call: Any, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = call(f"{COMMANDS[verb]} --out run")
    assert answer.status == 2
    assert f"fkd-ssl {verb}: runs in one process: start it without torchrun" in answer.err
    assert not (work / "run").exists()


@pytest.mark.ddp
def test_pretrain_under_torchrun_trains_nothing(work: Path) -> None:
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": "."}
    command = [*TORCHRUN, *COMMANDS["pretrain"].split(), "--out", "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode != 0
    assert "fkd-ssl pretrain: runs in one process" in done.stderr
    assert not (work / "run").exists()
