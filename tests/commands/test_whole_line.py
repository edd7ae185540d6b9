"""The usual order of commands, in this process, on a tiny set; `compare` starts its trainings as processes."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fkd_ssl.text import format_bytes
from fkd_ssl.training.metrics import read_metrics

ARM_KEYS = {
    "name",
    "seed",
    "knn_top1",
    "linear_top1",
    "train_seconds",
    "teacher_forwards",
    "peak_memory_bytes",
    "epochs",
}


def test_precompute_to_linear(work: Path, call: Any, train_line: str) -> None:
    lines = [
        "precompute --images train --store sq8 --teacher own_teacher:make --crops 2",
        "inspect sq8",
        "verify sq8 --images train --teacher own_teacher:make",
        f"{train_line} --out run".replace("--store store", "--store sq8"),
        "knn --model run --train train --val val --workers 0",
        "linear --model run --train train --val val --protocol logreg --workers 0",
    ]
    for line in lines:
        status, out, err = call(line)
        assert status == 0, err
        assert out


@pytest.mark.slow
def test_compare(work: Path, call: Any) -> None:
    line = (
        "compare --images train --val val --teacher own_teacher:make --student squeezenet1_1 --epochs 2 --seeds 1 --out cmp "
        "--batch_size 18 --crops_per_image 2 --pixels 32 --workers 0 --knn_every 1 --knn_k 5 --codec Flat"
    )
    status, out, _ = call(line)
    assert status == 0
    results = json.loads((work / "cmp/results.json").read_text())
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert set(arms) == {"teacher", "untrained", "stored", "online"}
    assert all(set(arm) >= ARM_KEYS for arm in arms.values())
    for name in ("stored", "online"):
        arm = arms[name]
        assert (arm["seed"], arm["epochs"]) == (0, 2)
        assert arm["train_seconds"] > 0
        assert arm["peak_memory_bytes"] > 1e7
        run = work / "cmp/runs" / f"{name}-seed0"
        left = {path.name for path in run.iterdir()}
        assert left == {"config.yaml", "inputs.json", "results.json", "metrics.csv", "checkpoints", "README.md"}
        assert [line["step"] for line in read_metrics(run / "metrics.csv") if line["loss"] is not None] == [2]
    assert (arms["stored"]["teacher_forwards"], arms["online"]["teacher_forwards"]) == (0, 36)
    assert arms["teacher"]["train_seconds"] is None
    assert arms["teacher"]["knn_top1"] > 80
    knn_of_pixels = json.loads(call("knn --model own_teacher:make --train train --val val --k 5 --workers 0 --json").out)
    assert {name: scores["knn_top1"] for name, scores in results["baselines"].items()} == knn_of_pixels["baselines"]
    assert "| 8 x 8 pixels |" in out
    assert results["precompute_seconds"] > 0
    assert results["stores"]["stored"]["bytes"] == sum(
        path.stat().st_size for path in (work / "cmp/store").rglob("*") if path.is_file()
    )
    saved = arms["online"]["train_seconds"] - arms["stored"]["train_seconds"]
    assert results["break_even_students"] == (math.ceil(results["precompute_seconds"] / saved) if saved > 0 else None)
    assert results["crops"] == 2
    for name in ("config.yaml", "report.md", "report.html", "loss.png", "knn.png", "sheet.png"):
        assert (work / "cmp" / name).stat().st_size > 0
    page = (work / "cmp/report.md").read_text()
    assert ("the store does not pay off" if saved <= 0 else "the store pays off after") in page
    assert "| stored |" in out

    before = {path: path.stat().st_mtime_ns for path in (work / "cmp").rglob("*") if "report" not in path.name}
    again = call(f"{line} --json")
    assert again.status == 0
    assert "cmp: this comparison is done" in again.err
    assert json.loads(again.out) == results
    unchanged = {path: path.stat().st_mtime_ns for path in before if path.suffix not in (".png", "")}
    assert unchanged == {path: before[path] for path in unchanged}

    status, _, err = call(f"{line} --lr 0.1")
    assert status == 2
    assert "cmp: holds a run of another config (lr is 0.003 there, 0.1 here)" in err

    (work / "cmp/results.json").unlink()  # killed before the end: finished parts are not run again
    assert call(line).status == 0
    assert {path: path.stat().st_mtime_ns for path in unchanged if "/runs/" in str(path)} == {
        path: stamp for path, stamp in unchanged.items() if "/runs/" in str(path)
    }


@pytest.mark.slow
def test_compare_two_teachers(work: Path, call: Any) -> None:
    line = (
        "compare --images train --val val --teacher own_teacher:make,own_teacher:other --student squeezenet1_1 --epochs 2 "
        "--seeds 1 --out cmp --batch_size 18 --crops_per_image 2 --pixels 32 --workers 0 --knn_every 1 --knn_k 5 --codec Flat"
    )
    status, out, _ = call(line)
    assert status == 0
    results = json.loads((work / "cmp/results.json").read_text())
    trained = [f"{kind}:{names}" for kind in ("stored", "online") for names in ("make", "other", "make+other")]
    assert [arm["name"] for arm in results["arms"]] == ["teacher:make", "teacher:other", "untrained", *trained]
    forwards = {arm["name"]: arm["teacher_forwards"] for arm in results["arms"]}
    assert [forwards[name] for name in trained] == [0, 0, 0, 36, 36, 72]
    pairs = [
        ("stored:make+other", "online:make+other"),
        ("stored:make+other", "stored:make"),
        ("stored:make+other", "stored:other"),
    ]
    assert [(pair["arm"], pair["minus"]) for pair in results["differences"]] == pairs
    arms = {arm["name"]: arm for arm in results["arms"]}
    gain = arms["stored:make+other"]["knn_top1"] - arms["stored:make"]["knn_top1"]
    assert results["differences"][1]["knn_top1"]["difference"] == pytest.approx(gain, abs=1e-6)
    configs = {
        run: json.loads((work / f"cmp/runs/{run}-seed0/results.json").read_text())["config"]
        for run in ("stored-make", "stored-make+other", "online-other")
    }
    assert [config["column"] or config["teacher"] for config in configs.values()] == ["make", "make,other", "own_teacher:other"]
    assert "| stored:make+other |" in out
    assert "| stored:make+other minus stored:make | kNN |" in out
    again = call(f"{line} --json")
    assert json.loads(again.out) == results


@pytest.mark.slow
def test_compare_further_arms_and_seeds(work: Path, call: Any) -> None:
    line = (
        "compare --images train --val val --teacher own_teacher:make --student squeezenet1_1 --epochs 4 --out cmp "
        "--batch_size 18 --crops_per_image 2 --pixels 32 --workers 0 --knn_every 2 --knn_k 5 --codec SQ8 --alone_momentum 0.9"
    )
    assert call(line).status == 0
    before = {path: path.stat().st_mtime_ns for path in (work / "cmp").rglob("*") if path.parent.parent.name in ("runs", "cmp")}
    further = ["online:stored_crops", "alone", "stored:C=2", "stored:SQ4"]
    status, out, err = call(line, further_arms=" ".join(further))
    assert status == 0, err
    assert {path: path.stat().st_mtime_ns for path in before if "/runs/" in str(path)} == {
        path: stamp for path, stamp in before.items() if "/runs/" in str(path)
    }
    results = json.loads((work / "cmp/results.json").read_text())
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert list(arms) == [
        "teacher",
        "untrained",
        "stored",
        "online",
        "online:stored_crops",
        "stored:C=2",
        "stored:SQ4",
        "alone",
    ]
    assert [(pair["arm"], pair["minus"]) for pair in results["differences"]] == [
        ("stored", "online"),
        ("online:stored_crops", "online"),
        ("stored", "alone"),
        ("stored:C=2", "stored"),
        ("stored:SQ4", "stored"),
    ]
    assert (arms["online:stored_crops"]["teacher_forwards"], arms["alone"]["teacher_forwards"]) == (72, 0)
    assert {name: store["crops"] for name, store in results["stores"].items()} == {
        "stored": 4,
        "stored:C=2": 2,
        "stored:SQ4": 4,
    }
    assert results["stores"]["stored:SQ4"]["bytes"] < results["stores"]["stored"]["bytes"]
    note = json.loads((work / "cmp/alone.json").read_text())
    assert note["seconds"] == pytest.approx(results["precompute_seconds"] + arms["stored"]["train_seconds"])
    assert note["epochs"] == arms["alone"]["epochs"] == max(1, round(note["seconds"] / note["epoch_seconds"]))
    configs = {
        run: json.loads((work / f"cmp/runs/{run}-seed0/results.json").read_text())["config"]
        for run in ("online-stored_crops", "stored-C=2", "stored-SQ4")
    }
    assert [config["store"] for config in configs.values()] == ["cmp/store", "cmp/store-C=2", "cmp/store-SQ4"]
    page = (work / "cmp/report.html").read_text()
    assert page.count("<svg ") == 3
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert all(name in out for name in further)

    assert call(f"{line} --seeds 2", further_arms="alone").status == 0
    results = json.loads((work / "cmp/results.json").read_text())
    assert [(arm["name"], arm["seed"]) for arm in results["arms"]][1:] == [
        (name, seed) for seed in (0, 1) for name in ("untrained", "stored", "online", "alone")
    ]
    assert "± is the standard deviation over the 2 seeds" in (work / "cmp/report.md").read_text()


STORED = (
    "compare --images train --val val --teacher own_teacher:make --store store --student squeezenet1_1 --epochs 3 --out cmp "
    "--batch_size 18 --crops_per_image 2 --workers 0 --knn_every 3 --knn_k 5"
)


@pytest.mark.slow
def test_compare_uses_an_existing_store(work: Path, call: Any) -> None:
    before = {path: path.read_bytes() for path in (work / "store").rglob("*") if path.is_file()}
    status, out, err = call(STORED, further_arms="alone stored:C=3")  # 2 crops at a time of 3
    assert status == 0, err
    assert {path: path.read_bytes() for path in (work / "store").rglob("*") if path.is_file()} == before
    assert not (work / "cmp/store").exists()
    results = json.loads((work / "cmp/results.json").read_text())
    assert (results["crops"], results["config"]["codec"], results["config"]["pixels"]) == (4, "Flat", 32)
    assert results["stores"]["stored"] == {"bytes": sum(map(len, before.values())), "crops": 4, "seconds": None}
    assert (results["precompute_seconds"], results["break_even_students"]) == (None, None)
    assert "break-even is unknown, because the store was made before the comparison" in out
    assert "trained for as long as stored (the time of precomputing is unknown)" in out
    stores = [
        json.loads((work / f"cmp/runs/{run}-seed0/results.json").read_text())["config"]["store"]
        for run in ("stored", "stored-C=3")
    ]
    assert stores == ["store", "cmp/store-C=3"]
    assert (work / "cmp/sheet.png").stat().st_size > 0
    assert "cmp: this comparison is done" in call(STORED, further_arms="alone stored:C=3").err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--crops 5", "store: its crops per image is 4, not 5"),
        ("--codec SQ8", "this column's codec is Flat, not SQ8"),
        ("--pixels 48", "this column's pixels is 32, not 48"),
        ("--recipe swav", "store: its recipe is"),
        ("--images val", "store: was made from other images"),
        ("--teacher own_teacher:other", "'other'"),
        ("--store nowhere", "nowhere"),
        ("--crops_per_image 6", "must be at least crops_per_image 6"),
        ("--further_arms stored:Flat", "the store already has this codec"),
    ],
)
def test_compare_refuses_a_store_that_does_not_match(work: Path, call: Any, change: str, said: str) -> None:
    answer = call(f"{STORED} {change}")
    assert (answer.status, answer.out) == (2, "")
    assert said in answer.err
    assert not (work / "cmp").exists()


@pytest.mark.slow
def test_compare_classifiers(work: Path, call: Any) -> None:
    line = (
        "compare --images train --val val --teacher own_teacher:pooled --student squeezenet1_1 --epochs 4 --out cmp "
        "--head classifier --objective soft_ce --recipe fkd --lr 3e-3 "
        "--batch_size 18 --crops_per_image 2 --pixels 32 --workers 0 --knn_every 2 --knn_k 5"
    )
    status, out, err = call(line, further_arms="labels relabel stored:hard alone")
    assert status == 0, err
    results = json.loads((work / "cmp/results.json").read_text())
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert {name for name, arm in arms.items() if "top1" in arm} == {*arms} - {"alone"}
    assert arms["teacher"]["top1"] == 100
    assert results["stores"]["relabel"]["crops"] is None
    assert f"- Label maps of relabel: {format_bytes(results['stores']['relabel']['bytes'])} (" in out
    assert arms["labels"]["teacher_forwards"] == 0
    own = json.loads((work / "cmp/runs/labels-seed0/results.json").read_text())
    assert (own["top1"], own["config"]["targets"]) == (arms["labels"]["top1"], "labels")
    pairs = {(pair["arm"], pair["minus"]): pair for pair in results["differences"]}
    assert pairs["stored", "labels"]["top1"]["difference"] == pytest.approx(arms["stored"]["top1"] - arms["labels"]["top1"])
    assert "top1" not in pairs["stored", "alone"]
    header = next(line for line in out.splitlines() if line.startswith("| arm")).split(" | ")
    assert header[:3] == ["| arm", "top-1", "kNN top-1"]
    assert "| stored minus labels | top-1 of its own classes |" in out
    assert [line.split(" | ")[1] for line in out.splitlines() if line.startswith("| alone")] == [""]


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ("online:storedcrops", "further_arms 'online:storedcrops': unknown arm; did you mean online:stored_crops?"),
        ("stored:C=4", "expected 2 (--crops_per_image) to 3 crops"),
        ("stored:C=1", "expected 2 (--crops_per_image) to 3 crops"),
        ("stored:SQ8", "the store already has this codec"),
        ("stored:SQ9", "'SQ9': not supported"),
        ("alone alone", "this arm is in the comparison already"),
    ],
)
def test_compare_refuses_further_arms_early(work: Path, call: Any, further: str, said: str) -> None:
    line = (
        "compare --images train --val val --teacher own_teacher:make --student squeezenet1_1 --epochs 4 --crops_per_image 2 "
        "--batch_size 16 --out cmp"
    )
    answer = call(line, further_arms=further)
    assert (answer.status, answer.out) == (2, "")
    assert said in answer.err
    assert not (work / "cmp").exists()


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ("--seeds 0", 2, "must be positive"),
        ("--crops 2", 2, "must be at least crops_per_image 4"),
        ("--codec nosuch", 2, "'nosuch': not supported"),
        ("--val nowhere", 2, "nowhere: no such folder of images"),
        ("--images train/ash", 2, "are outside any class folder"),
        ("--teacher mocov2", 2, "--checkpoint is needed"),
        ("--teacher own_teacher:make,own_teacher:make", 2, "a teacher is named twice"),
        ("--teacher own_teacher:classes", 2, "the targets of 'classes' are class probabilities: choose --head classifier"),
        (
            "--teacher own_teacher:classes --objective soft_ce --head classifier --codec SQ8",
            2,
            "is not for class probabilities",
        ),
        ("--teacher own_teacher:classes --objective soft_ce --head classifier --val val2", 2, "val2: has 2 class folders, but"),
        (
            "--teacher own_teacher:classes --objective soft_ce --head classifier --further_arms relabel",
            2,
            "label maps need a network that ends in global average pooling",
        ),
        (
            "--images train2 --teacher own_teacher:classes --objective soft_ce --head classifier --further_arms labels",
            2,
            "train2: has 4 class folders, but the classifier has 3 classes",
        ),
        ("--teacher_weights 2", 2, "teacher_weights '2': there is one teacher"),
        ("--teacher a,b,c", 2, "compare takes one or two teachers"),
        ("--teacher mocov2,swav --checkpoint F", 2, "checkpoint 'F': 1 for 2 teachers"),
        ("--objective prototype_ce", 2, "the targets of 'make' have no prototypes"),
        ("--out train", 2, "train: exists and is not a run of fkd-ssl"),
    ],
)
def test_compare_refuses_early(work: Path, call: Any, change: str, status: int, said: str) -> None:
    line = (
        "compare --images train --val val --teacher own_teacher:make --student squeezenet1_1 --epochs 4 --batch_size 16 "
        "--out cmp"
    )
    for name in ("ash", "birch"):
        shutil.copytree(work / "val" / name, work / "val2" / name)
    shutil.copytree(shutil.copytree(work / "train", work / "train2") / "ash", work / "train2/date")
    answer = call(f"{line} {change}")
    assert (answer.status, answer.out) == (status, "")
    assert said in answer.err
    assert not (work / "cmp").exists()
