"""Tokens on the command line: stored and online trainings, two processes, compare; an image has its colours in a grid."""

import json
from pathlib import Path
from typing import Any

import pytest

from fkd_ssl.training.metrics import read_metrics
from tests.commands.test_ddp import PLAIN, TOLERANCE, run

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


def losses(folder: Path) -> list[float | None]:
    return [line["loss"] for line in read_metrics(folder / "metrics.csv") if line["loss"] is not None]


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
    assert call(line).status == 0
    answer = call("precompute --images train --store other --teacher run --checkpoint run --crops 4")
    assert (answer.status, "its first head is for tokens" in answer.err) == (2, True), answer.err


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
