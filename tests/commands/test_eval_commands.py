"""knn and linear through the command line."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkd_ssl.commands import resolve

SETS = "--train train --val val --workers 0"
ODD = """
class Pair(Network):
    def forward(self, pixels):
        return super().forward(pixels), pixels

class Broken(Network):
    def forward(self, pixels):
        return super().forward(pixels) * float("nan")

def pair():
    return Pair()

def nan():
    return Broken()
"""
CONSTANT = """
import torch

class Constant(torch.nn.Module):
    def forward(self, pixels):
        return torch.ones(len(pixels), 4)

def make():
    return Constant()
"""
TEACHER = "--model teacher:own_teacher:make"


@pytest.mark.parametrize(
    "verb",
    [
        "knn",
        "knn --preset dino",
        "linear --protocol logreg",
        "linear --protocol sweep",
        "linear --protocol moco --epochs 1",
        "linear --protocol simclr --epochs 1 --batch_size 8",
    ],
)
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
    assert len(result["model"]["weights_sha256"]) == 64
    assert result["data"]["val"]["images"] == 12
    assert (result["transform"]["resize"], result["transform"]["centre_crop"]) == (37, 32)
    assert result["protocol"]


def test_several_protocols_are_several_results(work: Path, call: Any) -> None:
    line = f"linear {TEACHER} {SETS} --protocol moco,logreg,swav --epochs 2 --batch_size 8 --out probes"
    status, out, _ = call(line)
    assert status == 0
    assert sorted(line.split(": ")[1].split("(")[1].split(")")[0] for line in out.splitlines()) == ["logreg", "moco", "swav"]
    found = {name: json.loads((work / "probes" / name / "results.json").read_text()) for name in ("moco", "logreg", "swav")}
    assert [value["protocol"] for value in found.values()] == list(found)
    assert {value["config"]["epochs"] for value in found.values()} == {2, None}
    again = call(line + " --workers 1")
    assert sorted(again.out.splitlines()) == sorted(out.splitlines())
    assert again.err.count("this evaluation is done") == 3
    alone = json.loads(call(f"linear {TEACHER} {SETS} --protocol swav --epochs 2 --batch_size 8 --json").out)
    assert alone["history"] == found["swav"]["history"]
    further = call(line.replace("swav", "swav,simsiam") + " --json")  # existing results are not computed again
    assert [json.loads(row)["protocol"] for row in further.out.splitlines()] == ["moco", "logreg", "swav", "simsiam"]
    assert "simsiam epoch 2/2" in further.err
    assert "moco epoch" not in further.err


def test_a_request_that_fails_leaves_no_folder(work: Path, call: Any) -> None:
    for line, right in (
        (f"linear {TEACHER} {SETS} --protocol moco,swav --epochs 0 --out out", "--epochs 1"),
        (f"linear --model own_teacher:nothing {SETS} --protocol moco --epochs 1 --out one", TEACHER),
        (f"knn --model own_teacher:nothing {SETS} --k 3 --out knn", TEACHER),
    ):
        out = line.split()[-1]
        assert call(line).status != 0
        assert not (work / out).exists()
        wrong = "--epochs 0" if "--epochs 0" in line else "--model own_teacher:nothing"
        assert call(line.replace(wrong, right)).status == 0
    (work / "file").write_text("")
    answer = call(f"linear {TEACHER} {SETS} --protocol moco,swav --epochs 1 --out file")
    assert answer.status == 2
    assert "file: is a file; --out must name a folder" in answer.err
    answer = call(f"linear {TEACHER} {SETS} --protocol moco,swav --epochs 1 --out one")
    assert answer.status == 2
    assert "one: holds the evaluation of one protocol; choose another --out for several" in answer.err
    answer = call(f"linear {TEACHER} {SETS} --protocol moco,simclr --epochs 2 --out out")  # moco is done, with one epoch
    assert answer.status == 2
    assert "holds a run of another config (epochs is 1 there, 2 here)" in answer.err
    assert not (work / "out/simclr").exists()


@pytest.mark.parametrize("verb", ["knn --k 5", "linear --protocol logreg", "linear --protocol sweep"])
def test_colours_are_told_apart(work: Path, call: Any, verb: str) -> None:
    assert json.loads(call(f"{verb} {TEACHER} {SETS} --json").out)["top1"] > 80


@pytest.mark.parametrize(
    "verb", ["knn --k 3", "knn --k 3 --shots 2", "knn --k 3 --leave_one_out", "linear", "linear --protocol sweep"]
)
def test_baselines_stand_beside_the_score(work: Path, call: Any, verb: str) -> None:
    """The classes are colours, which a histogram tells apart; a network of constant features is said to be no better."""
    (work / "constant.py").write_text(CONSTANT)
    sets = SETS.replace("--val val ", "") if "leave_one_out" in verb else SETS
    result = json.loads(call(f"{verb} {TEACHER} {sets} --json").out)
    assert set(result["baselines"]) == {"pixels", "colours", "chance"}
    assert list(result["baselines"].values()) == sorted(result["baselines"].values(), reverse=True)
    assert result["baselines"]["colours"] > 80
    assert result["baselines"]["chance"] == pytest.approx(100 / 3)
    assert result["line"].endswith(", chance 33.33 %")
    assert " %) is no better than " in call(f"{verb} --model constant:make --pixels 32 {sets}").err
    cached = json.loads(call(f"{verb} {TEACHER} {sets} --features cache --json").out)
    assert cached["baselines"] == result["baselines"]
    alone = json.loads(call(f"{verb} {TEACHER} {sets} --baseline chance --json").out)
    assert alone["baselines"] == {"chance": pytest.approx(100 / 3)}
    assert alone["top1"] == result["top1"]


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
    assert "--checkpoint is for --model teacher:NAME" in err


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (f"knn --model nowhere {SETS}", 2, "--model nowhere: no such run or checkpoint"),
        (f"knn --model train {SETS}", 2, "looked for train/checkpoints/last.ckpt"),
        (f"knn --model own_teacher.py {SETS}", 2, "own_teacher.py: cannot be read as a checkpoint"),
        (f"knn --model foreign.pth {SETS}", 2, "foreign.pth: not a checkpoint of fkd-ssl train"),
        (f"knn --model teacher:mocov2 {SETS}", 2, "--checkpoint is needed"),
        (f"knn {TEACHER} --train nowhere --val val", 2, "nowhere: no such folder of images"),
        (f"knn {TEACHER} --train empty --val val", 2, "empty: no images in this folder"),
        (f"knn {TEACHER} --train flat --val val", 2, "flat: 1 of 1 images are outside any class folder"),
        (f"knn {TEACHER} --train train/ash --val val", 2, "are outside any class folder"),
        (f"knn {TEACHER} --train train --val odd", 2, "1 of its 1 classes have no image in train: 'oak'"),
        (f"knn {TEACHER} {SETS} --k 0", 2, "k"),
        (f"knn {TEACHER} --train train --val torn --workers 0", 1, "torn/ash/0.png: not a readable image"),
        (f"linear {TEACHER} {SETS} --protocol logreg --epochs 3", 2, "--epochs needs --protocol moco, swav"),
        (f"linear {TEACHER} {SETS} --protocol moco,byol", 2, "--protocol moco,byol: no protocol 'byol' (known: moco, swav"),
        (f"linear {TEACHER} {SETS} --protocol moco,", 2, "--protocol moco,: no protocol ''"),
        (f"linear {TEACHER} {SETS} --protocol swav,swav", 2, "--protocol swav,swav: names a protocol twice"),
        (f"linear {TEACHER} {SETS} --protocol moco --baseline pixels", 2, "--baseline pixels needs --protocol sweep or logreg"),
        ("knn --train x.npy,y.npy --val x.npy,y.npy --baseline pixels", 2, "--baseline pixels needs images, and x.npy,y.npy"),
        (f"linear {TEACHER} {SETS} --protocol sweep --lr 3", 2, "--lr needs --protocol moco, swav"),
        (f"linear {TEACHER} {SETS} --protocol moco --features cache", 2, "--features needs --protocol sweep or logreg"),
        (f"linear {TEACHER} --protocol logreg --train one --val one", 2, "one: one class only, 'ash'; expected a folder"),
        (f"linear {TEACHER} --protocol moco --train one --val one", 2, "one: one class only, 'ash'; expected a folder"),
        (f"knn {TEACHER} --train one --val one", 2, "one: one class only, 'ash'; expected a folder for each of two or more"),
        (f"knn {TEACHER} --train deep --val val", 2, "'train' holds only folders; if these are the classes, give deep/train"),
        ("knn --train x.npy,same.npy --val x.npy,same.npy", 2, "train_labels: one class only; a score needs at least two"),
        (
            "linear --protocol sweep --train x.npy,same.npy --val x.npy,same.npy",
            2,
            "one class only; a score needs at least two",
        ),
        ("retrieve --gallery x.npy,same.npy", 2, "gallery_labels: one class only; a score needs at least two"),
        (f"knn {TEACHER} --train train", 2, "--val or --leave_one_out must be given"),
        (f"knn {TEACHER} {SETS} --leave_one_out", 2, "--val or --leave_one_out must be given"),
        (f"knn {TEACHER} --train train --leave_one_out --shots 2", 2, "--shots cannot be combined with --leave_one_out"),
        (f"knn {TEACHER} {SETS} --preset dino --k 3", 2, "--preset dino sets --k and --temperature"),
        (f"knn {TEACHER} {SETS} --draws 3", 2, "--draws and --seed need --shots"),
        (f"knn {TEACHER} {SETS} --shots few", 2, "--shots few: expected a number of images per class, such as 5"),
        (f"knn {TEACHER} {SETS} --shots 100%", 2, "--shots 100%: expected"),
        (f"knn {TEACHER} {SETS} --shots 7", 2, "shots 7: class 0 has 6 training images"),
        (f"knn {TEACHER} {SETS} --k 5,many", 2, "--k 5,many: expected a number, or several such as 10,20"),
        (f"knn {SETS}", 2, "--model must be given, or features as FEATURES.npy,LABELS.npy"),
        (f"knn --model own_teacher:pair {SETS}", 1, "gives tuple for [2, 3, 32, 32] floats, expected one tensor [2, D]"),
        (f"knn --model own_teacher:nan {SETS}", 1, "NaN or infinity"),
        (f"knn --model torchvision/resnet18x {SETS}", 2, "torchvision"),
        (f"knn {TEACHER} --train cifar10:train:. --val val", 2, "cifar10 is missing or damaged"),
        ("knn --train x.npy,y.npy --val val", 2, "give images for both or files of features for both"),
        ("knn --train x.npy --val x.npy,y.npy", 2, "x.npy: expected two files, FEATURES.npy,LABELS.npy"),
        ("knn --train gone.npy,y.npy --val x.npy,y.npy", 2, "gone.npy: cannot be read: No such file"),
        (
            "knn --train pickled.npy,y.npy --val x.npy,y.npy",
            2,
            "pickled.npy: not a .npy file of numbers (Array can't be memory-mapped",
        ),
        ("knn --train archive.npy,y.npy --val x.npy,y.npy", 2, "archive.npy: not a .npy file of numbers"),
        ("knn --train pipe.npy,y.npy --val x.npy,y.npy", 2, "pipe.npy: not a regular file"),
        ("knn --train x.npy,short.npy --val x.npy,y.npy", 2, "short.npy: expected one label for each of 9 features"),
        ("knn --train x.npy,y.npy --val nan.npy,y.npy", 1, "nan.npy: 9 of 9 rows have NaN or infinity"),
        ("knn --train x.npy,y.npy --val x.npy,other.npy", 2, "labels: label 8 is not one of the 3 classes in the training"),
        ("knn --train x.npy,y.npy --val x.npy,none.npy", 2, "none.npy: 9 of 9 have no class (label -1)"),
        ("knn --train words.npy,y.npy --val x.npy,y.npy", 2, "words.npy: holds <U1 [9, 4], expected numbers"),
        ("linear --protocol moco --train x.npy,y.npy --val x.npy,y.npy", 2, "--protocol moco trains on random crops of images"),
    ],
)
def test_what_is_refused(work: Path, call: Any, line: str, status: int, said: str) -> None:
    import torch

    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    values = {
        "x": rows,
        "nan": rows * np.nan,
        "y": np.arange(9) % 3,
        "short": np.arange(8),
        "same": np.full(9, 1),
        "other": np.full(9, 8),
    }
    for name, value in {**values, "none": np.full(9, -1), "words": np.full((9, 4), "a")}.items():
        np.save(work / f"{name}.npy", value)
    np.save(work / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(work / "archive", x=np.zeros(3))
    (work / "archive.npz").rename(work / "archive.npy")
    os.mkfifo(work / "pipe.npy")
    with (work / "own_teacher.py").open("a") as file:
        file.write(ODD)
    sys.modules.pop("own_teacher", None)
    shutil.copytree(work / "train/ash", work / "one/ash")
    shutil.copytree(work / "train", work / "deep/train")
    for name in ("empty", "flat", "odd/oak", "torn/ash"):
        (work / name).mkdir(parents=True)
    for name in ("flat", "odd/oak"):
        shutil.copy(work / "val/ash/0.png", work / name)
    (work / "torn/ash/0.png").write_bytes(b"no picture")
    torch.save({"state_dict": {}}, work / "foreign.pth")
    answer = call(line)
    assert (answer.status, answer.out) == (status, "")
    assert said in answer.err


def test_several_k_make_a_table_and_the_headline_is_twenty(work: Path, call: Any) -> None:
    status, out, _ = call(f"knn {TEACHER} {SETS} --k 3,20 --temperature 0.07,inf")
    lines = out.splitlines()
    assert (status, len(lines)) == (0, 6)
    assert lines[0].split() == ["k", "T", "top-1", "top-5"]
    assert lines[2].split()[:2] == ["3", "inf"]
    assert lines[-1].startswith("teacher:own_teacher:make: kNN-20 at 32 px")
    out = call(f"knn {TEACHER} {SETS} --k 3,20 --temperature inf --json").out
    rows = json.loads(out, parse_constant=pytest.fail)["grid"]  # JSON has no Infinity
    assert [(row["k"], row["temperature"]) for row in rows] == [(3, "Infinity"), (18, "Infinity")]


def test_leave_one_out_and_few_shot(work: Path, call: Any) -> None:
    alone = json.loads(call(f"knn {TEACHER} --train train --leave_one_out --k 3 --workers 0 --json").out)
    assert (alone["n_train"], alone["n_val"]) == (18, 18)
    few = json.loads(call(f"knn {TEACHER} {SETS} --k 3 --shots 2 --draws 4 --seed 1 --json").out)
    assert (few["n_train"], len(few["draws"])) == (6, 4)
    assert few["top1"] == pytest.approx(np.mean([draw["top1"] for draw in few["draws"]]))
    status, out, _ = call(f"knn {TEACHER} {SETS} --k 1 --shots 20%")
    assert status == 0
    assert "(mean and deviation of 5 draws)" in out


def test_features_are_kept_and_change_nothing(work: Path, call: Any) -> None:
    plain = json.loads(call(f"knn {TEACHER} {SETS} --json").out)
    made = call(f"features {TEACHER} --images train --features cache --workers 0")
    pair, _, said = made.out.partition(": ")
    assert said == "18 images, 16 dimensions\n"
    for verb in ("knn", "linear --protocol logreg", "linear --protocol sweep"):
        assert call(f"{verb} {TEACHER} {SETS} --features cache").status == 0
    assert len(list((work / "cache").iterdir())) == 2
    kept = json.loads(call(f"knn {TEACHER} {SETS} --features cache --json").out)
    assert kept["top1"] == plain["top1"]
    assert kept["data"]["train"]["sha256"] == plain["data"]["train"]["sha256"]
    val = json.loads(call(f"features {TEACHER} --images val --features cache --workers 0 --json").out)["entry"]
    by_file = json.loads(call(f"knn --train {pair} --val {val}/features.npy,{val}/labels.npy --json").out)
    assert (by_file["top1"], by_file["model"]["name"], by_file["transform"]) == (plain["top1"], None, None)
    assert set(by_file["per_class"]) == {"0", "1", "2"}
    for protocol in ("sweep", "logreg"):
        assert call(f"linear --protocol {protocol} --train {pair} --val {pair}").status == 0


def test_labels_of_files_may_have_gaps(work: Path, call: Any) -> None:
    rows = np.repeat(np.eye(3), 4, axis=0) + np.random.default_rng(0).normal(0, 0.05, (12, 3))
    np.save(work / "x.npy", rows)  # float64
    np.save(work / "y.npy", np.repeat([7, 10**12, 3], 4))
    for verb in ("knn --k 3", "linear --protocol logreg"):
        result = json.loads(call(f"{verb} --train x.npy,y.npy --val x.npy,y.npy --json").out)
        assert (result["top1"], result["classes"]) == (100, 3)
        assert set(result["per_class"]) == {"3", "7", "1000000000000"}


def test_out_keeps_the_result(work: Path, call: Any) -> None:
    line = f"knn {TEACHER} {SETS} --out scored"
    first = call(line)
    results = json.loads((work / "scored/results.json").read_text())
    assert (results["kind"], results["protocol"]) == ("knn", "k 20, T 0.07")
    assert np.load(work / "scored/correct.npy").shape == (12,)
    again = call(line)
    assert (again.status, again.out) == (0, first.out)
    assert "this evaluation is done" in again.err
    assert json.loads(call(f"{line} --json").out) == results
    other = call(f"{line} --k 3")
    assert other.status == 2
    assert "scored: holds a run of another config (k is 20 there, 3 here)" in other.err


@pytest.mark.parametrize("spec", ["own_teacher:make", "teacher:own_teacher:make"])
def test_a_teacher_needs_no_prefix(work: Path, call: Any, spec: str) -> None:
    assert call(f"knn --model {spec} {SETS}").status == 0


def test_a_network_of_torchvision(work: Path, call: Any) -> None:
    import torch
    from torchvision.models import shufflenet_v2_x0_5

    torch.save(shufflenet_v2_x0_5().state_dict(), work / "weights.pth")
    line = f"knn --model torchvision/shufflenet_v2_x0_5 --checkpoint weights.pth --pixels 32 {SETS} --json"
    result = json.loads(call(line).out)
    assert result["model"]["checkpoint"] == "weights.pth"
    assert "shufflenet_v2_x0_5" in result["model"]["network"]


def test_the_same_images_twice_and_collapsed_features_get_a_note(work: Path, call: Any) -> None:
    itself = "every image finds itself"
    assert itself in call(f"knn {TEACHER} --train train --val train").err
    assert itself not in call(f"knn {TEACHER} {SETS}").err
    assert (
        "the probe is scored on its training images"
        in call(f"linear {TEACHER} --train train --val train --protocol moco --epochs 1 --workers 0").err
    )
    rows = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    collapsed = "the features are nearly constant (collapsed)"
    for name, value, noted in (
        ("spread", rows, False),
        ("constant", rows * 1e-3 + 1, True),
        ("close", rows * 0.2 + 1, False),
        ("zero", rows * 0, True),
    ):
        np.save(work / f"{name}.npy", value)
        np.save(work / "y.npy", np.arange(60) % 3)
        for line in (f"knn --train {name}.npy,y.npy --leave_one_out", f"retrieve --gallery {name}.npy,y.npy"):
            assert (collapsed in call(line).err) == noted
        pair = f"{name}.npy,y.npy"
        assert (collapsed in call(f"linear --protocol logreg --train {pair} --val {pair}").err) == noted


def test_another_mean_or_std_is_another_model(work: Path) -> None:
    """Checkpoints do not contain these buffers, so the digest of the weights is the same."""
    (work / "two_stds.py").write_text(
        """
