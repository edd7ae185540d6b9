"""benchmarks/dense.py at a tiny size: its first arms, stored and online, their page, and a second call that runs nothing."""

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fkd_ssl import cli
from fkd_ssl.eval import segmentation
from tests.commands.test_segment import write_stripes

JOBS = 14  # the store and its codec, two segmentations, and five students


@pytest.fixture
def bench(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script with a tiny teacher and one student; its commands run in this process."""
    timm = pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    dense = importlib.import_module("dense")
    teacher, name = "timm/test_efficientnet", "test_efficientnet"
    tokens = f"{name}-tokens"
    for key, value in {
        "TEACHER": teacher,
        "NAME": name,
        "TOKENS": tokens,
        "COLUMNS": {"global": (name,), "dense": (tokens,), "both": (name, tokens)},
        "CODECS": ("Flat", "SQ8"),
        "USED": "SQ8",
        "OPTIONS": dict.fromkeys(dense.SHORT, "--lr 1e-3"),
        "subprocess": SimpleNamespace(run=run_here, PIPE=None),
    }.items():
        monkeypatch.setattr(dense, key, value)
    monkeypatch.setitem(dense.Run.__init__.__kwdefaults__, "codec", "SQ8")
    monkeypatch.setattr(segmentation, "STEPS", 4)
    monkeypatch.setattr(segmentation, "EPOCHS", 1)
    torch.save(timm.create_model("test_efficientnet").state_dict(), "teacher.pth")
    Path("set").mkdir()
    Path("set/train").symlink_to(image_folder)
    write_stripes(Path("camvid/train"), 8, 0)
    write_stripes(Path("camvid/test"), 4, 1)

    def call(jobs: int) -> str:
        line = "--camvid camvid --imagenette set --checkpoint teacher.pth --work work --page page.md --per-class 4 --crops 2"
        line += f" --pixels 64 --eval-pixels 64 --epochs 1 --seeds 1 --jobs {jobs}"
        monkeypatch.setattr(sys, "argv", ["dense.py", *line.split()])
        dense.main()
        return Path("page.md").read_text()

    return call


def run_here(command: list[str], **_: Any) -> SimpleNamespace:
    """Runs a command of fkd-ssl in this process, which takes less time than in another one."""
    assert command[1:3] == ["-m", "fkd_ssl"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(command[3:]) == 0
    return SimpleNamespace(stdout=out.getvalue())


@pytest.mark.slow
def test_the_first_arms_their_page_and_the_continuation(bench: Any) -> None:
    page = bench(JOBS)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    found = {tuple(row[:3]): row[3:] for row in rows if len(row) == 9}
    model = "MobileNetV3-Small"
    arms = [(model, arm, "stored") for arm in ("global", "dense", "both")]
    assert {("EfficientNet-Lite2", "(the teacher)", ""), (model, "(untrained)", ""), *arms, (model, "dense", "online")} <= set(
        found
    )
    assert [found[arm][3] for arm in arms] == ["1,024", "12,544", "13,568"]  # D = 256: Flat, and 49 tokens in SQ8
    scores = json.loads(Path(f"work/segmented/{model}-dense-stored-seed0.json").read_text())
    assert found[arms[1]][:2] == [f"{scores['miou']:.1f}", f"{scores['knn_miou']:.1f}"]
    codecs = {row[0]: row for row in rows if row[0] in ("Flat", "SQ8")}
    assert (codecs["Flat"][1], codecs["Flat"][5], codecs["SQ8"][5]) == ("1.000", "50,176", "12,544")
    notes = {path: path.stat().st_mtime_ns for path in Path("work").rglob("*.json")}
    assert bench(0) == page
    assert {path: path.stat().st_mtime_ns for path in Path("work").rglob("*.json")} == notes
