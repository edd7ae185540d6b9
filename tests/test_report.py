"""The report of a comparison, from made-up results."""

from pathlib import Path
from typing import Any

import pytest

from fkd_ssl import report

METRICS = (
    "step,epoch,crops,seconds,loss,kl,lr,wait,knn_top1\n"
    "10,1.0,40,2.0,4.5,0.2,0.001,0.1,\n"
    "10,1.0,40,2.0,,,,,30.0\n"
    "20,2.0,80,4.0,4.4,0.1,0.0,0.1,\n"
)


def arm(name: str, seed: int | None, knn: float, linear: float, seconds: float | None = None) -> dict[str, Any]:
    trained = {"train_seconds": seconds, "teacher_forwards": 0, "peak_memory_bytes": 5e8, "epochs": 2, "data_wait": 0.1}
    if seconds is None:
        trained = dict.fromkeys(trained)  # type: ignore[assignment]
    return {"name": name, "seed": seed, "knn_top1": knn, "linear_top1": linear, **trained}


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
        "differences": {
            "knn_top1": {"difference": -1.0, "low": -2.5, "high": 0.5, "equal": False},
            "linear_top1": {"difference": 1.0, "low": -0.5, "high": 1.25, "equal": True},
        },
        "precompute_seconds": 90,
        "store_bytes": 360000,
        "break_even_students": break_even,
        "versions": {"torch": "2.99"},
    }


def test_the_table_has_a_line_for_every_arm(tmp_path: Path) -> None:
    text = report.write(make_results(tmp_path), tmp_path)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert list(lines) == ["arm", "teacher", "online", "stored", "untrained"]
    assert lines["teacher"].split(" | ")[1:3] == ["80.00", "85.00"]
    assert lines["stored"] == "| stored | 60.00 | 70.00 | 40 | 20.00 | 10 % | 0 | 500 MB |"
    assert all(line.count("|") == lines["arm"].count("|") for line in lines.values())


def test_the_summary_says_what_was_found(tmp_path: Path) -> None:
    text = report.write(make_results(tmp_path), tmp_path)
    assert "kNN, stored minus online: -1.00 points, 90 % paired-bootstrap interval -2.50 to +0.50: not shown equal" in text
    assert "linear probe, stored minus online: +1.00 points" in text
    assert "-0.50 to +1.25: equal within 1.5 points" in text
    assert "takes 0.40 of online's time (2.50 times as fast)" in text
    assert "2 crops an image took 90 s and 0.4 MB (150 bytes a crop)" in text


@pytest.mark.parametrize(
    ("break_even", "sentence"),
    [
        (None, "online was not slower here, so it never pays."),
        (1, "it has paid for itself after 1 student."),
        (3, "it has paid for itself after 3 students."),
    ],
)
def test_the_break_even_is_put_into_words(tmp_path: Path, break_even: int | None, sentence: str) -> None:
    assert sentence in report.write(make_results(tmp_path, break_even=break_even), tmp_path)


def test_several_seeds_show_mean_and_deviation(tmp_path: Path) -> None:
    text = report.write(make_results(tmp_path, seeds=2), tmp_path)
    assert "| untrained | 10.50 ± 0.71 | 20.00 ± 0.00 |" in text
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


def test_writing_twice_gives_the_same_page(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    report.write(results, tmp_path)
    first = (tmp_path / "report.md").read_bytes()
    report.write(results, tmp_path)
    assert (tmp_path / "report.md").read_bytes() == first


def test_two_teachers_have_a_line_for_each_arm_and_what_both_give_over_one(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results["arms"] = [arm("teacher:A", None, 80, 85), arm("teacher:B", None, 40, 45), arm("untrained", 0, 10, 20)]
    for kind, seconds in (("stored", 40), ("online", 100)):
        for k, names in enumerate(("A", "B", "A+B")):
            results["arms"].append(arm(f"{kind}:{names}", 0, 60 + k, 70, seconds + k))
            run = tmp_path / "runs" / f"{kind}-{names}-seed0"
            run.mkdir(parents=True)
            (run / "metrics.csv").write_text(METRICS)
    gain = {"difference": 2.0, "low": -1.0, "high": 5.0, "equal": False}
    results["gains"] = {f"stored:{name}": {"knn_top1": gain, "linear_top1": gain} for name in "AB"}
    text = report.write(results, tmp_path)
    lines = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    trained = [f"{kind}:{names}" for kind in ("online", "stored") for names in ("A", "B", "A+B")]
    assert lines == ["arm", "teacher:A", "teacher:B", *trained, "untrained"]
    assert "kNN, stored:A+B minus online:A+B: -1.00 points" in text
    assert "kNN, stored:A+B minus stored:B: +2.00 points, 90 % paired-bootstrap interval -1.00 to +5.00." in text
    assert f"takes {42 / 102:.2f} of online's time" in text
    assert (tmp_path / "knn.png").read_bytes().startswith(b"\x89PNG")
