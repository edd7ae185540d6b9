"""benchmarks/strong_teacher.py at a tiny size: an experiment, its table on a page, and a second call that runs nothing."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "strong_teacher.py"
PAGE = "# Page\n\nBefore.\n\n<!-- crops: printed by the script -->\nold\n<!-- end of crops -->\n\nAfter.\n"


@pytest.fixture
def bench(image_folder: Path, tmp_path: Path) -> Any:
    """Runs the script on class folders of tiny images; returns what it prints."""
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("test_efficientnet.r160_in1k").state_dict(), tmp_path / "teacher.pth")
    for split in ("train", "val"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / split).symlink_to(image_folder)
    (tmp_path / "strong_teacher.md").write_text(PAGE)

    def call(*options: str) -> str:
        line = [sys.executable, SCRIPT, "crops", "--imagenette", "set", "--work", "work", "--teacher", "timm/test_efficientnet"]
        line += ["--checkpoint", "teacher.pth", "--seeds", "1", "--small", "2", "--epochs", "1", "--batch_size", "4"]
        line += ["--pixels", "32", "--teacher_pixels", "64", "--objective", "cosine", "--lr", "1e-3", "--pages", ".", *options]
        env = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, env=env, cwd=tmp_path, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("strong_tables")


def test_a_table_compares_the_probes_of_the_reference(tables: Any) -> None:
    right, wrong = np.ones((2, 50), dtype=bool), np.zeros((2, 50), dtype=bool)
    scores = [{"train_seconds": 10.0}, {"train_seconds": 14.0}]
    online = tables.Row(name="online", scores=scores, correct={"knn": wrong}, bytes=None)
    stored = tables.Row(name="C=4", scores=scores, correct={"knn": right}, bytes=1300)
    labels = tables.Row(name="labels", scores=scores, correct={"knn": wrong, "top1": right}, bytes=None)
    teacher = tables.Row(name="teacher", scores=[{}], correct={"knn": right[:1]}, bytes=None)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in tables.table([stored, online, labels, teacher], online).splitlines()
    ]
    assert lines[0] == ["arm", "kNN top-1", "minus online", "own classes top-1", "bytes per crop", "seconds", "seeds"]
    assert lines[2:] == [
        ["C=4", "100.00 ± 0.00", "+100.00 (+100.00 to +100.00)", "", "1,300", "12 ± 3", "2"],
        ["online", "0.00 ± 0.00", "", "", "", "12 ± 3", "2"],
        ["labels", "0.00 ± 0.00", "+0.00 (+0.00 to +0.00, equal)", "100.00 ± 0.00", "", "12 ± 3", "2"],
        ["teacher", "100.00", "", "", "", "", "1"],
    ]
    assert tables.compare(stored, labels) == "`C=4` minus `labels`: kNN +100.00 (+100.00 to +100.00)."


@pytest.mark.slow
def test_an_experiment_its_table_and_its_continuation(bench: Any, tmp_path: Path) -> None:
    said = bench("--only", "C=4", "online", "teacher")
    rows = {line.split(" | ")[0].strip("| "): line for line in said.splitlines() if line.startswith("| ")}
    assert {"C=4", "online", "teacher"} <= set(rows)
    assert "Not run: C=1, C=25, C=100, labels, alone, untrained." in said
    page = (tmp_path / "strong_teacher.md").read_text()
    assert rows["C=4"] in page
    assert "old" not in page
    assert page.startswith("# Page\n\nBefore.\n\n<!-- crops: printed by the script -->")
    assert page.endswith("<!-- end of crops -->\n\nAfter.\n")
    runs = sorted((tmp_path / "work" / "runs" / "crops").glob("*/scores.json"))
    online = json.loads(next(run for run in runs if "online" in str(run)).read_text())
    assert online["config"]["teacher_pixels"] == 64  # and the student's crops have 32
    assert (online["images"], online["teacher_forwards"]) == (6, 8)  # two batches of four crops
    times = [run.stat().st_mtime_ns for run in runs]
    assert bench("--only", "C=4", "online", "teacher") == said
    assert [run.stat().st_mtime_ns for run in runs] == times
