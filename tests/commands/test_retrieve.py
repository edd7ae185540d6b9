"""retrieve through the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fkd_ssl.images import SOURCES, scan
from fkd_ssl.images.named import Arrays

TEACHER = "--model own_teacher:make --workers 0"


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
        "per",
        "vector",
        "build",
        "s",
    ]
    assert {line.split()[0] for line in lines[1:-1]} == {"exact", "hnsw", "ivfflat", "ivfpq"}
    with Image.open(work / "scored/recall_speed.png") as plot:
        assert plot.width > 500
    assert len(json.loads((work / "scored/results.json").read_text())["curve"]) == len(lines) - 2


def test_the_images_nearest_to_one(work: Path, call: Any) -> None:
    line = f"retrieve {TEACHER} --gallery train --query val/birch/0.png --nearest 7"
    near = json.loads(call(f"{line} --json").out)["nearest"]
    assert len(near) == 7
    assert near[0]["class"] == "birch"
    assert all((work / "train" / item["image"]).is_file() for item in near)
    assert [item["cosine"] for item in near] == sorted((item["cosine"] for item in near), reverse=True)
    with Image.open(work / "nearest.png") as sheet:
        assert (sheet.width, sheet.height) == (1136, 96 + 2 * 253)
        pixels = np.asarray(sheet.convert("RGB"))
    framed = (pixels == (0x00, 0x79, 0x5A)).all(axis=2)  # hits of the query's class, the name of its folder
    assert framed[88 - 5 : 88 + 200, 24 + 184 - 5 : 24 + 184 + 170].sum() > 4 * 4 * 168 * 0.7
    assert framed.sum() < 8 * 4 * 4 * 168
    before = (work / "nearest.png").read_bytes()
    assert call(line).status == 0
    assert (work / "nearest.png").read_bytes() == before
    for _ in range(2):  # computed, then from the cache
        kept = json.loads(call(f"{line} --features cache --sheet other.png --json").out)["nearest"]
        assert [item["image"] for item in kept] == [item["image"] for item in near]
        (work / "other.png").unlink()


def test_the_images_nearest_to_one_need_no_classes(work: Path, call: Any) -> None:
    answer = call(f"retrieve {TEACHER} --gallery train/ash --query train/ash/0.png --nearest 2 --json")
    near = json.loads(answer.out)["nearest"]
    assert (near[0]["image"], near[0]["class"]) == ("0.png", "")
    assert near[0]["cosine"] == pytest.approx(1)
    scored = call(f"retrieve {TEACHER} --gallery train/ash")
    assert scored.status == 2
    assert "outside any class folder (first '0.png'); scores need FOLDER/CLASS/IMAGE (retrieve --query IMAGE does" in scored.err
    with Image.open(work / "nearest.png") as sheet:
        assert not (np.asarray(sheet.convert("RGB")) == (0x00, 0x79, 0x5A)).all(axis=2).any()


def test_the_images_nearest_to_one_of_a_set_in_memory(work: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named set has no files: its images are taken from memory and listed by their names in the set."""
    folder = scan("train")
    pixels = np.stack([folder.pixels(row)[:40, :40] for row in range(len(folder))])
    made = Arrays("memory:", pixels, folder.labels, folder.classes)
    monkeypatch.setitem(SOURCES, "memory", lambda spec: made)
    near = json.loads(call(f"retrieve {TEACHER} --gallery memory: --query val/cedar/0.png --json").out)["nearest"]
    assert near[0]["class"] == "cedar"
    assert all(item["image"] in made.names for item in near)
    assert (work / "nearest.png").is_file()


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (f"retrieve {TEACHER} --queries val", 2, "gallery"),
        (f"retrieve {TEACHER} --gallery train --query q.png --curve", 2, "remove --queries, --curve, --out and --index"),
        (f"retrieve {TEACHER} --gallery train --query q.png --index hnsw", 2, "remove --queries, --curve, --out and --index"),
        (f"retrieve {TEACHER} --gallery train --query gone.png", 2, "--query gone.png: not found; give the path"),
        (f"retrieve {TEACHER} --gallery x.npy,y.npy --query val/ash/0.png", 2, "pass --gallery as images"),
        (f"retrieve {TEACHER} --gallery train --query val/ash/0.png --nearest 0", 2, "--nearest 0: must be at least 1"),
        (f"retrieve {TEACHER} --gallery val --index ivfpq", 2, "index ivfpq: 12 images in the gallery"),
        (f"retrieve {TEACHER} --gallery one", 2, "one: one class only, 'ash'; expected a folder for each of two or more"),
    ],
)
def test_what_is_refused(work: Path, call: Any, line: str, status: int, said: str) -> None:
    shutil.copytree(work / "train/ash", work / "one/ash")
    answer = call(line)
    assert (answer.status, answer.out) == (status, "")
    assert said in answer.err
