"""A run is identified by its options and the contents of its inputs, not by their paths."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

ONLINE = (
    "train --images train --targets online --teacher saved_teacher:saved --checkpoint weights.pt --student squeezenet1_1 "
    "--epochs 2 --batch_size 18 --crops_per_image 2 --pixels 32 --workers 0 --log_every 1 --val val --out run"
)
LABELS = ONLINE.replace("--targets online --teacher saved_teacher:saved --checkpoint weights.pt", "--targets labels").replace(
    "--epochs", "--head classifier --objective soft_ce --epochs"
)
RELABEL = LABELS.replace("--targets labels", "--targets relabel --label_maps maps")
PRETRAIN = (
    "pretrain --images train --out run --epochs 2 --batch_size 9 --pixels 32 --queue 9 --workers 0 --checkpoint_interval 0"
)
LINEAR = (
    "linear --model saved_teacher:saved --checkpoint weights.pt --train train --val val --protocol moco --epochs 1 --workers 0 "
    "--out run"
)
KNN = "knn --model saved_teacher:saved --checkpoint weights.pt --train train --val val --workers 0 --out run"
CACHE = "cache --images train --out run --short_side 20 --threads 1"
MAPS = "label-maps --images train --out run --teacher own_teacher:pooled --k 3"
SAVED = """
import torch
from own_teacher import Network

