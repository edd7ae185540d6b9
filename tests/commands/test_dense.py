"""Tokens on the command line: stored and online trainings, two processes, compare; an image has its colours in a grid."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.test_ddp import PLAIN, TOLERANCE, TORCHRUN, losses, run

TEACHER = """
import torch
from torch import nn

class Network(nn.Module):
    pixels = 64

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.patches = nn.Conv2d(3, 12, 16, stride=16)

    def forward(self, images):
        return self.patches(images).mean(dim=(2, 3))

def make():
    return Network()
"""
NAMES = "dense_teacher:make,dense_teacher:make@tokens"
STORE = f"precompute --images train --store dense --teacher {NAMES} --grid 2 --crops 4 --codec Flat --chunk_size 16"
SHARED = (
    "--student squeezenet1_1 --epochs 2 --batch_size 12 --crops_per_image 2 --pixels 64 --workers 0 --log_every 1 --lr 1e-3"
)


@pytest.fixture
def dense(work: Path, call: Any) -> Path:
    """`work` with a store `dense` of vectors and tokens."""
    (work / "dense_teacher.py").write_text(TEACHER)
    answer = call(STORE)
    assert answer.status == 0, answer.err
    return work


def test_stored_and_online(dense: Path, call: Any) -> None:
    line = f"train --images train --store dense {SHARED}"
    stored = call(f"{line} --column make,make-tokens --out stored")
    assert stored.status == 0, stored.err
    assert "stored targets, D = 12 and 2 x 2 tokens, D = 12; 2 epochs" in stored.err
    assert "defaults for 18 images and feature_kl+token_cosine: warmup_epochs" in stored.err
    online = call(f"{line} --targets online --teacher {NAMES} --grid 2 --out online")
    assert online.status == 0, online.err
    assert losses(dense / "stored") == pytest.approx(losses(dense / "online"), rel=1e-5)
    results = json.loads((dense / "online/results.json").read_text())
    assert results["teacher_forwards"] == results["crops_seen"]  # both kinds of targets come from one forward pass
    assert call(f"{line} --column make-tokens --out tokens").status == 0
    recorded = call(
        f"train --images train {SHARED} --targets online --teacher {NAMES} --grid 2 --codec Flat --record rec --out rec1"
    )
    assert recorded.status == 0, recorded.err
    assert call(f"train --images train --store rec {SHARED} --column make,make-tokens --out rec2").status == 0
    assert losses(dense / "rec1")[0] == pytest.approx(losses(dense / "rec2")[0], rel=0.05)
    for name in ("stored", "tokens"):
        assert call(f"knn --model {name} --train train --val val --workers 0 --k 3").status == 0
        assert call(f"export --model {name} --out {name}.safetensors").status == 0
    again = call(f"{line} --column make,make-tokens --init stored --objective cosine --out more")
    assert again.status == 0, again.err
    assert json.loads((dense / "more/results.json").read_text())["config"]["objective"] == "cosine+token_cosine"


def test_what_does_not_fit_is_refused(dense: Path, call: Any) -> None:
    line = f"train --images train --store dense {SHARED} --column make-tokens --out run"
    for more, said in {
        "--objective cosine": "objective cosine: the targets of 'make-tokens' are tokens: choose --objective token_cosine",
        "--cutmix 1": "cutmix 1.0: the targets of 'make-tokens' are tokens; it is for class probabilities",
        "--pixels 32": "has no feature map for images of 32 x 32 px, or only one position: use larger images",
        "--head classifier": "head classifier: the targets of 'make-tokens' are tokens: choose --head mocov2 or simreg",
    }.items():
        answer = call(f"{line} {more}")
        assert answer.status == 2, answer.err
        assert said in answer.err
    assert not (dense / "run").exists()
    online = f"train --images train {SHARED} --targets online --teacher {NAMES} --out run"
    compare = f"compare --images train --val val --teacher dense_teacher:make@tokens {SHARED} --out run"
    fine = "a grid of 7 x 7 is too fine: choose --grid 4"
    for wrong in (online, f"{online} --record rec", compare.replace("--log_every 1 ", "")):
        answer = call(wrong)
        assert answer.status == 2, answer.err
        assert fine in answer.err
        assert not (dense / "run").exists()
        assert not (dense / "rec").exists()
    plan = call("plan --count 1000 --teacher dense_teacher:make@tokens --codec SQ8")
    assert (plan.status, f"{fine}, or larger crops (--pixels); --pixels 128 is large enough" in plan.out) == (0, True), plan
    larger = "precompute --images train --store fine --teacher dense_teacher:make@tokens --crops 1 --codec SQ8 --pixels 128"
    assert call(larger).status == 0
    assert call(line).status == 0
    answer = call("precompute --images train --store other --teacher run --checkpoint run --crops 4")
    assert (answer.status, "its first head is for tokens" in answer.err) == (2, True), answer.err


def kill(line: str, folder: Path, steps: int) -> None:
    """Runs the command until it has noted this many steps, then sends SIGKILL."""
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": "."}
    with subprocess.Popen([*PLAIN, *line.split()], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env) as process:
        while process.poll() is None and (not (folder / "metrics.csv").exists() or len(losses(folder)) < steps):
            time.sleep(0.01)
        process.kill()
    assert process.returncode < 0, process.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    "targets", ["--store dense --column make-tokens", f"--targets online --teacher {NAMES} --grid 2 --codec Flat"]
)
def test_a_killed_training_continues_to_the_same_weights(targets: str, dense: Path, call: Any) -> None:
    """Also the store that it records."""
    line = f"train --images train {SHARED} {targets} --ema 0.9 --checkpoint_interval 0".replace("--epochs 2", "--epochs 16")
    record = " --record {}-store" if "online" in targets else ""
    assert call(f"{line} --out whole{record.format('whole')}").status == 0
    for steps in (1, 5, 10):  # of 24
        kill(f"{line} --out run{record.format('run')}", dense / "run", steps)
    answer = call(f"{line} --out run{record.format('run')}")
    assert answer.status == 0, answer.err
    assert "continuing squeezenet1_1" in answer.err
    assert losses(dense / "run") == losses(dense / "whole")
    whole, found = (
        torch.load(dense / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "run")
    )
    assert found.keys() == whole.keys()
    assert all(torch.equal(value, whole[key]) for key, value in found.items())
    if record:
        stored = [
            {p.relative_to(f): p.read_bytes() for p in f.rglob("*.npy")} for f in (dense / "whole-store", dense / "run-store")
        ]
        assert stored[0] == stored[1] != {}


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("targets", ["--store dense --column make,make-tokens", f"--targets online --teacher {NAMES} --grid 2"])
def test_torchrun_is_one_process(targets: str, dense: Path, call: Any) -> None:
    line = f"train --images train {SHARED} {targets} --objective cosine+token_cosine+token_relations"
    assert call(f"{line} --out one").status == 0
    done = run(TORCHRUN, f"{line} --out two")
    assert done.returncode == 0, done.stderr
    assert losses(dense / "two") == pytest.approx(losses(dense / "one"), rel=TOLERANCE)


@pytest.mark.slow
def test_a_compiled_student_and_teacher_give_the_same_training(dense: Path, call: Any) -> None:
    line = f"train --images train {SHARED} --targets online --teacher {NAMES} --grid 2"
    for name, more in (("plain", ""), ("compiled", "--compile")):
        answer = call(f"{line} --out {name} {more}")
        assert answer.status == 0, answer.err
    assert losses(dense / "compiled") == pytest.approx(losses(dense / "plain"), rel=1e-4)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_are_one(dense: Path, call: Any) -> None:
    """ConvNeXt has a normalisation after the pooling, which gets no gradient from tokens."""
    pytest.importorskip("timm")
    line = f"train --images train --store dense {SHARED} --student timm/convnext_atto --column make-tokens"
    assert call(f"{line} --out one").status == 0
    done = run(PLAIN, f"{line} --out two --devices 2")
    assert done.returncode == 0, done.stderr
    assert losses(dense / "two") == pytest.approx(losses(dense / "one"), rel=TOLERANCE)


@pytest.mark.slow
def test_compare(dense: Path, call: Any) -> None:
    answer = call(
        f"compare --images train --val val --teacher dense_teacher:make@tokens --grid 2 --store dense --codec Flat --seeds 1 "
        f"{SHARED.replace('--log_every 1 ', '')} --knn_every 2 --knn_k 5 --out cmp"
    )
    assert answer.status == 0, answer.err
    arms = {arm["name"]: arm for arm in json.loads((dense / "cmp/results.json").read_text())["arms"]}
    assert [*arms] == ["teacher", "untrained", "stored", "online"]
    config = json.loads((dense / "cmp/runs/stored-seed0/results.json").read_text())["config"]
    assert (config["column"], config["objective"]) == ("make-tokens", "token_cosine")
