"""Training by two processes (gloo, on the CPU), started by Lightning and by torchrun, compared with one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fkd_ssl.training.metrics import read_metrics

pytestmark = [pytest.mark.ddp, pytest.mark.slow]

TOLERANCE = 1e-5  # relative tolerance of a loss: means per process round differently from the mean over all
PLAIN = [sys.executable, "-m", "fkd_ssl"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fkd_ssl"]
LINE = (
    "train --images train --store store --student squeezenet1_1 --head simreg --objective feature_kl+0.1*queue_kl(queue=36) "
    "--ema 0.9 --batch_size 12 --crops_per_image 1 --pixels 32 --workers 0 --log_every 1 --lr 1e-4 --checkpoint_interval 0"
)
# without SimReg's head, since BatchNorm uses the crops of one process
NO_NORM = LINE.replace("--head simreg ", "")

THREADS = """
import os, sys
from pathlib import Path
from fkd_ssl.cli import main
from fkd_ssl.training.metrics import MetricsWriter

def note(when):
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    Path(f"gloo-{when}-{os.environ['RANK']}").write_text(str(any("gloo" in name for name in names)))

def on_train_end(self, trainer, module):
    note("during")
    end(self, trainer, module)

end, MetricsWriter.on_train_end = MetricsWriter.on_train_end, on_train_end
status = main(sys.argv[1:])
note("after")
sys.exit(status)
"""


def run(command: list[str], line: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": "."}
    return subprocess.run([*command, *line.split()], capture_output=True, text=True, check=False, env=env, **options)


def losses(folder: Path) -> list[float | None]:
    return [line["loss"] for line in read_metrics(folder / "metrics.csv") if line["loss"] is not None]


@pytest.mark.parametrize(
    ("start", "options"), [(PLAIN, "--devices 2 --accumulate 2"), (TORCHRUN, "")], ids=["plain", "torchrun"]
)
def test_two_processes_are_one(work: Path, call: Any, start: list[str], options: str) -> None:
    line = f"{NO_NORM} --epochs 6 --val val --knn_every 3"
    assert call(f"{line} --out one").status == 0
    done = run(start, f"{line} --out two {options}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1  # only one process prints
    one, two = (losses(work / name) for name in ("one", "two"))
    assert len(one) == 9
    assert two == pytest.approx(one, rel=TOLERANCE)
    results = [json.loads((work / name / "results.json").read_text()) for name in ("one", "two")]
    for key in ("steps", "crops_seen", "images"):
        assert results[0][key] == results[1][key]
    assert results[0]["knn_top1"] == pytest.approx(results[1]["knn_top1"], abs=9)  # one of twelve images
    weights = [torch.load(work / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    queue = "parts.0.parts.1.queue"
    for row in weights[1][queue]:  # the same targets, in the order of the processes
        assert (weights[0][queue] - row).abs().sum(dim=1).min() < 1e-6


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux names a process's threads")
def test_no_thread_of_gloo_is_left(work: Path) -> None:
    """A gloo thread that still holds a tensor aborts Python at exit, with status -6 after a finished training."""
    (work / "start.py").write_text(THREADS)
    done = run([*TORCHRUN[:-2], "start.py"], f"{LINE} --epochs 2 --out run")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in work.glob("gloo-*")} == {
        **dict.fromkeys(("gloo-during-0", "gloo-during-1"), "True"),
        **dict.fromkeys(("gloo-after-0", "gloo-after-1"), "False"),
    }


def test_a_sigterm_saves_first_and_the_training_continues(work: Path) -> None:
    line = f"{LINE} --epochs 48 --devices 2"
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": "."}
    with subprocess.Popen([*PLAIN, *line.split(), "--out", "run"], stderr=subprocess.PIPE, text=True, env=env) as process:
        while process.poll() is None and not (work / "run/checkpoints/last.ckpt").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "stopped; repeat the command to continue" in err
    stopped = torch.load(work / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 0 < stopped < 72
    assert len(losses(work / "run")) == stopped
    assert run(PLAIN, f"{line} --out run").returncode == 0
    assert len(losses(work / "run")) == 72
    assert run(PLAIN, f"{line} --out whole").returncode == 0
    assert losses(work / "run") == losses(work / "whole")


def test_a_sigterm_to_all_processes_saves_first_too(work: Path) -> None:
    """Clusters send SIGTERM to all processes, including the workers that read images."""
    line = f"{LINE} --epochs 400 --workers 1 --out run".replace("--workers 0 ", "")
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": "."}
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "env": env, "start_new_session": True}
    with subprocess.Popen([*PLAIN, *line.split()], **options) as process:
        while process.poll() is None and not (work / "run/checkpoints/last.ckpt").exists():
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "stopped; repeat the command to continue" in err
    stopped = torch.load(work / "run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert len(losses(work / "run")) == stopped


def test_processes_that_do_not_divide_a_batch_are_refused(work: Path, call: Any) -> None:
    answer = call(f"{LINE} --out run --devices 5")
    assert (answer.status, answer.out) == (2, "")
    assert "5 processes of 1 parts do not divide its 12 images" in answer.err
    assert not (work / "run").exists()
