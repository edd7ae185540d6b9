"""retrieve through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

TEACHER = "--model own_teacher:make --workers 0"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))


def test_colours_are_found(work: Path, call: Any) -> None:
    status, out, _ = call(f"retrieve {TEACHER} --gallery train --queries val --out scored")
    assert status == 0
    assert out.startswith("own_teacher:make: exact at 32 px: recall@1 ")
    results = json.loads((work / "scored/results.json").read_text())
    assert results["recall"]["1"] == results["top1"] > 80
    assert (results["n_gallery"], results["n_queries"]) == (18, 12)
    assert set(results["data"]) == {"gallery", "queries"}
    alone = json.loads(call(f"retrieve {TEACHER} --gallery train --json").out)
    assert alone["n_queries"] == 18


def test_the_curve_is_a_table_and_a_plot(work: Path, call: Any) -> None:
    status, out, _ = call(f"retrieve {TEACHER} --gallery train --curve --out scored --index hnsw")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == [
        "index",
        "effort",
        "recall@10",
        "of",
        "exact,",
        "%",
        "queries/s",
        "bytes",
        "a",
        "vector",
        "build",
        "s",
    ]
    assert {line.split()[0] for line in lines[1:-1]} == {"exact", "hnsw", "ivfflat", "ivfpq"}
    with Image.open(work / "scored/recall_speed.png") as plot:
        assert plot.width > 500
    assert len(json.loads((work / "scored/results.json").read_text())["curve"]) == len(lines) - 2


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_a_saved_index_answers_a_picture(work: Path, call: Any, kind: str) -> None:
    assert call(f"retrieve {TEACHER} --gallery train --index {kind} --saved index").status == 0
    line = f"retrieve {TEACHER} --saved index --query val/birch/0.png --nearest 7"
    near = json.loads(call(f"{line} --json").out)["nearest"]
    assert len(near) == 7
    assert near[0]["class"] == "birch"
    assert near[0]["image"].endswith(".png")
    assert [item["cosine"] for item in near] == sorted((item["cosine"] for item in near), reverse=True)
    with Image.open(work / "nearest.png") as sheet:
        assert (sheet.width, sheet.height) == (5 * 134 + 6, 3 * 150 + 6)
    again = call(line)
    assert (again.status, again.out) == (2, "")
    assert "nearest.png: exists; name another --sheet" in again.err
    direct = json.loads(call(f"{line.replace('--saved index', '--gallery train')} --sheet other.png --json").out)["nearest"]
    assert [item["image"] for item in direct] == [item["image"] for item in near]


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (f"retrieve {TEACHER} --queries val", 2, "--gallery is needed, or --query IMAGE with the --saved index of one"),
        (f"retrieve {TEACHER} --gallery train --query q.png --curve", 2, "it does not go with --queries, --curve or --out"),
        (f"retrieve {TEACHER} --gallery train --query gone.png", 2, "gone.png: cannot be read"),
        (f"retrieve {TEACHER} --saved nowhere --query val/ash/0.png", 2, "nowhere: no saved index"),
        (f"retrieve {TEACHER} --gallery train --query val/ash/0.png --nearest 0", 2, "--nearest 0: must be at least 1"),
        (f"retrieve {TEACHER} --gallery one --index ivfpq", 2, "index ivfpq: 6 images in the gallery"),
        ("retrieve --model own_teacher:other --saved index --query val/ash/0.png", 2, "holds features of another model"),
        (f"retrieve {TEACHER} --pixels 16 --saved index --query val/ash/0.png", 2, "at 32 px; pass --pixels 32"),
        (f"retrieve {TEACHER} --gallery train --saved index", 2, "index: exists; choose another folder"),
    ],
)
def test_what_is_refused(work: Path, call: Any, line: str, status: int, said: str) -> None:
    shutil.copytree(work / "train/ash", work / "one/ash")
    if "--saved index" in line:
        assert call(f"retrieve {TEACHER} --gallery train --saved index").status == 0
    answer = call(line)
    assert (answer.status, answer.out) == (status, "")
    assert said in answer.err


def test_a_strangers_index_opens_no_picture(work: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(f"retrieve {TEACHER} --gallery train --saved index").status == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "others"))
    answer = call(f"retrieve {TEACHER} --saved index --query val/ash/0.png")
    assert (answer.status, answer.out) == (2, "")
    assert "the pictures that it names are not opened; give --gallery instead" in answer.err
    assert not (work / "nearest.png").exists()
