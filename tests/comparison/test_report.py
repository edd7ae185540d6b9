"""The report of a comparison, from made-up results."""

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from fkd_ssl.comparison import plots, report
from fkd_ssl.eval import stats

METRICS = (
    "step,epoch,crops,seconds,loss,kl,lr,wait,knn_top1,crops_per_second\n"
    "10,1.0,40,2.0,4.5,0.2,0.001,0.1,,20.0\n"
    "10,1.0,40,2.0,,,,,30.0,\n"
    "20,2.0,80,4.0,4.4,0.1,0.0,0.1,,20.0\n"
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
        found[probe] = {
            "difference": value,
            "low": low,
            "high": high,
            "equal": stats.equal(low, high),
            "more_seeds": 4,
        }
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
        "config": {
            "student": "resnet18",
            "teacher": "mocov2",
            "images": "/data/birds/train",
            "epochs": 2,
            "pixels": 32,
            "seeds": seeds,
            "checkpoint": None,
            "codec": "SQ8",
        },
        "images": 1200,
        "val_images": 300,
        "crops": 2,
        "baselines": {
            "pixels": {"knn_top1": 37.0, "linear_top1": 40.0, "map_at_r": 15.0},
            "colours": {"knn_top1": 41.0, "linear_top1": 42.0, "map_at_r": 16.0},
            "chance": {"knn_top1": 10.0, "linear_top1": 10.0},
        },
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
    text = report.text_of(make_results(tmp_path))
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    arms = ["teacher", "online", "stored", "untrained", "8 x 8 pixels", "colour histogram", "chance"]
    assert list(lines) == ["arm", *arms, "difference", "stored minus online"]
    assert lines["colour histogram"].split(" | ")[1:4] == ["41.00", "42.00", "16.00"]
    assert lines["chance"].split(" | ")[1:4] == ["10.00", "10.00", ""]
    assert lines["teacher"].split(" | ")[1:3] == ["80.00", "85.00"]
    assert lines["stored"] == "| stored | 60.00 | 70.00 | 30.00 | 40 | 20.00 | 10% | 0 | 500 MB |"
    assert {line.count("|") for line in lines.values()} == {lines["arm"].count("|"), lines["difference"].count("|")}


def test_the_verdict_is_in_words_with_the_results_numbers(tmp_path: Path) -> None:
    text = report.text_of(make_results(tmp_path))
    inconclusive = "inconclusive: about 4 more seeds are needed to compare stored with online"
    assert f"- kNN: {inconclusive} (-1.00 points, 90 % interval -2.50 to +0.50).\n" in text
    assert (
        "- linear probe: stored and online are equal within 1.5 points (+1.00 points, 90 % interval -0.50 to +1.25).\n" in text
    )
    assert "- speed: stored trains 2.50 times as fast as online (40 s instead of 100 s).\n" in text
    assert "2 epochs of students in total; made in 90 s, 360.0 kB, 2 crops per image, 150 bytes per crop" in text
    assert (
        "within 1.5 points of online's final kNN after 2 s (28.50 %; 92 s including precomputing; online itself: 4 s)" in text
    )
    assert text.splitlines()[0] == "2 epochs of one crop of 1,200 images at 32 px, 1 seed, scored on 300 test images."


def test_a_teacher_no_better_than_pixels_is_said_to_be_so(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    assert "no better than" not in report.text_of(results)
    results["baselines"]["pixels"]["knn_top1"] = 80.0
    verdict = report.verdict_of(results)[0]
    assert (verdict.kind, verdict.sentence) == ("worse", "kNN: the teacher (80.00 %) is no better than 8 x 8 pixels (80.00 %)")
    assert "linear probe: the teacher" not in report.text_of(results)


@pytest.mark.parametrize(
    ("interval", "sentence", "words"),
    [
        ((1.0, -0.5, 1.4), "stored and online are equal within 1.5 points", "equal within 1.5 points"),
        (
            (1.0, -0.5, 2.5),
            "inconclusive: about 4 more seeds are needed to compare stored with online",
            "inconclusive: about 4 more seeds are needed",
        ),
        (
            (1.0, -1.6, 1.4),
            "inconclusive: about 4 more seeds are needed to compare stored with online",
            "inconclusive: about 4 more seeds are needed",
        ),
        ((1.2, 0.1, 2.3), "stored is better than online", "better"),
        ((-9.0, -9.5, -8.5), "stored is worse than online", "worse"),
    ],
)
def test_each_interval_has_its_words(tmp_path: Path, interval: tuple[float, float, float], sentence: str, words: str) -> None:
    results = make_results(tmp_path)
    results["differences"] = [pair("stored", "online", interval, (1.0, -0.5, 1.25))]
    text = report.text_of(results)
    value, low, high = interval
    assert f"- kNN: {sentence} ({value:+.2f} points, 90 % interval {low:+.2f} to {high:+.2f})." in text
    assert f"| stored minus online | kNN | {value:+.2f} | {low:+.2f} to {high:+.2f} | {words} |" in text


@pytest.mark.parametrize(
    ("more_seeds", "words"),
    [(1, "about 1 more seed is needed"), (1200, "about 1,200 more seeds are needed"), (None, "more test images are needed")],
)
def test_an_inconclusive_interval_says_what_is_needed(tmp_path: Path, more_seeds: int | None, words: str) -> None:
    results = make_results(tmp_path)
    results["differences"][0]["knn_top1"]["more_seeds"] = more_seeds
    text = report.text_of(results)
    assert f"- kNN: inconclusive: {words} to compare stored with online (-1.00 points" in text
    assert f"| -2.50 to +0.50 | inconclusive: {words} |" in text


def test_an_existing_store_has_no_known_cost(tmp_path: Path) -> None:
    results = make_results(tmp_path, break_even=None)
    results["config"]["store"], results["precompute_seconds"] = "store", None
    text = report.text_of(results)
    assert "cost: break-even is unknown, because the store was made before the comparison (360.0 kB, 2 crops per image" in text


@pytest.mark.parametrize(
    ("break_even", "sentence"),
    [
        (None, "the store does not pay off, because online was not slower (made in 90 s"),
        (1, "the store pays off after 1 student (2 epochs of students in total"),
        (3, "the store pays off after 3 students (2 epochs of students in total"),
    ],
)
def test_the_break_even_is_put_into_words(tmp_path: Path, break_even: int | None, sentence: str) -> None:
    assert sentence in report.text_of(make_results(tmp_path, break_even=break_even))


def test_several_seeds_show_mean_and_deviation(tmp_path: Path) -> None:
    text = report.text_of(make_results(tmp_path, seeds=2))
    assert "| untrained | 10.50 ± 0.71 | 20.00 ± 0.00 | 30.00 ± 0.00 |" in text
    assert "± is the standard deviation over the 2 seeds." in text
    assert "±" not in report.text_of(make_results(tmp_path / "one")).replace("±1.5 points", "")


def test_the_title_names_student_teacher_and_images(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results["config"] |= {"teacher": "mocov2,swav", "checkpoint": "/weights/a.pth,b.pth"}
    assert report.title(results) == "resnet18 distilled from mocov2,swav (a.pth, b.pth) on birds/train"


def test_page_and_plots_are_written(tmp_path: Path) -> None:
    text = report.write(make_results(tmp_path), tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert text in page
    assert "- `codec`: SQ8" in page
    assert "checkpoint" not in page
    assert "- torch 2.99" in page
    assert page.startswith("# resnet18 distilled from mocov2 on birds/train\n")
    for name in ("loss.png", "knn.png"):
        assert f"({name})" in page
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (1300, 559)


def test_the_page_for_browsers_is_one_file(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results["config"]["images"] = results["config"]["student"] = "<script>alert(1)"
    report.write(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg ") == 2
    assert "currentColor" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert '<li class="equal"><span><strong>linear probe: stored and online are equal' in page
    assert "kNN top\u20111</th>" in page  # does not wrap before the 1
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r'(?:src|href)="(?!data:|#)|url\((?!#)', page)
    ids = re.findall(r' id="([^"]+)"', page)
    clips = [name for name in ids if re.fullmatch("p[0-9a-f]{10}", name)]
    assert len(set(clips)) == len(clips) > 1


def drawn(draw: Any, results: dict[str, Any], what: Any, folder: Path) -> Figure:
    """Draws a plot as the report does, but returns matplotlib's figure."""
    figures: list[Figure] = []

    def keep(axes: Any, *rest: Any) -> None:
        draw(axes, *rest)
        figures.append(axes[0].figure)

    plots._draw(folder, "plot", "caption", keep, results, what)
    return figures[0]


def test_curves_start_untrained_and_are_means_with_bands(tmp_path: Path) -> None:
    """Two seeds: untrained 10 and 11 %, then 30 and 32 % after 2 and 4 s."""
    results = make_results(tmp_path, seeds=2)
    metrics = tmp_path / "runs/stored-seed1/metrics.csv"
    metrics.write_text(METRICS.replace("10,1.0,40,2.0,,,,,30.0", "10,1.0,40,4.0,,,,,32.0"))
    axes = drawn(plots._curves, results, "knn_top1", tmp_path).axes
    for axis, x in zip(axes, ([0, 3], [0, 1]), strict=True):
        line = next(line for line in axis.get_lines() if line.get_label() == "stored")
        assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == (x, [10.5, 31])
        stored, online = (band.get_paths()[0].get_extents() for band in axis.collections)
        assert (stored.y0, stored.y1) == pytest.approx((10.5 - 0.5**0.5, 31 + 2**0.5))
        assert (online.y0, online.y1) == pytest.approx((10.5 - 0.5**0.5, 30))
    shifted = next(line for line in axes[0].get_lines() if line.get_label() == "stored, with precomputing")
    assert shifted.get_xdata().tolist() == [90, 93]


def inside(label: Any, frame: Any) -> bool:
    box = label.get_window_extent()
    return bool(frame.x0 <= box.x0 < box.x1 <= frame.x1 and frame.y0 <= box.y0 < box.y1 <= frame.y1)


def test_labels_are_inside_their_frame(tmp_path: Path) -> None:
    results = make_results(tmp_path, seeds=2)
    curves = drawn(plots._curves, results, "knn_top1", tmp_path)
    results["arms"].append(arm("stored:C=1", 0, 50, 60, 41))
    results["stores"]["stored:C=1"] = {"bytes": 180000, "crops": 1, "seconds": 45}
    stores = drawn(plots._stores, results, ["stored", "stored:C=1"], tmp_path)
    for figure in (curves, stores):
        [legend] = figure.legends
        assert {"stored"} < {text.get_text() for text in legend.get_texts()}
        for axis in figure.axes:
            [level] = axis.texts
            assert inside(level, axis.get_window_extent())
            assert not legend.get_window_extent().overlaps(axis.get_window_extent())
        assert inside(legend, figure.bbox)


def test_each_arm_has_a_colour_that_is_legible_on_white_and_black() -> None:
    def luminance(colour: str) -> float:
        return sum(w * ((c + 0.055) / 1.055) ** 2.4 for w, c in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True))

    names = ["teacher", "untrained", "stored", "online", "relabel", "labels", "alone", *(f"stored:C={k}" for k in range(7))]
    colours = plots.colours_of(
        {"arms": [{"name": name} for name in names], "differences": [{"arm": "stored", "minus": "online"}]}
    )
    assert len(set(colours.values())) == len(names)
    assert colours["stored"] == plots.COLOURS["stored"]
    for colour in (*plots.COLOURS.values(), *plots.FURTHER):
        assert 1.05 / (luminance(colour) + 0.05) > 3  # WCAG's least contrast of graphics
        assert (luminance(colour) + 0.05) / (luminance("#15181a") + 0.05) > 3


def test_stores_of_several_sizes_are_drawn(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    results["arms"].append(arm("stored:C=1", 0, 50, 60, 41))
    (tmp_path / "runs/stored-C=1-seed0").mkdir()
    (tmp_path / "runs/stored-C=1-seed0/metrics.csv").write_text(METRICS)
    results["stores"]["stored:C=1"] = {"bytes": 180000, "crops": 1, "seconds": 45}
    results["differences"].append(pair("stored:C=1", "stored", (-10.0, -12.0, -8.0), (-1.0, -2.0, 0.5)))
    text = report.write(results, tmp_path)
    assert "| stored:C=1 minus stored | kNN | -10.00 | -12.00 to -8.00 | worse |\n" in text
    assert "- Store of stored:C=1: 180.0 kB, 1 crop per image, 150 bytes per crop.\n" in text
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
    assert lines[:9] == ["arm", "teacher:A", "teacher:B", *trained]
    assert "- kNN: inconclusive: about 4 more seeds are needed to compare stored:A+B with online:A+B (-1.00 points" in text
    assert "| stored:A+B minus stored:B | kNN | +2.00 | -1.00 to +5.00 | inconclusive: about 4 more seeds are needed |" in text
    assert "not every stored:A+B training came within 1.5 points of online:A+B's final kNN" in text
    assert f"stored:A+B trains {102 / 42:.2f} times as fast as online:A+B" in text
    assert (tmp_path / "knn.png").read_bytes().startswith(b"\x89PNG")
