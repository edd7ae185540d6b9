"""Every example runs for a few steps on generated images, and its loader reads every stored crop once before any twice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fkd_ssl.students import Student
from fkd_ssl.students.export import export

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))

pytestmark = pytest.mark.slow


RECORDING = """
import os
import numpy as np
from fkd_ssl.data import StoredCrops

crops_of = StoredCrops._records

def recorded(self, pass_, i, height, width):
    crops = np.arange(self.store.crops_per_image)[self._index(pass_, i)].tolist()
    with open(os.environ["READ"], "a") as file:
        file.write(f"{self.name(i)} {crops}\\n")
    return crops_of(self, pass_, i, height, width)

StoredCrops._records = recorded
"""
"""A sitecustomize.py, which Python imports at its start: each process of an example notes which crops it reads."""


def run(script: Path, options: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *options.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "TQDM_DISABLE": "1", **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", [path for path in EXAMPLES if path.name == "distill.py"], ids=lambda path: path.parent.name)
def test_it_reads_every_crop_once_before_any_twice(script: Path, work: Path, call: Any) -> None:
    line = "precompute --images train --store eight --teacher own_teacher:make --crops 8 --codec Flat --chunk_size 16"
    assert call(line).status == 0
    (work / "sitecustomize.py").write_text(RECORDING)
    options = "--images train --store eight --pixels 32 --batch_size 6 --epochs 4 --workers 2"
    if "distributed" in script.parent.name:
        options += " --devices 2 --batch_size 3"
    said = run(script, options, PYTHONPATH=str(work), READ=str(work / "read"))
    losses = [line for line in said.splitlines() if "loss: " in line]
    assert 0 < float(losses[-1].rpartition("loss: ")[2]) < 10
    read: dict[str, list[int]] = {}
    for line in (work / "read").read_text().splitlines():
        name, _, crops = line.partition(" ")
        read.setdefault(name, []).extend(json.loads(crops))
    assert len(read) == 18
    for crops in read.values():  # of four epochs: every crop twice
        assert sorted(crops[:8]) == sorted(crops[8:]) == list(range(8))


def test_probes_while_lightly_trains(work: Path) -> None:
    said = run(
        ROOT / "examples/pytorch_lightning/online_probes.py", "train val --pixels 32 --epochs 2 --batch_size 6 --workers 0"
    )
    assert "knn" in said.lower()


def test_an_exported_student_is_fine_tuned_for_segmentation(work: Path) -> None:
    """On squares of another colour than the background; the loss falls below that of the share of each class, 0.46."""
    torch.manual_seed(0)
    export(Student("resnet18", 8).eval(), work / "student.safetensors", layout=None, pixels=64)
    generator = np.random.default_rng(0)
    for name in ("pictures", "masks"):
        (work / name).mkdir()
    for k in range(8):
        mask = np.zeros((64, 96), dtype=np.uint8)
        top, left = generator.integers(0, 32), generator.integers(0, 64)
        mask[top : top + 32, left : left + 32] = 1
        mask[:2] = 255
        pixels = np.where(mask[:, :, None] == 1, [200, 60, 50], [60, 70, 210]) + generator.normal(0, 20, (64, 96, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(work / f"pictures/{k}.jpg")
        stored = Image.fromarray(mask, mode="P" if k % 2 else "L")
        if k % 2:
            stored.putpalette([9, 9, 9, 9, 9, 9])  # two labels of one colour
        stored.save(work / f"masks/{k}.png")
    options = f"{work}/student.safetensors {work}/pictures {work}/masks --classes 2 --epochs 16 --batch_size 4"
    said = run(ROOT / "examples/pytorch/segment.py", options)
    assert float(said.splitlines()[-1].rpartition("loss: ")[2]) < 0.38


def test_the_list_of_examples_is_whole() -> None:
    text = (ROOT / "examples/README.md").read_text()
    assert all(f"({path.relative_to(ROOT / 'examples')})" in text for path in EXAMPLES)
