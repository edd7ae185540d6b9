"""knn and linear through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

SETS = "--train train --val val --workers 0"
TEACHER = "--model teacher:own_teacher:make"


@pytest.mark.parametrize("verb", ["knn", "linear --protocol logreg", "linear --protocol moco --epochs 1"])
def test_json_is_one_object(work: Path, call: Any, verb: str) -> None:
    status, out, _ = call(f"{verb} {TEACHER} {SETS} --json")
    assert status == 0
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result["kind"] == verb.split()[0]
    assert 0 <= result["top1"] <= result["top5"] <= 100
    assert result["interval95"][0] <= result["top1"] <= result["interval95"][1]
    assert (result["config"]["model"], result["config"]["pixels"]) == ("teacher:own_teacher:make", 32)
    assert "torch" in result["versions"]


@pytest.mark.parametrize("verb", ["knn --k 5", "linear --protocol logreg"])
def test_colours_are_told_apart(work: Path, call: Any, verb: str) -> None:
    assert json.loads(call(f"{verb} {TEACHER} {SETS} --json").out)["top1"] > 80


def test_a_line_for_people(work: Path, call: Any) -> None:
    status, out, _ = call(f"knn {TEACHER} {SETS}")
    assert status == 0
    assert out.startswith("teacher:own_teacher:make: kNN-20 at 32 px: top-1 ")
    assert out.count("\n") == 1


def test_a_run_is_a_model_and_so_is_its_checkpoint(work: Path, call: Any, train_line: str) -> None:
    assert call(f"{train_line} --out run").status == 0
    answers = [call(f"knn --model {model} {SETS} --json") for model in ("run", "run/checkpoints/last.ckpt")]
    results = [json.loads(answer.out) for answer in answers]
    assert results[0]["top1"] == results[1]["top1"]
    assert results[0]["config"]["pixels"] == 32
    status, _, err = call(f"knn --model run --checkpoint x.pth {SETS}")
    assert status == 2
    assert "--checkpoint goes with --model teacher:NAME" in err


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (f"knn --model nowhere {SETS}", 2, "--model nowhere: no such run or checkpoint"),
        (f"knn --model train {SETS}", 2, "looked for train/checkpoints/last.ckpt"),
        (f"knn --model own_teacher.py {SETS}", 2, "own_teacher.py: not a checkpoint of fkd-ssl train"),
        (f"knn --model foreign.pth {SETS}", 2, "foreign.pth: not a checkpoint of fkd-ssl train"),
        (f"knn --model teacher:mocov2 {SETS}", 2, "--checkpoint is needed"),
        (f"knn {TEACHER} --train nowhere --val val", 2, "nowhere: no such folder of images"),
        (f"knn {TEACHER} --train empty --val val", 2, "empty: no images in this folder"),
        (f"knn {TEACHER} --train flat --val val", 2, "flat: 1 of 1 images lie outside any class folder"),
        (f"knn {TEACHER} --train train/ash --val val", 2, "lie outside any class folder"),
        (f"knn {TEACHER} --train train --val odd", 2, "1 of its 1 classes have no picture in train: 'oak'"),
        (f"knn {TEACHER} {SETS} --k 0", 2, "k"),
        (f"knn {TEACHER} --train train --val torn --workers 0", 1, "torn/ash/0.png: not a readable image"),
        (f"linear {TEACHER} {SETS} --protocol logreg --epochs 3", 2, "--epochs goes with --protocol moco or swav"),
        (f"linear {TEACHER} {SETS} --protocol simclr", 2, "--protocol"),
    ],
)
def test_what_is_refused(work: Path, call: Any, line: str, status: int, said: str) -> None:
    import torch

    for name in ("empty", "flat", "odd/oak", "torn/ash"):
        (work / name).mkdir(parents=True)
    for name in ("flat", "odd/oak"):
        shutil.copy(work / "val/ash/0.png", work / name)
    (work / "torn/ash/0.png").write_bytes(b"no picture")
    torch.save({"state_dict": {}}, work / "foreign.pth")
    answer = call(line)
    assert (answer.status, answer.out) == (status, "")
    assert said in answer.err
