"""The data path from the command line: a smaller copy with scaled boxes, unreadable images, killed workers."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fkd_ssl import cli
from fkd_ssl.images import scan
from fkd_ssl.store import manifest


def results_of(run: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(Path(run, "results.json").read_text())
    return results


class TestCache:
    def test_a_copy_is_made_once_and_is_an_image_set(self, work: Path, call: Any) -> None:
        first = call("cache --images train --out small --short_side 20")
        assert first.status == 0
        assert "small: 18 images" in first.out
        assert "18 images, about" in first.err
        assert scan("small").names == scan("train").names
        assert {path.suffix for path in Path("small").rglob("*") if path.is_file()} == {".png"}
        assert {path.name for path in Path("small.cache").iterdir()} >= {"config.yaml", "inputs.json", "results.json"}
        with Image.open("small/ash/0.png") as picture:
            assert picture.size == (22, 20)
        again = call("cache --images train --out small --short_side 20")
        assert (again.status, again.out) == (0, "")
        assert "this copy is done" in again.err
        shutil.rmtree("small")
        removed = call("cache --images train --out small --short_side 20")
        assert removed.status == 2
        assert "small: was made and has been removed; delete small.cache to make it again" in removed.err

    def test_a_copy_larger_than_its_source_is_announced(self, work: Path, call: Any) -> None:
        for path in Path("train").rglob("*.png"):
            noise = np.random.default_rng(0).integers(256, size=(60, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path.with_suffix(".jpg"), quality=5)
            path.unlink()
        larger = call("cache --images train --out small --short_side 48 --quality 100")
        assert larger.status == 0
        assert "warning: the copy would be larger than its source: choose a smaller --short_side or --quality" in larger.err
        assert "larger than its source" not in call("cache --images train --out tiny --short_side 16 --quality 50").err

    def test_a_killed_one_continues_with_other_threads(self, work: Path, call: Any) -> None:
        assert call("cache --images train --out small --short_side 20").status == 0
        before = {path: path.read_bytes() for path in Path("small").rglob("*.png")}
        Path("small.cache/results.json").unlink()
        Path("small/birch/1.png").unlink()
        done = call("cache --images train --out small --short_side 20 --threads 1 --json")
        assert json.loads(done.out)["written"] == 1
        assert {path: path.read_bytes() for path in Path("small").rglob("*.png")} == before

    def test_another_size_or_a_users_folder_is_refused(self, work: Path, call: Any) -> None:
        assert call("cache --images train --out small --short_side 20").status == 0
        other = call("cache --images train --out small --short_side 24")
        assert other.status == 2
        assert "short_side is 20 there, 24 here" in other.err
        users = call("cache --images train --out val --short_side 20")
        assert users.status == 2
        assert "val: exists and is not a copy made by fkd-ssl cache; choose another --out" in users.err
        within = call("cache --images train --out train/small --short_side 20")
        assert within.status == 2
        assert "choose an --out outside the folder of images" in within.err
        assert not Path("train/small").exists()

    def test_unreadable_images(self, work: Path, call: Any) -> None:
        Path("train/ash/2.png").write_bytes(b"no picture")
        stopped = call("cache --images train --out small --short_side 20")
        assert stopped.status == 1
        assert "train/ash/2.png: not a readable image" in stopped.err
        assert "--on_unreadable skip" in stopped.err
        skipped = call("cache --images train --out other --short_side 20 --on_unreadable skip")
        assert (skipped.status, "other: 17 images" in skipped.out) == (0, True)
        assert "ash/2.png cannot be read and is left out" in skipped.err

    def test_the_advice_to_skip_can_be_followed_where_it_stopped(self, work: Path, call: Any) -> None:
        Path("train/ash/2.png").write_bytes(b"no picture")
        assert call("cache --images train --out small --short_side 20").status == 1
        done = call("cache --images train --out small --short_side 20 --on_unreadable skip")
        assert (done.status, "small: 17 images" in done.out) == (0, True)

    def test_a_store_of_the_copy_trains_on_the_copy(self, work: Path, call: Any, train_line: str) -> None:
        assert call("cache --images train --out small --short_side 20").status == 0
        line = "precompute --images small --store small_store --teacher own_teacher:make --crops 4 --chunk_size 16"
        assert call(line).status == 0
        line = train_line.replace("--images train", "--images small").replace("--store store", "--store small_store")
        assert call(f"{line} --out run").status == 0


class TestScaledBoxes:
    def test_a_store_of_the_originals_trains_on_the_copy_only_if_asked(self, work: Path, call: Any, train_line: str) -> None:
        assert call("cache --images train --out small --short_side 20").status == 0
        line = train_line.replace("--images train", "--images small")
        refused = call(f"{line} --out run")
        assert refused.status == 1
        assert "changed since the store was made" in refused.err
        assert "pass --scale_boxes" in refused.err
        asked = call(f"{line} --out other --scale_boxes")
        assert asked.status == 0
        assert "the student's crops are not bit for bit the teacher's" in asked.err

    def test_without_a_store_it_is_ignored_and_said_so(self, work: Path, call: Any) -> None:
        line = (
            "train --images train --targets online --teacher own_teacher:make --student squeezenet1_1 --epochs 1 "
            "--batch_size 18 --crops_per_image 2 --pixels 32 --workers 0 --out run --scale_boxes"
        )
        assert "--scale_boxes: ignored: there is no --store" in call(line).err


class TestUnreadable:
    @pytest.mark.parametrize("spoil", ["corrupt", "vanish"])
    def test_it_stops_and_names_the_file(self, work: Path, call: Any, train_line: str, spoil: str) -> None:
        path = Path("train/birch/3.png")
        if spoil == "corrupt":  # of the same length, so that only decoding detects it
            path.write_bytes(b"no picture".ljust(path.stat().st_size))
        else:
            path.unlink()
        stopped = call(f"{train_line} --out run")
        assert stopped.status == 1
        assert "birch/3.png" in stopped.err

    def test_it_is_skipped_counted_and_named_once_where_that_was_asked(self, work: Path, call: Any, train_line: str) -> None:
        path = Path("train/birch/3.png")
        path.write_bytes(b"no picture".ljust(path.stat().st_size))
        line = train_line.replace("--epochs 2", "--epochs 8")
        done = call(f"{line} --out run --on_unreadable skip")
        assert done.status == 0
        assert results_of("run")["unreadable_images"] == 1
        assert done.err.count("warning: train/birch/3.png: changed since the store was made: other content") == 1
        assert "warning: skipped 1 unreadable image" in done.err

    def test_a_missing_one_is_never_skipped(self, work: Path, call: Any, train_line: str) -> None:
        Path("train/birch/3.png").unlink()
        for option in ("", "--on_unreadable skip"):
            stopped = call(f"{train_line} --out run {option}")
            assert (stopped.status, "lacks 1 of the 18 images" in stopped.err) == (1, True)

    def test_precompute_says_what_it_left_out(self, work: Path, call: Any) -> None:
        Path("train/birch/3.png").write_bytes(b"no picture")
        line = "precompute --images train --teacher own_teacher:make --crops 4 --chunk_size 16 --store skipping"
        done = call(f"{line} --on_unreadable skip")
        assert "note: 1 of 18 images could not be read and are left out: birch/3.png" in done.err
        again = call(f"{line} --column other")
        assert (again.status, "could not be read when the store was made; pass --on_unreadable skip" in again.err) == (1, True)

    def test_a_whole_set_reports_none(self, work: Path, call: Any, train_line: str) -> None:
        assert call(f"{train_line} --out run --on_unreadable skip").status == 0
        assert results_of("run")["unreadable_images"] == 0


def test_how_a_run_is_run_may_change_when_it_continues(work: Path, call: Any, train_line: str) -> None:
    """As the message about a killed worker advises."""
    assert call(f"{train_line} --out run").status == 0
    for change in ("--workers 1", "--device_crops on", "--on_unreadable skip"):
        again = call(f"{train_line} --out run {change}")
        assert (again.status, "this run is done" in again.err) == (0, True)
    other = call(f"{train_line} --out run --lr 0.5")
    assert (other.status, "lr is" in other.err) == (2, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_crops_on_a_device_need_a_gpu(work: Path, call: Any, train_line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    precompute = "precompute --images train --teacher own_teacher:make --crops 4 --store new"
    for line in (f"{train_line} --out run", precompute):
        refused = call(f"{line} --device_crops on")
        assert (refused.status, "--device_crops needs a CUDA GPU, found cpu: run without it" in refused.err) == (2, True)
    assert not Path("new").exists()


def test_an_unfinished_store_is_no_smaller_one(work: Path, call: Any, train_line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 6)
    line = "precompute --images train --teacher own_teacher:make --crops 4 --chunk_size 16 --store part --shards 0/3"
    assert call(line).status == 0
    online = train_line.replace("--store store", "--store part --targets online --teacher own_teacher:make")
    refused = call(f"{online} --out run")
    assert (refused.status, "part: 2 of 3 shards missing: run the same fkd-ssl precompute" in refused.err) == (1, True)


def test_much_waiting_for_data_is_said_with_what_helps(
    work: Path, call: Any, train_line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fkd_ssl.commands import train

    monkeypatch.setattr(train, "MUCH_WAITING", 0.0)
    assert "of the time was spent waiting for data: try more --workers" in call(f"{train_line} --out run").err
    monkeypatch.setattr(train, "MUCH_WAITING", 1.0)
    assert "waiting for data" not in call(f"{train_line} --out other").err


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
def test_a_killed_worker_is_said_in_words(work: Path, train_line: str) -> None:
    for folder in Path("train").iterdir():  # large enough that the worker is still reading
        for path in folder.glob("*.png"):
            noise = np.random.default_rng(0).integers(0, 256, (500, 600, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    line = train_line.replace("--epochs 2", "--epochs 2000").replace("--workers 0", "--workers 1").split()
    line += ["--targets", "online", "--teacher", "own_teacher:make", "--out", "run"]
    line = [word for word in line if word not in ("--store", "store")]
    process = subprocess.Popen([sys.executable, "-m", "fkd_ssl", *line], stderr=subprocess.PIPE, text=True)
    try:
        metrics = Path("run/metrics.csv")
        until = time.monotonic() + 120
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.1)
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        workers = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "fkd-ssl train: a process that reads images was killed by SIGKILL, often for lack of memory" in said
    assert "repeat the command to continue" in said


def test_other_broken_connections_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def reset(*_: Any) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr(cli, "parse", reset)
    assert cli.main(["inspect", "store"]) == 1
    assert capsys.readouterr().err == "fkd-ssl inspect: Connection reset by peer\n"
