"""A few steps on a GPU with each option that behaves differently there."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fkd_ssl.crops import RECIPES
from fkd_ssl.data import StoredCrops
from fkd_ssl.store import open_store
from fkd_ssl.targets.precision import uses_tf32

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize(
    "change",
    [{"precision": "bf16-mixed"}, {"precision": "16-mixed"}, {"compile": True}, {"accumulate": 2}, {"sync_batchnorm": True}],
)
def test_a_few_steps_with_an_option_are_near_those_without(make_run: Any, change: dict[str, Any]) -> None:
    plain, run = make_run("plain").train(), make_run("run", **change).train()
    assert run.results["steps"] == 9
    assert run.results["tf32"] == uses_tf32(change.get("precision", "32-true"))
    assert run.column("loss")[0] == pytest.approx(plain.column("loss")[0], rel=0.01)
    # in fp16 the loss is scaled too much at first, so that the first steps are skipped
    assert run.column("loss")[-1] == pytest.approx(plain.column("loss")[-1], rel=0.1)


def test_crops_made_on_the_gpu_give_the_same_first_loss(make_run: Any, flat_store: Any, image_folder: Path) -> None:
    """The pixels are the same; later losses differ by the order of sums."""
    data = StoredCrops(flat_store, image_folder, crops_per_image=2, pixels=32, decode_only=True)
    on_gpu = make_run("on_gpu", data=data, device_crops="on").train()
    np.testing.assert_allclose(on_gpu.column("loss")[0], make_run().train().column("loss")[0], rtol=1e-5)


def test_the_clock_counts_the_steps_that_the_gpu_has_to_finish(make_run: Any, tiny_teacher: Any) -> None:
    """A teacher that keeps the GPU busy for 50 ms a step and returns at once: the time is not lost at a checkpoint."""

    def slow(images: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(100_000_000)  # cycles
        return torch.nn.functional.normalize(torch.ones(len(images), 16, device=images.device), dim=1)

    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]  # type: ignore[no-untyped-call]
    for mark in marks:
        mark.record()  # type: ignore[no-untyped-call]
        torch.cuda._sleep(100_000_000)
    torch.cuda.synchronize()
    # the shortest one, since the clock rate of an idle GPU is low at first
    each = min(one.elapsed_time(other) for one, other in pairwise(marks)) / 1000  # type: ignore[no-untyped-call]
    run = make_run(targets="online", teacher="x:y", store=None, log_every=100, checkpoint_interval=0).train(embed=slow)
    assert run.results["train_seconds"] >= 0.95 * each * run.results["steps"]


def test_two_processes_share_a_card_in_precompute(tmp_path: Path, image_folder: Path) -> None:
    """The store has the bytes that one process writes."""
    (tmp_path / "own.py").write_text(
        "import torch\ndef make():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 16))\n"
    )
    line = f"precompute --images {image_folder} --teacher own:make --pixels 32 --crops 4 --chunk_size 8 --device_crops off"
    for launcher, name in (([], "one"), (["-m", "torch.distributed.run", "--nproc-per-node", "2"], "two")):
        command = [sys.executable, *launcher, "-m", "fkd_ssl", *line.split(), "--store", name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (open_store(tmp_path / name) for name in ("one", "two"))
    assert one.manifest.recipe == RECIPES["mocov2"]
    for row in range(24):
        np.testing.assert_array_equal(one.column().codes(row, slice(None)), two.column().codes(row, slice(None)))


def test_more_processes_than_cards_are_refused_in_training(tmp_path: Path, flat_store: Any, image_folder: Path) -> None:
    """NCCL cannot run two processes on one GPU."""
    count = torch.cuda.device_count() + 1
    line = f"train --images {image_folder} --store {flat_store.folder} --pixels 32 --epochs 1 --batch_size {4 * count}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "fkd_ssl", *line.split()]
    done = subprocess.run([*command, "--out", "run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"{count} processes on this machine, which has" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_cards_with_sync_batchnorm_train_as_one_card(tmp_path: Path, flat_store: Any, image_folder: Path) -> None:
    """Without sync_batchnorm, each process normalises by its own half of the batch, and the losses differ."""
    line = f"train --images {image_folder} --store {flat_store.folder} --pixels 32 --epochs 1 --batch_size 8 --log_every 1"
    losses = {}
    for count, flags in ((1, []), (2, ["--sync_batchnorm"]), (2, [])):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        out = f"{count}{''.join(flags)}"
        command = [*launcher, "-m", "fkd_ssl", *line.split(), *flags, "--out", out]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        losses[out] = np.genfromtxt(tmp_path / out / "metrics.csv", delimiter=",", names=True)["loss"]
    apart = {out: np.abs(loss / losses["1"] - 1).max() for out, loss in losses.items()}
    assert apart["2--sync_batchnorm"] < apart["2"] / 3, apart