def saved(checkpoint):
    network = Network()
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    return network
"""


def write_weights(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    torch.save({"mix.weight": torch.randn(16, 48)}, path)


@pytest.fixture
def place(work: Path) -> Path:
    (work / "saved_teacher.py").write_text(SAVED)
    write_weights(work / "weights.pt", 0)
    return work


def unfinished(work: Path) -> None:
    """Turns the finished `run` into one that was killed before its end."""
    for path in work.glob("run*/results.json"):
        path.unlink()


def more_images(work: Path) -> None:
    for k in range(20):
        shutil.copy(work / "train/ash/0.png", work / f"train/ash/more{k}.png")


def fewer_images(work: Path) -> None:
    (work / "train/ash/0.png").unlink()


def other_pictures(work: Path) -> None:
    """Replaces the images and keeps their names."""
    for path in (work / "train").rglob("*.png"):
        noise = np.random.default_rng(7).integers(0, 256, (40, 44, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)


def one_other_bit(work: Path) -> None:
    """Changes one bit, and keeps size and modification time."""
    path = work / "train/ash/0.png"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_classes(work: Path) -> None:
    (work / "train/ash/0.png").rename(work / "train/birch/moved.png")


def other_val(work: Path) -> None:
    (work / "val/ash/0.png").unlink()


def other_weights(work: Path) -> None:
    write_weights(work / "weights.pt", 1)


@pytest.mark.parametrize(
    ("line", "change", "named"),
    [
        (ONLINE, more_images, "images changed since the run began (then 18 images in 3 classes, sha256 "),
        (ONLINE, other_pictures, "contents of images changed"),
        (ONLINE, other_classes, "images changed"),
        (ONLINE, other_val, "val images changed since the run began (then 12 images in 3 classes, sha256 "),
        (ONLINE, other_weights, "teacher saved changed"),
        (LABELS, other_classes, "images changed"),
        (LABELS, other_pictures, "contents of images changed"),
        (PRETRAIN, fewer_images, "images changed since the run began (then 18 images in 3 classes, sha256 "),
        (PRETRAIN, other_pictures, "contents of images changed"),
        (LINEAR, more_images, "train images changed"),
        (LINEAR, other_val, "val images changed"),
        (LINEAR, other_weights, "model changed"),
        (KNN, other_weights, "model changed"),
        (KNN, other_val, "val images changed"),
        (KNN, one_other_bit, "contents of train images changed"),
        (CACHE, more_images, "images changed since the run began"),
        (CACHE, fewer_images, "images changed since the run began"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_changed_inputs_are_refused(place: Path, call: Any, line: str, change: Callable[[Path], None], named: str) -> None:
    assert call(line).status == 0
    if change is not other_val:  # a finished run is also compared
        unfinished(place)
    before = {path: path.read_bytes() for run in place.glob("run*") for path in run.rglob("*") if path.is_file()}
    change(place)
    answer = call(line)
    assert (answer.status, answer.out) == (2, "")
    last = answer.err.splitlines()[-1]
    assert last.startswith(f"fkd-ssl {line.split()[0]}: {'run.cache' if line == CACHE else 'run'}: {named}")
    assert last.endswith("restore it, or choose another --out")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", [ONLINE, LABELS, PRETRAIN, LINEAR, KNN, CACHE])
def test_the_same_inputs_under_another_path_continue(place: Path, call: Any, line: str) -> None:
    assert call(line).status == 0
    for path in ("train/", "./train", place / "train"):
        unfinished(place)
        answer = call(line.replace("--images train", f"--images {path}").replace("--train train", f"--train {path}"))
        assert answer.status == 0, answer.err
        assert any(place.glob("run*/results.json"))
    unfinished(place)
    for name in ("train", "val"):
        shutil.copytree(place / name, place / "scratch" / name, copy_function=shutil.copyfile)
        shutil.rmtree(place / name)
    for path in (place / "scratch").rglob("*.png"):
        os.utime(path, (1, 1))
    (place / "weights.pt").rename(place / "elsewhere.pt")
    for run in place.glob("run*"):
        run.rename(place / run.name.replace("run", "moved"))
    for name, value in (("images", "train"), ("train", "train"), ("val", "val")):
        line = line.replace(f"--{name} {value}", f"--{name} scratch/{value}")
    answer = call(line.replace("weights.pt", "elsewhere.pt").replace("--out run", "--out moved"))
    assert answer.status == 0, answer.err
    assert any(place.glob("moved*/results.json"))
    assert not any(place.glob("run*"))


class TestStored:
    def test_a_moved_store_continues(self, place: Path, call: Any, train_line: str) -> None:
        assert call(f"{train_line} --out run").status == 0
        unfinished(place)
        (place / "store").rename(place / "moved")
        answer = call(f"{train_line} --out run".replace("--store store", f"--store {place}/moved"))
        assert (answer.status, "continuing squeezenet1_1" in answer.err) == (0, True)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ("--teacher own_teacher:make --seed 1", "store changed since the run began (then 18 images, sha256 "),
            ("--teacher own_teacher:other --column make", "column make changed since the run began (then sha256 "),
        ],
    )
    def test_another_store_at_the_same_path_is_refused(
        self, place: Path, call: Any, train_line: str, options: str, named: str
    ) -> None:
        assert call(f"{train_line} --out run").status == 0
        unfinished(place)
        shutil.rmtree(place / "store")
        line = f"precompute --images train --store store --crops 4 --codec Flat --chunk_size 16 {options}"
        assert call(line).status == 0
        answer = call(f"{train_line} --out run")
        assert (answer.status, f"run: {named}" in answer.err) == (2, True)

    def test_another_init_is_refused(self, place: Path, call: Any, train_line: str) -> None:
        for seed in (1, 2):
            assert call(f"{train_line} --seed {seed} --out start{seed}").status == 0
        line = f"{train_line} --init start1 --out run"
        assert call(line).status == 0
        unfinished(place)
        (place / "start1").rename(place / "moved")
        assert call(line.replace("start1", "moved")).status == 0
        unfinished(place)
        answer = call(line.replace("start1", "start2"))
        assert (answer.status, "run: init changed since the run began" in answer.err) == (2, True)


def test_other_label_maps_are_refused(place: Path, call: Any) -> None:
    assert call(MAPS.replace("run", "maps")).status == 0
    assert call(RELABEL).status == 0
    unfinished(place)
    (place / "maps").rename(place / "moved")
    assert call(RELABEL.replace("--label_maps maps", "--label_maps moved")).status == 0
    unfinished(place)
    assert call(MAPS.replace("run", "maps") + " --k 2").status == 0
    answer = call(RELABEL)
    assert (answer.status, "run: label maps changed since the run began" in answer.err) == (2, True)


def test_label_maps_notice_another_picture_of_the_same_name(place: Path, call: Any) -> None:
    assert call(MAPS).status == 0
    assert call(MAPS.replace("train", "./train/")).status == 0
    other_pictures(place)
    answer = call(MAPS)
    assert answer.status == 2
    assert "run: was made from other images: train/ash/0.png has " in answer.err


def test_a_checkpoint_of_another_run_is_refused(place: Path, call: Any) -> None:
    line = f"{ONLINE} --lr 1e-3"
    assert call(line).status == 0
    assert call(line.replace("run", "other").replace("1e-3", "1e-4")).status == 0
    shutil.copy(place / "other/checkpoints/last.ckpt", place / "run/checkpoints/last.ckpt")
    unfinished(place)
    answer = call(line)
    assert answer.status == 2
    assert "last.ckpt: holds a run of another config (lr is 0.0001 there, 0.001 here); choose another --out" in answer.err
    (place / "other/results.json").unlink()
    assert call(PRETRAIN.replace("run", "first")).status == 0
    fewer_images(place)
    assert call(PRETRAIN.replace("run", "second")).status == 0
    shutil.copy(place / "first/checkpoints/last.ckpt", place / "second/checkpoints/last.ckpt")
    (place / "second/results.json").unlink()
    answer = call(PRETRAIN.replace("run", "second"))
    assert answer.status == 2
    assert "last.ckpt: holds a run of another config" not in answer.err
    assert "second/checkpoints/last.ckpt: images changed since the run began (then 18 images" in answer.err


@pytest.mark.filterwarnings("ignore")
def test_a_repaired_image_continues(place: Path, call: Any) -> None:
    for line, path in ((f"{LINEAR} --epochs 2", "val/ash/0.png"), (PRETRAIN.replace("run", "teacher"), "train/ash/0.png")):
        whole = (place / path).read_bytes()
        (place / path).write_bytes(whole[:100])
        assert call(line).status == 1
        (place / path).write_bytes(whole)
        answer = call(line)
        assert answer.status == 0, answer.err


@pytest.mark.slow
def test_a_comparison_of_other_inputs_is_refused(place: Path, call: Any) -> None:
    line = (
        "compare --images train --val val --teacher saved_teacher:saved --checkpoint weights.pt --student squeezenet1_1 "
        "--epochs 2 --out run --batch_size 18 --crops_per_image 2 --pixels 32 --workers 0 --knn_every 1 --codec Flat"
    )
    assert call(line).status == 0
    shutil.copytree(place / "train", place / "copy", copy_function=shutil.copyfile)
    assert "this comparison is done" in call(line.replace("--images train", "--images copy")).err
    for change, named in ((other_weights, "teacher saved"), (other_val, "val images"), (more_images, "images")):
        kept = {path: path.read_bytes() for path in (place / "run").rglob("*.json")}
        folder = shutil.copytree(place, place.with_name(f"work-{change.__name__}"))
        change(folder)
        os.chdir(folder)
        answer = call(line)
        os.chdir(place)
        assert (answer.status, f"run: {named} changed since the run began" in answer.err) == (2, True)
        assert {path: path.read_bytes() for path in kept} == kept
    assert json.loads((place / "run/inputs.json").read_text()).keys() >= {"images", "val images", "teacher saved"}
