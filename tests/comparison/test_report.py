"""The report of a comparison, from made-up results."""

import re
from pathlib import Path
from typing import Any

import pytest

from fkd_ssl.comparison import report
from fkd_ssl.eval import stats

METRICS = (
    "step,epoch,crops,seconds,loss,kl,lr,wait,knn_top1\n"
    "10,1.0,40,2.0,4.5,0.2,0.001,0.1,\n"
    "10,1.0,40,2.0,,,,,30.0\n"
    "20,2.0,80,4.0,4.4,0.1,0.0,0.1,\n"
)


def arm(name: str, seed: int | None, knn: float, linear: float, seconds: float | None = None) -> dict[str, Any]:
    trained: dict[str, Any] = {
        "train_seconds": seconds,
        "teacher_forwards": 0,
        "peak_memory_bytes": 5e8,
        "epochs": 2,
        "data_wait": 0.1,
    }
    if seconds is None:
        trained = dict.fromkeys(trained)
    return {"name": name, "seed": seed, "knn_top1": knn, "linear_top1": linear, "map_at_r": 30.0, **trained}


def pair(one: str, other: str, knn: tuple[float, float, float], linear: tuple[float, float, float]) -> dict[str, Any]:
    found: dict[str, Any] = {"arm": one, "minus": other}
    for probe, (value, low, high) in (("knn_top1", knn), ("linear_top1", linear)):
        found[probe] = {"difference": value, "low": low, "high": high, "equal": stats.equal(low, high)}
    return found


def make_results(folder: Path, *, seeds: int = 1, break_even: int | None = 2) -> dict[str, Any]:
    arms = [arm("teacher", None, 80, 85)]
    for seed in range(seeds):
        arms += [arm("untrained", seed, 10 + seed, 20), arm("stored", seed, 60, 70, 40), arm("online", seed, 61, 69, 100)]
        for name in ("stored", "online"):
            run = folder / "runs" / f"{name}-seed{seed}"
            run.mkdir(parents=True)
            (run / "metrics.csv").write_text(METRICS)
    return {
        "config": {"student": "resnet18", "epochs": 2, "pixels": 32, "seeds": seeds, "checkpoint": None, "codec": "SQ8"},
        "images": 1200,
        "val_images": 300,
        "crops": 2,
        "arms": arms,
        "differences": [pair("stored", "online", (-1.0, -2.5, 0.5), (1.0, -0.5, 1.25))],
        "precompute_seconds": 90,
        "stores": {"stored": {"bytes": 360000, "crops": 2, "seconds": 90}},
        "break_even_students": break_even,
        "break_even_epochs": None if break_even is None else 1.5,
        "reached": {"knn_top1": 28.5, "seconds": {"stored": 2.0, "online": 4.0}},
        "versions": {"torch": "2.99"},
    }


def test_the_table_has_a_line_for_every_arm(tmp_path: Path) -> None:
    text = report.write(make_results(tmp_path), tmp_path)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert list(lines) == ["arm", "teacher", "online", "stored", "untrained"]
    assert lines["teacher"].split(" | ")[1:3] == ["80.00", "85.00"]
    assert lines["stored"] == "| stored | 60.00 | 70.00 | 30.00 | 40 | 20.00 | 10% | 0 | 500 MB |"
    assert all(line.count("|") == lines["arm"].count("|") for line in lines.values())


def test_the_summary_says_what_was_found(tmp_path: Path) -> None:
    text = report.write(make_results(tmp_path), tmp_path)
    assert "kNN, stored minus online: -1.00 points, 90 % paired-bootstrap interval -2.50 to +0.50: not shown equal" in text
    assert "linear probe, stored minus online: +1.00 points" in text
    assert "-0.50 to +1.25: equal within 1.5 points" in text
    assert "takes 0.40 of online's time (2.50 times as fast)" in text
    assert "2 crops an image took 90 s and 360.0 kB (150 bytes a crop)" in text
    assert "within 1.5 points of online's last (28.50 %) after 2 s (92 s with precompute); online itself 4 s" in text


