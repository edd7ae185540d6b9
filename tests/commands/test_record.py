"""train --targets online --record: the first student's training makes a store for later students."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkd_ssl.store import open_store
from fkd_ssl.training.metrics import read_metrics

LINE = (
    "train --images train --targets online --teacher own_teacher:make --student squeezenet1_1 --batch_size 12 "
    "--crops_per_image 2 --pixels 32 --workers 0 --log_every 1 --checkpoint_interval 0"
)
FINISH = "precompute --images train --store new --teacher own_teacher:make --pixels 32 --chunk_size 12"


def codes_of(folder: str, column: str = "make") -> Any:
    found = open_store(folder).column(column)
    return np.concatenate([found.codes(row, slice(None)) for row in range(18)]).astype(int)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def losses(folder: Path) -> list[float | None]:
    return [line["loss"] for line in read_metrics(folder / "metrics.csv")]


def test_the_next_student_needs_no_teacher(work: Path, call: Any) -> None:
    status, _, err = call(f"{LINE} --epochs 6 --record new --out first")
    assert status == 0
    assert "targets of make: 18 images x 6 crops" in err
    assert call("verify new --images train --teacher own_teacher:make --sample 18").status == 0
    about = json.loads(call("inspect new --json").out)
    assert about["columns"]["make"]["missing_shards"] == []
    assert about["columns"]["make"]["chunk_size"] == 12
    assert json.loads((work / "first/results.json").read_text())["stored_crops_per_image"] == 6
    stored = LINE.replace("--targets online --teacher own_teacher:make", "--store new")
    assert call(f"{stored} --epochs 6 --out next").status == 0
    before = files_of(work / "new")
    assert "nothing to do" in call(f"{FINISH} --crops 6").out
    assert files_of(work / "new") == before


def test_the_student_is_the_one_of_an_online_training(work: Path, call: Any) -> None:
    """Recording changes nothing but writing the targets: the same crops in the same order."""
    assert call(f"{LINE} --epochs 6 --record new --out recorded").status == 0
    assert call(f"{FINISH.replace('new', 'old')} --crops 6".replace("--chunk_size 12", "")).status == 0
    assert np.abs(codes_of("new") - codes_of("old")).max() <= 1
    from fkd_ssl.data import StoredCrops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredCrops, "_first", lambda self, p, i: p * self.crops_per_image % self.store.crops_per_image)
        assert call(f"{LINE} --epochs 6 --store old --out online").status == 0
    assert losses(work / "recorded") == losses(work / "online")


def test_a_stopped_training_goes_on(work: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fkd_ssl.data.sampler import PassSampler

    line = f"{LINE} --epochs 6"
    assert call(f"{line} --record whole --out whole_run").status == 0
    batch = PassSampler.batch

    for stop in (2, 5):

        def interrupted(self: PassSampler, step: int, stop: int = stop) -> Any:
            if step == stop:
                raise KeyboardInterrupt
            return batch(self, step)

        with monkeypatch.context() as patch:
            patch.setattr(PassSampler, "batch", interrupted)
            assert call(f"{line} --record new --out run").status == 130
        assert (work / "new/targets/make/.record.json").exists()
        refused = call("train --images train --store new --student squeezenet1_1 --pixels 32 --batch_size 16 --out none")
        assert refused.status == 1
        assert "run the same fkd-ssl precompute again" in refused.err
    (work / f"new/targets/make/.tmp-.record.json-{'0' * 12}").touch()  # a kill while the journal was written
    assert call(f"{line} --record new --out run").status == 0
    assert losses(work / "run") == losses(work / "whole_run")
    assert files_of(work / "new") == files_of(work / "whole")


def test_a_killed_training_goes_on(work: Path, call: Any) -> None:
    line = f"{LINE} --epochs 60 --seed 3"
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": "."}
    command = [sys.executable, "-m", "fkd_ssl", *f"{line} --record new --out run".split()]
    for count in (1, 2):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
            seen = 0
            while process.poll() is None and seen < count * 9:
                time.sleep(0.02)
                metrics = work / "run/metrics.csv"
                seen = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert call(f"{line} --record new --out run").status == 0
    assert call(f"{line} --record whole --out whole_run").status == 0
    assert losses(work / "run") == losses(work / "whole_run")
    assert files_of(work / "new") == files_of(work / "whole")


@pytest.mark.parametrize("written", [1, 2])
def test_a_run_that_was_killed_while_its_store_was_written_ends(
    work: Path, call: Any, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Killed after writing one or both teachers' targets, before the run was marked as done."""
    from fkd_ssl.store.write.recording import Recording

    line = f"{LINE.replace('own_teacher:make', 'own_teacher:make,own_teacher:other')} --epochs 3"
    assert call(f"{line} --record whole --out whole_run").status == 0
    finish, done = Recording.finish, []

    def killed(self: Recording) -> None:
        finish(self)
        done.append(self.column.name)
        if len(done) == written:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "finish", killed)
        assert call(f"{line} --record new --out run").status == 130
    status, _, err = call(f"{line} --record new --out run")
    assert status == 0
    assert "targets/make: its targets are already stored; nothing to record" in err
    assert (work / "run/results.json").exists()
    assert files_of(work / "new") == files_of(work / "whole")
    assert losses(work / "run") == losses(work / "whole_run")


