"""The plots of a comparison: each a PNG for report.md, and SVG for report.html that takes the page's colour of text."""

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

_LINES = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)))  # of several arms of one kind
_COLOURS = {
    "stored": "#1a9a6c",
    "online": "#d1603d",
    "alone": "#7a5fc7",
    "labels": "#b5892a",
    "relabel": "#b0457f",
    "teacher": "#5b7fb8",
    "untrained": "#9a9a9a",
}
_INK = "#101213"  # in SVG it becomes the page's own
_PROBES = {"knn_top1": "kNN top-1, %", "linear_top1": "linear top-1, %"}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot that was drawn.

    Attributes:
        name: Of its PNG, without suffix.
        caption: What it shows.
        svg: The element, of the page's width.
    """

    name: str
    caption: str
    svg: str


def draw_all(results: dict[str, Any], folder: Path) -> list[Plot]:
    """Draws the plots beside a comparison's results.json."""
    plots = [
        _draw(folder, "knn", "kNN accuracy during training, against wall-clock and epochs", _curves, results, "knn_top1"),
        _draw(
            folder, "loss", "Loss above the least that the targets allow, against wall-clock and epochs", _curves, results, "kl"
        ),
    ]
    stores = [name for name in results["stores"] if (name, 0) in {(arm["name"], arm["seed"]) for arm in results["arms"]}]
    stores = [name for name in stores if results["stores"][name]["crops"] is not None]
    if len({results["stores"][name]["bytes"] for name in stores}) > 1:
        caption = "Accuracy against stored crops and against bytes on disk; the bars are deviations over seeds"
        plots.append(_draw(folder, "stores", caption, _stores, results, stores))
    return plots


def _draw(folder: Path, name: str, caption: str, draw: Any, results: dict[str, Any], what: Any) -> Plot:
    """A plot with two axes side by side, as PNG on white and as SVG without a ground."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inked, _INK)
    with mpl.rc_context({**style, "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2)
        draw(axes, results, what, folder)
        for axis in axes:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=130, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    files.replace(folder / f"{name}.png", png.getvalue())
    element = svg.getvalue()[svg.getvalue().index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL).replace(_INK, "currentColor")
    element = re.sub(r' (?:width|height)="[^"]*"', "", element, count=2)  # its own: the page says how wide it is
    return Plot(name=name, caption=caption, svg=element)


def _curves(axes: Sequence[Any], results: dict[str, Any], column: str, folder: Path) -> None:
    """One measure against wall-clock (stored also with its precomputing before it) and against epochs."""
    first = results["differences"][0]["arm"]
    names = list(dict.fromkeys(arm["name"] for arm in results["arms"]))
    for arm in results["arms"]:
        name, kind = arm["name"], arm["name"].partition(":")[0]
        label = name if arm["seed"] == 0 else None
        style: dict[str, Any] = {"color": _COLOURS[kind], "linewidth": 1.2, "linestyle": _line(names, name, first)}
        if arm["train_seconds"] is None:
            continue
        if kind == "alone":  # it is scored at its end
            if column in arm:
                axes[0].plot(arm["train_seconds"], arm[column], "D", color=_COLOURS[kind], markersize=5, label=label)
            continue
        metrics = read_metrics(folder / "runs" / run_name(name, arm["seed"]) / "metrics.csv")
        lines = [line for line in metrics if line[column] is not None]
        values = [line[column] for line in lines]
        style |= {"marker": "o", "markersize": 3} if column in _PROBES or len(lines) < 3 else {}
        axes[0].plot([line["seconds"] for line in lines], values, label=label, **style)
        axes[1].plot([line["epoch"] for line in lines], values, label=label, **style)
        if name == first:
            shifted = [(line["seconds"] or 0) + (results["precompute_seconds"] or 0) for line in lines]
            with_store = f"{name}, precomputing first" if label else None
            axes[0].plot(shifted, values, label=with_store, **{**style, "linestyle": ":"})
    if column in _PROBES:
        _levels(axes, results, column, ("teacher", "untrained"))
    else:
        axes[0].set_yscale("log")
        axes[1].set_yscale("log")
    axes[1].sharey(axes[0])
    axes[0].set(xlabel="seconds of training", ylabel=_PROBES.get(column, "loss above its floor"))
    axes[1].set(xlabel="epochs (one crop of every image)")
    axes[0].legend(frameon=False, fontsize=8, loc="best")


def _line(names: Sequence[str], name: str, first: str) -> Any:
    """The line of an arm: whole for the one that stands for its kind."""
    kind = name.partition(":")[0]
    others = [other for other in names if other.partition(":")[0] == kind and other not in (first, kind)]
    return _LINES[0] if name not in others else _LINES[1 + others.index(name) % (len(_LINES) - 1)]


def _levels(axes: Sequence[Any], results: dict[str, Any], column: str, kinds: Sequence[str]) -> None:
    """A line across for each arm of these kinds."""
    for name in dict.fromkeys(arm["name"] for arm in results["arms"] if arm["name"].partition(":")[0] in kinds):
        score = statistics.mean(arm[column] for arm in results["arms"] if arm["name"] == name)
        for axis in axes:
            axis.axhline(score, color=_COLOURS[name.partition(":")[0]], linestyle="--", linewidth=1, label=name)


def _stores(axes: Sequence[Any], results: dict[str, Any], names: Sequence[str], folder: Path) -> None:
    """Both probes of the stored arms against stored crops and bytes."""
    for probe, marker, label in (("knn_top1", "o", "kNN"), ("linear_top1", "s", "linear")):
        points = []
        for name in names:
            scores = [arm[probe] for arm in results["arms"] if arm["name"] == name]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            store = results["stores"][name]
            points.append((store["crops"], store["bytes"] / 1e6, statistics.mean(scores), spread, name))
        for axis, place in zip(axes, (0, 1), strict=True):
            x = [point[place] for point in points]
            y, error = [point[2] for point in points], [point[3] for point in points]
            axis.errorbar(x, y, error, fmt=marker, color=_COLOURS["stored"], capsize=3, label=f"stored, {label}", markersize=5)
            if probe == "linear_top1":
                for point in points:
                    axis.annotate(
                        point[4].removeprefix("stored:"),
                        (point[place], point[2]),
                        xytext=(4, 6),
                        fontsize=7,
                        textcoords="offset points",
                    )
    online = results["differences"][0]["minus"]
    for probe, style in (("knn_top1", "--"), ("linear_top1", "-.")):
        score = statistics.mean(arm[probe] for arm in results["arms"] if arm["name"] == online)
        for axis in axes:
            name = f"{online}, {'kNN' if probe == 'knn_top1' else 'linear'}"
            axis.axhline(score, color=_COLOURS["online"], linestyle=style, linewidth=1, label=name)
    axes[0].set(xscale="log", xlabel="stored crops an image", ylabel="top-1, %")
    axes[1].set(xscale="log", xlabel="megabytes on disk")
    stores = [results["stores"][name] for name in names]
    for axis, values in zip(axes, ({s["crops"] for s in stores}, {s["bytes"] / 1e6 for s in stores}), strict=True):
        axis.set_xticks(sorted(values), [f"{value:.3g}" for value in sorted(values)])
        axis.set_xticks([], minor=True)
    axes[1].sharey(axes[0])
    axes[0].legend(frameon=False, fontsize=8)
