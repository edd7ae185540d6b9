"""metrics.csv: appended, truncated to a checkpoint, and read; training time and peak memory."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fkd_ssl.errors import RequestError
from fkd_ssl.training.distiller import Distiller
from fkd_ssl.training.metrics import FIELDS, MetricsWriter, peak_memory, read_metrics
from fkd_ssl.training.monitor import Monitor


def test_an_empty_cell_is_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(",".join(FIELDS) + "\n4,1,8,0.5,2.5,,0.1,0,,16.0\n4,1,8,0.5,,,,,50.0,\n")
    lines = read_metrics(tmp_path / "metrics.csv")
    assert [(line["step"], line["loss"], line["knn_top1"]) for line in lines] == [(4, 2.5, None), (4, None, 50.0)]


@pytest.mark.parametrize(
    "damage", [b"4,1,8,0.5,2.x,,0.1,0,,\n", b"4.5,1,8,0.5,2.5,,0.1,0,,\n", b"4,1,\xff8,0.5,2.5,,0.1,0,,\n", b",,,,,,,,,\n"]
)
def test_a_damaged_line_is_refused_and_its_file_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(f"{','.join(FIELDS)}\n2,1,8,0.5,2.5,,0.1,0,,16.0\n".encode() + damage)
    with pytest.raises(RequestError, match=r"metrics\.csv: damaged .*delete it to continue without its lines"):
        read_metrics(path)
    with pytest.raises(RequestError, match=r"metrics\.csv: damaged"):
        start(writer(tmp_path), 4)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(RequestError, match=r"metrics\.csv: not a regular file"):
        start(writer(tmp_path), 4)


def writer(folder: Path) -> MetricsWriter:
    return MetricsWriter(folder / "metrics.csv", every=2, crops_per_step=8, crops_per_epoch=16)


def start(one: MetricsWriter, step: int) -> None:
    """Starts a training at `step` as Lightning does."""
    one.on_train_start(
        SimpleNamespace(global_step=step, max_steps=9, is_global_zero=True, loggers=[]), SimpleNamespace(device="cpu")
    )  # type: ignore[arg-type]


def test_a_state_is_continued_and_later_lines_are_forgotten(tmp_path: Path) -> None:
    first = writer(tmp_path)
    start(first, 0)
    for step in (2, 4, 6):
        first._append(step, loss=float(step))
    first.seconds, first.waited, first._count = 3.0, 1.0, 2
    first._sums = torch.tensor([5.0, 4.0])
    state: dict[str, Any] = first.state_dict()
    assert state["peak"] == pytest.approx(peak_memory(), rel=0.1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,4.0,6")  # cut off by a kill

    second = writer(tmp_path)
    second.load_state_dict(state)
    start(second, 4)
    assert (second.seconds, second.waited, second._count, second.peak) == (3.0, 1.0, 2, state["peak"])
    assert second._sums.tolist() == [5.0, 4.0]
    second._append(6, loss=60.0)
    lines = read_metrics(tmp_path / "metrics.csv")
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 2.0), (4, 4.0), (6, 60.0)]


def test_the_header_is_what_the_design_promises(tmp_path: Path) -> None:
    start(writer(tmp_path), 0)
    assert (tmp_path / "metrics.csv").read_text() == "step,epoch,crops,seconds,loss,kl,lr,wait,knn_top1,crops_per_second\n"
    assert read_metrics(tmp_path / "metrics.csv") == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_peak_is_this_process_s_own() -> None:
    """The peak of a child does not include its parent's memory at the fork."""
    held = np.ones(2**26, dtype=np.float64)  # 512 MB
    script = "from pathlib import Path; print(Path('/proc/self/status').read_text())"
    del held
    status = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    child = next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert child < 2**26 < 2**29 < peak_memory()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"metrics\.csv"):
        read_metrics(tmp_path / "metrics.csv")


def test_the_time_in_which_gpus_agree_is_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether any process was told to stop is known when all GPUs have finished the step."""
    now = [0.0]
    monkeypatch.setattr("fkd_ssl.training.metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Strategy:
        def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
            now[0] += 5
            return decision

    one = writer(tmp_path)
    start(one, 0)
    monitor = Monitor(tmp_path, one, None, score_every=99, save_every=99, save_interval=0)
    module = Distiller.__new__(Distiller)
    torch.nn.Module.__init__(module)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    trainer: Any = SimpleNamespace(
        global_step=7, max_steps=99, accumulate_grad_batches=1, world_size=2, strategy=Strategy(), optimizers=[optimizer]
    )
    monitor.on_train_batch_end(trainer, module, None, None, 0)
    assert one.seconds == 0  # they agree every eight steps only
    trainer.global_step = 8
    monitor.on_train_batch_end(trainer, module, None, None, 0)
    now[0] += 1
    one.on_train_batch_start(trainer, module, {"unreadable": []}, 1)
    assert (one.seconds, one.waited) == (5.0, 1.0)


def test_waiting_is_counted_once_where_a_step_has_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fkd_ssl.training.metrics.time", SimpleNamespace(perf_counter=lambda: now[0]))
    one = writer(tmp_path)
    start(one, 0)
    module = Distiller.__new__(Distiller)
    torch.nn.Module.__init__(module)
    module.last_loss = module.last_floor = torch.zeros(())
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    trainer: Any = SimpleNamespace(global_step=0, max_steps=9, accumulate_grad_batches=2, optimizers=[optimizer])
    for batch in range(2):  # one step of two parts: a second of waiting and two of work each
        now[0] += 1
        one.on_train_batch_start(trainer, module, {"unreadable": []}, batch)
        now[0] += 2
        trainer.global_step = batch  # the second part ends Lightning's first step
        one.on_train_batch_end(trainer, module, None, None, batch)
    assert (one.waited, one.seconds) == (2.0, 6.0)
