"""report: many results.json as one table."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkd_ssl.eval import stats


def write(folder: Path, *, model: str, right: list[int], kind: str = "linear", **more: Any) -> float:
    folder.mkdir(parents=True)
    correct = np.isin(np.arange(20), right)
    np.save(folder / "correct.npy", correct)
    results = {
        "kind": kind,
        "protocol": "moco",
        "model": {"name": model},
        "data": {"train": {"source": "train", "images": 50}, "val": {"source": "val", "images": 20}},
        "transform": {"centre_crop": 64},
        "top1": 100 * correct.mean(),
        "top5": 99.5,
        **more,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return results["top1"]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    monkeypatch.chdir(tmp_path)
    tops: dict[str, list[float]] = {"runs/a_b": [], "base": []}
    for seed in range(3):
        tops["runs/a_b"].append(write(tmp_path / f"r/a{seed}", model=f"runs/a_b-seed{seed}", right=list(range(12 + seed))))
        tops["base"].append(write(tmp_path / f"r/b{seed}", model=f"base/seed_{seed}", right=list(range(10))))
    write(tmp_path / "r/k", model="base", right=[1], kind="knn", protocol="k 20, T 0.07")
    (tmp_path / "r/train").mkdir()
    (tmp_path / "r/train/results.json").write_text('{"epochs": 3}')  # the results of a training are skipped
    return tops


def test_mean_and_deviation_over_seeds(folders: dict[str, list[float]], call: Any) -> None:
    status, out, _ = call("report r r/a0")  # a folder named twice counts once
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "| model | protocol | images | px | seeds | top-1 | top-5 |"
    assert lines[1] == "|---|---|---|---|---|---|---|"
    mean, deviation = statistics.mean(folders["runs/a_b"]), statistics.stdev(folders["runs/a_b"])
    assert lines[2] == f"| runs/a_b | linear: moco | val (20) | 64 | 3 | {mean:.2f} ± {deviation:.2f} | 99.50 ± 0.00 |"
    assert lines[-1] == "| base | knn: k 20, T 0.07 | val (20) | 64 | 1 | 5.00 | 99.50 |"
    assert len(lines) == 5


def test_what_departs_from_a_protocol_is_another_row(folders: dict[str, list[float]], call: Any, tmp_path: Path) -> None:
    note = "departs from the moco protocol: epochs 1 instead of 100"
    write(tmp_path / "r/short", model="base/seed_0", right=[1], notes=[note, "another"])
    write(tmp_path / "r/short2", model="base/seed_0", right=[1], notes=[note])  # the same evaluation, made twice
    rows = {row["protocol"]: row for row in json.loads(call("report r --json").out)["rows"] if row["model"] == "base"}
    assert rows["moco"]["seeds"] == 3
    assert rows["moco (epochs 1 instead of 100)"]["seeds"] == 1


def test_csv_and_latex_are_the_same_cells(folders: dict[str, list[float]], call: Any) -> None:
    plain = [line.strip("| ").split(" | ") for line in call("report r").out.splitlines()]
    del plain[1]
    assert list(csv.reader(io.StringIO(call("report r --format csv").out))) == plain
    tex = call("report r --format latex").out
    assert tex.startswith("\\begin{tabular}{lllllll}\n\\toprule\nmodel & protocol")
    assert "runs/a\\_b & linear: moco" in tex
    assert "$\\pm$" in tex
    assert tex.count(r" \\") == len(plain)


def test_a_baseline_is_compared_by_the_paired_bootstrap(folders: dict[str, list[float]], call: Any) -> None:
    rows = json.loads(call("report r --baseline base --json").out)["rows"]
    arms = [np.stack([np.isin(np.arange(20), range(count)) for count in counts]) for counts in ((12, 13, 14), (10, 10, 10))]
    expected = stats.paired_bootstrap(*arms)
    assert (rows[0]["difference"], rows[0]["low"], rows[0]["high"]) == pytest.approx(expected)
    assert "difference" not in rows[1]
    assert "(+" in call("report r --baseline base").out


def test_runs_are_paired_by_seed_and_not_by_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    """Identical runs have difference 0, whatever the order of their folders; runs of other seeds are refused."""
    monkeypatch.chdir(tmp_path)
    right = {seed: list(range(4 * seed, 4 * seed + 4 + seed)) for seed in range(4)}
    for seed in (0, 1, 2):
        write(tmp_path / f"r/a{seed}", model=f"a-seed{seed}", right=right[seed])
        write(tmp_path / f"r/b{9 - seed}", model=f"b-seed{seed}", right=right[seed])
    row = json.loads(call("report r --baseline b --json").out)["rows"][0]
    assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)
    write(tmp_path / "other/c0", model="c-seed0", right=right[0])
    write(tmp_path / "other/c2", model="c-seed2", right=right[2])
    write(tmp_path / "other/c3", model="c-seed3", right=right[3])
    answer = call("report r other --baseline b")
    assert (answer.status, answer.out) == (2, "")
    assert "paired by seed: c has seeds 0 / 2 / 3, the baseline 0 / 1 / 2 (moco); evaluate the same seeds" in answer.err
    write(tmp_path / "twice/a0", model="a-seed0", right=right[0], seed=1)
    write(tmp_path / "twice/b0", model="b-seed0", right=right[0], seed=2)
    assert "a has seeds 0, --seed 1, the baseline 0, --seed 2" in call("report twice --baseline b").err


def test_what_is_refused(folders: dict[str, list[float]], call: Any, tmp_path: Path) -> None:
    write(tmp_path / "r/one", model="lone", right=[1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/results.json").write_text("{")
    for line, said in {
        "report nowhere": "nowhere: no such folder of results",
        "report empty": "empty: no results.json of knn, linear, segment, retrieve; evaluate with --out first",
        "report torn": "torn/results.json: not JSON (Expecting property name",
        "report r --baseline bse": "--baseline bse: no such model in the table; did you mean base?",
        "report r --baseline lone": "runs/a_b has seeds 0 / 1 / 2, the baseline none (moco)",
        "report": "FOLDERS must be given",
    }.items():
        answer = call(line)
        assert (answer.status, answer.out) == (2, "")
        assert said in answer.err


def test_evaluations_of_the_command_line_are_read(work: Path, call: Any) -> None:
    sets = "--model own_teacher:make --workers 0"
    assert call(f"knn {sets} --train train --val val --out e/knn").status == 0
    for seed in (0, 1):
        line = f"linear {sets} --train train --val val --protocol logreg --seed {seed} --out e/{seed}"
        assert call(line).status == 0
    assert call(f"retrieve {sets} --gallery train --out e/retrieve").status == 0
    lines = call("report e").out.splitlines()
    assert len(lines) == 5
    assert "mAP@R" in lines[0]
    assert any("linear: logreg | val (12) | 32 | 2 |" in line for line in lines)