def test_an_interval_that_ends_too_high_says_that_it_is_not_worse(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results["differences"] = [pair("stored", "online", (1.0, -0.5, 2.5), (1.0, -1.6, 1.4))]
    text = report.write(results, tmp_path)
    assert "interval -0.50 to +2.50: not worse by 1.5 points, not shown equal." in text
    assert "interval -1.60 to +1.40: not shown equal within 1.5 points." in text


def test_an_interval_on_one_side_of_zero_says_which_is_better(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results["differences"] = [pair("stored", "online", (1.2, 0.1, 2.3), (-9.0, -9.5, -8.5))]
    text = report.write(results, tmp_path)
    assert "interval +0.10 to +2.30: better." in text
    assert "interval -9.50 to -8.50: worse." in text


@pytest.mark.parametrize(
    ("break_even", "sentence"),
    [
        (None, "online was not slower, so the store does not pay off."),
        (1, "it has paid for itself after 1 student, or 2 epochs of students in all."),
        (3, "it has paid for itself after 3 students, or 2 epochs of students in all."),
    ],
)
def test_the_break_even_is_put_into_words(tmp_path: Path, break_even: int | None, sentence: str) -> None:
    assert sentence in report.write(make_results(tmp_path, break_even=break_even), tmp_path)


def test_several_seeds_show_mean_and_deviation(tmp_path: Path) -> None:
    text = report.write(make_results(tmp_path, seeds=2), tmp_path)
    assert "| untrained | 10.50 ± 0.71 | 20.00 ± 0.00 | 30.00 ± 0.00 |" in text
    assert "2 seeds" in text


def test_page_and_plots_are_written(tmp_path: Path) -> None:
    text = report.write(make_results(tmp_path), tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert text in page
    assert "- `codec`: SQ8" in page
    assert "checkpoint" not in page
    assert "- torch 2.99" in page
    for name in ("loss.png", "knn.png"):
        assert f"({name})" in page
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_page_for_browsers_is_one_file(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results["config"]["images"] = "<script>alert(1)</script>"
    report.write(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg ") == 2
    assert "currentColor" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)|url\((?!#)', page)
    ids = re.findall(r' id="([^"]+)"', page)
    clips = [name for name in ids if re.fullmatch("p[0-9a-f]{10}", name)]
    assert len(set(clips)) == len(clips) > 1


def test_stores_of_several_sizes_are_drawn(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results["arms"].append(arm("stored:C=1", 0, 50, 60, 41))
    (tmp_path / "runs/stored-C=1-seed0").mkdir()
    (tmp_path / "runs/stored-C=1-seed0/metrics.csv").write_text(METRICS)
    results["stores"]["stored:C=1"] = {"bytes": 180000, "crops": 1, "seconds": 45}
    results["differences"].append(pair("stored:C=1", "stored", (-10.0, -12.0, -8.0), (-1.0, -2.0, 0.5)))
    text = report.write(results, tmp_path)
    assert "kNN, stored:C=1 minus stored: -10.00 points, 90 % paired-bootstrap interval -12.00 to -8.00: worse.\n" in text
    assert "The store of stored:C=1: 180.0 kB (150 bytes a crop)." in text
    assert (tmp_path / "stores.png").read_bytes().startswith(b"\x89PNG")
    assert "(stores.png)" in (tmp_path / "report.md").read_text()


def test_writing_twice_gives_the_same_page(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    names = ("report.md", "report.html")
    report.write(results, tmp_path)
    first = [(tmp_path / name).read_bytes() for name in names]
    report.write(results, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == first


def test_two_teachers_have_a_line_for_each_arm_and_what_both_give_over_one(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results["arms"] = [arm("teacher:A", None, 80, 85), arm("teacher:B", None, 40, 45), arm("untrained", 0, 10, 20)]
    for kind, seconds in (("stored", 40), ("online", 100)):
        for k, names in enumerate(("A", "B", "A+B")):
            results["arms"].append(arm(f"{kind}:{names}", 0, 60 + k, 70, seconds + k))
            run = tmp_path / "runs" / f"{kind}-{names}-seed0"
            run.mkdir(parents=True)
            (run / "metrics.csv").write_text(METRICS)
    gain = (2.0, -1.0, 5.0)
    results["differences"] = [
        pair("stored:A+B", "online:A+B", (-1.0, -2.5, 0.5), (1.0, -0.5, 1.25)),
        *(pair("stored:A+B", f"stored:{name}", gain, gain) for name in "AB"),
    ]
    results["stores"] = {f"stored:{name}": {"bytes": 360000, "crops": 2, "seconds": 90} for name in ("A", "B", "A+B")}
    results["reached"]["seconds"] = {"stored:A+B": None, "online:A+B": 4.0}
    text = report.write(results, tmp_path)
    lines = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    trained = [f"{kind}:{names}" for kind in ("online", "stored") for names in ("A", "B", "A+B")]
    assert lines == ["arm", "teacher:A", "teacher:B", *trained, "untrained"]
    assert "kNN, stored:A+B minus online:A+B: -1.00 points" in text
    assert (
        "kNN, stored:A+B minus stored:B: +2.00 points, 90 % paired-bootstrap interval -1.00 to +5.00: not worse by 1.5 points"
        in text
    )
    assert "Not all trainings on stored targets reached kNN within 1.5 points" in text
    assert f"takes {42 / 102:.2f} of online's time" in text
    assert (tmp_path / "knn.png").read_bytes().startswith(b"\x89PNG")
