"""The plots of a comparison: PNGs for report.md, and SVGs for report.html whose text takes the colour of the page's text."""

import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fkd_ssl import files
from fkd_ssl.comparison.arms import run_name
from fkd_ssl.training.metrics import read_metrics

COLOURS = {
    "stored": "#12946a",
    "online": "#d1603d",
    "alone": "#8a6fd1",
    "teacher": "#4a80c8",
    "untrained": "#868c92",
}
FURTHER = ("#c0508f", "#a8801f", "#1a90a8", "#8c7466", "#6d8f2a", "#6b6bd6", "#d04a5a", "#5a8c8c", "#a86ba8")
"""Colours of the other arms. All are legible on white and on the report's dark ground."""
_INK = "#101213"  # colour of text and axes; an SVG uses the page's colour instead
_LABELS = {"knn_top1": "kNN top-1, %", "linear_top1": "linear top-1, %", "kl": "loss minus its lower bound"}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot that was drawn.

    Attributes:
        name: Name of the PNG, without suffix.
        caption: What the plot shows.
        svg: The SVG element, as wide as the page.
    """

    name: str
    caption: str
    svg: str


def draw_all(results: dict[str, Any], folder: Path) -> list[Plot]:
    """Draws the plots next to the results.json of a comparison."""
    seeds = results["config"]["seeds"]
    mean = f" Lines are means over {seeds} seeds, bands their standard deviation." if seeds > 1 else ""
    knn = f"kNN accuracy against training time and epochs, from the untrained student on.{mean}"
    plots = [
        _draw(folder, "knn", knn, _curves, results, "knn_top1"),
        _draw(folder, "loss", f"Loss minus its lower bound, against training time and epochs.{mean}", _curves, results, "kl"),
    ]
    stores = [name for name in results["stores"] if (name, 0) in {(arm["name"], arm["seed"]) for arm in results["arms"]}]
    stores = [name for name in stores if results["stores"][name]["crops"] is not None]
    if len({results["stores"][name]["bytes"] for name in stores}) > 1:
        bars = " Bars are standard deviations over seeds." if seeds > 1 else ""
        plots.append(_draw(folder, "stores", f"Accuracy against the size of the store.{bars}", _stores, results, stores))
    return plots


def colours_of(results: dict[str, Any]) -> dict[str, str]:
    """Returns a colour for each arm; the two of the headline and those in COLOURS have fixed ones."""
    names = list(dict.fromkeys(arm["name"] for arm in results["arms"]))
    first = results["differences"][0]
    fixed = {**COLOURS, first["arm"]: COLOURS["stored"], first["minus"]: COLOURS["online"]}
    others = [name for name in names if name not in fixed]
    return {name: fixed.get(name) or FURTHER[others.index(name) % len(FURTHER)] for name in names}


def _draw(folder: Path, name: str, caption: str, draw: Any, results: dict[str, Any], what: Any) -> Plot:
    """Draws a plot with two axes side by side, as PNG on white and as SVG without a background."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inked, _INK)
    with mpl.rc_context({**style, "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 11}):
        figure = Figure(figsize=(10, 4.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2, sharey=draw is _curves)
        draw(axes, results, what, folder)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        for axis in axes:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=130, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    files.replace(folder / f"{name}.png", png.getvalue())
    element = svg.getvalue()[svg.getvalue().index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL).replace(_INK, "currentColor")
    element = re.sub(r' (?:width|height)="[^"]*"', "", element, count=2)  # the page sets the width
    return Plot(name=name, caption=caption, svg=element)


def _curves(axes: Sequence[Any], results: dict[str, Any], column: str, folder: Path) -> None:
    """Draws a measure against time and against epochs; the main stored arm also against time with precomputing."""
    main = results["differences"][0]["arm"]
    highest, lowest = 0.0, float("inf")
    for name, colour in colours_of(results).items():
        arms = [arm for arm in results["arms"] if arm["name"] == name]
        if arms[0]["train_seconds"] is None:
            if column in arms[0] and name != "untrained":  # the curves start there
                _level(axes, name, statistics.mean(arm[column] for arm in arms), colour)
            continue
        if name == "alone":  # it is scored only at its end
            if column in arms[0]:
                time, score = (_mean_and_deviation([arm[key] for arm in arms]) for key in ("train_seconds", column))
                axes[0].errorbar(
                    time[0], score[0], score[1], time[1], fmt="D", color=colour, markersize=5, capsize=2, label=name
                )
            continue
        curves = [_curve(results, folder, arm, column) for arm in arms]
        epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
        seconds = [statistics.mean(curve[epoch][0] for curve in curves) for epoch in epochs]
        values = [_mean_and_deviation([curve[epoch][1] for curve in curves]) for epoch in epochs]
        means, low, high = [m for m, _ in values], [m - d for m, d in values], [m + d for m, d in values]
        highest, lowest = max([highest, *high]), min([lowest, *means])
        style: dict[str, Any] = {"color": colour, "linewidth": 1.6, "marker": "o", "markersize": 3}
        for axis, x in zip(axes, (seconds, epochs), strict=True):
            axis.plot(x, means, label=name, **style)
            if len(arms) > 1:
                axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        if name == main and results["precompute_seconds"]:
            shifted = [s + results["precompute_seconds"] for s in seconds]
            axes[0].plot(shifted, means, label=f"{name}, with precomputing", **{**style, "linestyle": ":"})
    if column == "kl" and highest > 10 * lowest > 0:
        axes[0].set_yscale("log")
    axes[0].margins(y=0.12)  # room for the names of levels
    axes[0].set(xlabel="training time, s", ylabel=_LABELS[column], xlim=(0, None))
    axes[1].set(xlabel="epochs (one crop of every image)", xlim=(0, None))


def _curve(results: dict[str, Any], folder: Path, arm: dict[str, Any], column: str) -> dict[float, tuple[float, float]]:
    """Returns epoch -> (seconds, value) where metrics.csv has a value; scores begin with the untrained student's."""
    metrics = read_metrics(folder / "runs" / run_name(arm["name"], arm["seed"]) / "metrics.csv")
    curve: dict[float, tuple[float, float]] = {}
    for start in results["arms"]:
        if (start["name"], start["seed"]) == ("untrained", arm["seed"]) and column in start:
            curve[0.0] = 0.0, start[column]
    for line in metrics:
        if (value := line[column]) is not None:
            curve[line["epoch"] or 0.0] = line["seconds"] or 0.0, value
    return curve


def _level(axes: Sequence[Any], name: str, score: float, colour: str) -> None:
    """Draws a horizontal line with its name above it, inside both axes."""
    for axis in axes:
        axis.axhline(score, color=colour, linestyle="--", linewidth=1)
        axis.annotate(
            f"{name} {score:.1f}",
            (0.01, score),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=9,
            color=colour,
        )


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _stores(axes: Sequence[Any], results: dict[str, Any], names: Sequence[str], folder: Path) -> None:
    """Draws both probes of the stored arms against the size of their stores, and online's as a line."""
    colours, online = colours_of(results), results["differences"][0]["minus"]
    for axis, probe in zip(axes, ("knn_top1", "linear_top1"), strict=True):
        for name in names:
            mean, deviation = _mean_and_deviation([arm[probe] for arm in results["arms"] if arm["name"] == name])
            size = results["stores"][name]["bytes"] / 1e6
            axis.errorbar(size, mean, deviation, fmt="o", color=colours[name], capsize=3, markersize=6, label=name)
        _level([axis], online, statistics.mean(arm[probe] for arm in results["arms"] if arm["name"] == online), colours[online])
        axis.margins(x=0.1, y=0.15)
        axis.set(xlim=(0, None), xlabel="size of the store, MB", ylabel=_LABELS[probe])
