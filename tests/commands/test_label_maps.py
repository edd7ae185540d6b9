"""Label maps through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fkd_ssl.crops import RECIPES
from fkd_ssl.data import RelabelledCrops
from fkd_ssl.images import scan
from fkd_ssl.relabel import LabelMaps

TEACHER = '''
import torch
from torch import nn

class Classifier(nn.Module):
    """The colours of cells of 8 x 8 pixels, told apart by one linear layer behind the pooling."""

    pixels, kind = 32, "distribution"

    def __init__(self):
        super().__init__()
        colours = torch.tensor([[60., 90., 190.], [70., 170., 80.], [190., 80., 60.]]) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.cells, self.last = nn.AvgPool2d(8), nn.Linear(3, 3)
        centres = (colours - mean) / std
        with torch.no_grad():
            self.last.weight[:] = 2 * centres
            self.last.bias[:] = -centres.square().sum(dim=1)

    def forward(self, pixels):
        return self.last(self.cells(pixels).mean((2, 3)))

def colours():
    return Classifier()
'''
LINE = "label-maps --images train --out maps --teacher cells_teacher:colours --k 2"


@pytest.fixture
def place(work: Path) -> Path:
    (work / "cells_teacher.py").write_text(TEACHER)
    return work


def test_made_once(place: Path, call: Any) -> None:
    answer = call(LINE)
    assert answer.status == 0, answer.err
    assert "2 of 3 logits at each of 4 x 4 positions: 128 bytes per image" in answer.err
    images = scan(place / "train")
    assert f"maps: {len(images)} images in " in answer.out
    assert "2 of 3 classes at each of 4 x 4 positions" in answer.out
    again = call(LINE)
    assert again.status == 0
    assert "maps: complete, all checksums match" in again.out
    data = RelabelledCrops(images, LabelMaps(place / "maps"), RECIPES["fkd"], crops_per_image=4, pixels=32)
    batch = data.__getitems__(list(range(len(data)))).batch
    right = batch["targets"].argmax(dim=1).reshape(-1, 4) == batch["labels"].reshape(-1, 1)
    assert right.float().mean() > 0.9


def test_json_and_other_sizes(place: Path, call: Any) -> None:
    answer = call(f"{LINE} --pixels 64 --batch_size 5 --threads 1 --precision bf16 --json")
    assert answer.status == 0, answer.err
    about = json.loads(answer.out)
    assert {key: about[key] for key in ("made", "busy", "classes", "k", "height", "width")} == {
        "made": len(scan(place / "train")),
        "busy": [],
        "classes": 3,
        "k": 2,
        "height": 8,
        "width": 8,
    }
    manifest = LabelMaps(place / "maps").manifest
    assert (manifest.teacher.pixels, manifest.batch_size, manifest.teacher.precision) == (64, 5, "bf16")
    assert (manifest.teacher.name, manifest.teacher.source) == ("colours", "cells_teacher:colours")
    assert json.loads(call(f"{LINE} --pixels 64 --batch_size 5 --precision bf16 --json").out)["made"] == 0


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (LINE.replace("cells_teacher:colours", "own_teacher:make"), "gives embeddings; label maps need a classifier's logits"),
        (LINE.replace("cells_teacher:colours", "own_teacher:classes"), "its logits do not come from a linear layer"),
        (f"{LINE} --k 4", "teacher colours has 3 classes; k must be between 1 and 3"),
        (f"{LINE} --pixels 5000", "--pixels 5000: must be between 1 and 4096"),
        (LINE.replace("--out maps", "--out store"), "is not a folder of label maps"),
    ],
)
def test_mistakes(place: Path, call: Any, line: str, what: str) -> None:
    answer = call(line)
    assert answer.status == 2
    assert what in answer.err
    assert not (place / "maps").exists()


def test_what_is_there_stays(place: Path, call: Any) -> None:
    assert call(LINE).status == 0
    answer = call(LINE.replace("--k 2", "--k 1"))
    assert answer.status == 2
    assert "its k is 2, not 1; pass the same, or choose another --out" in answer.err
    path = place / "maps/maps/00000.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x01")
    answer = call(LINE)
    assert answer.status == 1
    assert "00000.npy: damaged: " in answer.err
    path.unlink()
    path.with_suffix(".json").unlink()
    assert call(LINE).status == 0
    assert path.read_bytes() == data
    shutil.rmtree(place / "train/ash")
    assert "was made from other images" in call(LINE).err


def test_damaged_images_stop_or_are_skipped_and_counted(place: Path, call: Any) -> None:
    Path("train/birch/3.png").write_bytes(b"no picture")
    stopped = call(LINE)
    assert stopped.status == 1
    advice = "remove it or pass --on_unreadable skip"
    assert f"train/birch/3.png: not a readable image: unknown image format; {advice}" in stopped.err
    for _ in range(2):
        skipped = call(f"{LINE} --on_unreadable skip --json")
        assert (skipped.status, json.loads(skipped.out)["unreadable_images"]) == (0, 1)
        assert "warning: skipped 1 unreadable image, for instance birch/3.png" in skipped.err
    train = "train --images train --targets relabel --label_maps maps --student squeezenet1_1 --head classifier --epochs 2"
    train += " --objective soft_ce --pixels 32 --batch_size 18 --crops_per_image 1 --workers 0 --out run"
    assert "could not be read when the label maps were made" in call(train).err
    assert call(f"{train} --on_unreadable skip").status == 0
    assert json.loads(Path("run/results.json").read_text())["unreadable_images"] == 1