from torch import nn
from fkd_ssl.teachers import Teacher
from own_teacher import Network

def make(std):
    return Teacher(Network(), nn.Identity(), name="t", shape=(16,), network="colours", pixels=32, std=(std, 0.224, 0.225))

def imagenet():
    return make(0.229)

def swav():
    return make(0.228)
"""
    )
    first, second = (resolve.model_of(f"two_stds:{name}") for name in ("imagenet", "swav"))
    assert first.details["weights_sha256"] == second.details["weights_sha256"]
    assert first.identity != second.identity
    assert first.identity == resolve.model_of("two_stds:imagenet").identity


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("knn --train train --leave_one_out --k 3", {"n_train": 17}),
        ("knn --train train --val val --k 3 --features kept", {"n_train": 17, "n_val": 11}),
        ("linear --train train --val val --protocol sweep", {"n_train": 17, "n_val": 11}),
        ("linear --train train --val val --protocol moco --epochs 2 --out probe", {"n_train": 17, "n_val": 11}),
        ("retrieve --gallery train --queries val", {"n_gallery": 17, "n_queries": 11}),
        ("features --images train --features kept", {"images": 17}),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_images_stop_or_are_skipped_and_counted(
    work: Path, call: Any, line: str, left: dict[str, int], workers: int
) -> None:
    for name in ("train/birch/3.png", "val/ash/1.png"):
        Path(name).write_bytes(b"no picture")
    line += f" {TEACHER} --workers {workers}"
    stopped = call(line)
    assert stopped.status == 1
    assert ".png: not a readable image: unknown image format; remove it or pass --on_unreadable skip" in stopped.err
    for _ in range(2):  # the cache contains them
        skipped = call(f"{line} --on_unreadable skip --json")
        found = json.loads(skipped.out)
        assert (skipped.status, found["unreadable_images"]) == (0, 2 if "val" in line or "queries" in line else 1)
        assert {key: found[key] for key in left} == left
        if "--out" not in line or _ == 0:
            assert "skipped 1 unreadable image, for instance train/birch/3.png" in skipped.err or (
                "skipped 2 unreadable images" in skipped.err
            )
    Path("train/ash/0.png").unlink()
    Path("train/ash/0.png").symlink_to("nowhere")
    gone = call(f"{line.replace('kept', 'other').replace('probe', 'else')} --on_unreadable skip")
    assert (gone.status, "train/ash/0.png: cannot be read" in gone.err) == (1, True)