def test_two_teachers_and_devices_crops(work: Path, call: Any) -> None:
    line = LINE.replace("own_teacher:make", "own_teacher:make,own_teacher:other")
    assert call(f"{line} --epochs 4 --record new --out first").status == 0
    assert call(f"{line} --epochs 4 --record other --out second --device_crops on").status == 0
    assert open_store("new").column_names == ["make", "other"]
    assert files_of(work / "new") == files_of(work / "other")
    assert call(f"{LINE} --epochs 4 --record one --out third").status == 0
    assert np.abs(codes_of("new") - codes_of("one")).max() <= 1


def test_another_column_over_the_same_crops(work: Path, call: Any) -> None:
    line = f"{LINE} --epochs 4 --codec Flat --batch_size 18"
    assert call(f"{line.replace('make', 'other')} --record store --out first").status == 0
    assert open_store("store").column_names == ["make", "other"]
    status, _, err = call(f"{line} --record store --out second")
    assert status == 2
    assert "it holds targets of make already" in err


def test_another_batch_size_after_a_start_that_recorded_nothing(work: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For instance after running out of memory: the planned store is used, although its chunk size is the first batch size."""
    from fkd_ssl.data.sampler import PassSampler

    def fails(self: PassSampler, step: int) -> Any:
        raise MemoryError

    line = f"{LINE} --epochs 4 --record new"
    with monkeypatch.context() as patch:
        patch.setattr(PassSampler, "batch", fails)
        assert call(f"{line} --out first").status == 1
    assert call(f"{line} --batch_size 6 --out second").status == 0
    assert call("verify new --images train --teacher own_teacher:make").status == 0


def stopped(call: Any, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """A training that was interrupted after its first pass, which has three steps."""
    from fkd_ssl.data.sampler import PassSampler

    batch = PassSampler.batch

    def interrupted(self: PassSampler, step: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(PassSampler, "batch", interrupted)
        assert call(line).status == 130


def test_precompute_leaves_the_recording_of_a_stopped_training_to_it(
    work: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{LINE} --epochs 6 --record new --out run"
    stopped(call, monkeypatch, line)
    before = files_of(work / "new")
    status, _, err = call(f"{FINISH} --crops 6")
    assert status == 2
    assert "was stopped: run the same fkd-ssl train command again to finish it" in err
    assert files_of(work / "new") == before
    assert call(line).status == 0
    assert call(f"{LINE} --epochs 6 --record whole --out whole_run").status == 0
    assert files_of(work / "new") == files_of(work / "whole")


def test_what_was_damaged_on_the_disk_is_computed_by_the_command_that_is_named(
    work: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{LINE} --epochs 6 --record new --out run"
    stopped(call, monkeypatch, line)
    path = work / "new/targets/make/.record"
    data = bytearray(path.read_bytes())
    data[1] ^= 1
    path.write_bytes(data)
    status, _, err = call(line)
    assert status == 0
    assert "warning: left out 1 of 1 shard, damaged on the disk after recording" in err
    assert json.loads(call("inspect new --json").out)["columns"]["make"]["missing_shards"] == [0]
    named = err[err.index("to compute them: fkd-ssl ") :].splitlines()[0].removeprefix("to compute them: fkd-ssl ")
    assert "--column make" in named
    assert call(named).status == 0
    assert call(f"{LINE} --epochs 6 --record whole --out whole_run").status == 0
    assert np.abs(codes_of("new") - codes_of("whole")).max() <= 1
    assert call("verify new --images train --teacher own_teacher:make --sample 18").status == 0


@pytest.mark.parametrize(("epochs", "crops"), [("2", 2), ("3", 2), ("4.5", 4), ("5", 4)])
def test_a_store_has_the_crops_of_whole_passes(work: Path, call: Any, epochs: str, crops: int) -> None:
    assert call(f"{LINE} --epochs {epochs} --record new --out run").status == 0
    about = json.loads(call("inspect new --json").out)
    assert (about["crops_per_image"], about["columns"]["make"]["missing_shards"]) == (crops, [])
    assert call("verify new --images train --teacher own_teacher:make --sample 18").status == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--store store", "and no --store"),
        ("--single_crop_epochs 2", "would leave gaps"),
        ("--crops 5", "must be a multiple of crops_per_image 2, at most 6"),
        ("--crops 8", "must be a multiple of crops_per_image 2, at most 6"),
        ("--epochs 1.5", "1.5 epochs are less than one pass of crops_per_image 2"),
        ("--student resnet19", "resnet18"),
        ("--batch_size 72", "the data set 18"),
        ("--objective prototype_ce", "prototypes"),
        ("--recipe none", "--recipe 'none' is unknown"),
        ("--codec SQ9", "SQ9"),
        ("--codec PQ4x12", "needs at least"),
        ("--record train", "which is not part of a store"),
        ("--record own_teacher.py", "is a file"),
        ("--record=", "the name of the store is empty"),
        ("--record run", "neither inside the other"),
        ("--record run/new", "neither inside the other"),
        ("--record new --out new/run", "neither inside the other"),
    ],
)
def test_what_is_refused_before_anything_is_written(work: Path, call: Any, options: str, said: str) -> None:
    line = LINE if "--batch_size" not in options else LINE.replace("--batch_size 12 ", "")
    status, _, err = call(f"{line} --epochs 6 --record new --out run {options}")
    assert status == 2
    assert said in err
    assert not (work / "new").exists()
    assert not (work / "run").exists()


def test_record_is_for_online_targets(work: Path, call: Any) -> None:
    status, _, err = call("train --images train --store store --record new --student squeezenet1_1 --out run")
    assert (status, "needs --targets online" in err) == (2, True)
    status, _, err = call("train --images train --store store --crops 4 --student squeezenet1_1 --out run")
    assert (status, "is for --record" in err) == (2, True)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_record_one_store(work: Path, call: Any) -> None:
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": "."}
    line = f"{LINE} --epochs 6 --record new --out run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fkd_ssl"]
    done = subprocess.run([*torchrun, *line.split()], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    plain = line.replace("new", "plain_store").replace("--out run", "--out plain")
    done = subprocess.run(
        [sys.executable, "-m", "fkd_ssl", *plain.split(), "--devices", "2"],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert files_of(work / "new") == files_of(work / "plain_store")
    assert call("verify new --images train --teacher own_teacher:make --sample 18").status == 0
    assert call(f"{FINISH.replace('new', 'old')} --crops 6").status == 0
    assert np.abs(codes_of("new") - codes_of("old")).max() <= 1


def test_two_teachers_of_one_name(work: Path, call: Any) -> None:
    """For instance two checkpoints of one family: the second column gets another name."""
    (work / "second.py").write_text((work / "own_teacher.py").read_text())
    line = LINE.replace("own_teacher:make", "own_teacher:make,second:make")
    assert call(f"{line} --epochs 2 --record new --out run").status == 0
    assert set(json.loads(call("inspect new --json").out)["columns"]) == {"make", "make-2"}
    refused = call(f"{LINE.replace('own_teacher:make', 'own_teacher:make,own_teacher:make')} --epochs 2 --out other")
    assert (refused.status, "a teacher is named twice" in refused.err) == (2, True)
