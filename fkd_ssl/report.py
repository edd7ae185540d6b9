"""The report of a comparison: a table, curves and the break-even, as report.md and PNGs."""

import statistics
from pathlib import Path
from typing import Any

from fkd_ssl import files
from fkd_ssl.training.recorder import read_metrics

_LINES = ("-", "--", "-.")  # of several arms of one kind
_COLOURS = {"stored": "#0b6e4f", "online": "#c1666b", "teacher": "#4a4e69", "untrained": "#9a9a9a"}
_PROBE_NAMES = {"knn_top1": "kNN", "linear_top1": "linear probe"}


def run_name(arm: str, seed: int) -> str:
    """The folder of an arm's run in a comparison's `runs`."""
    return f"{arm.replace(':', '-')}-seed{seed}"


def write(results: dict[str, Any], folder: Path) -> str:
    """Writes report.md, loss.png and knn.png beside a comparison's results.json; returns the table as text."""
    _plot(results, folder, "kl", "loss above its floor", folder / "loss.png")
    _plot(results, folder, "knn_top1", "kNN top-1, %", folder / "knn.png")
    summary = _summary(results)
    text = "\n".join([*_table(results), "", *summary])
    page = "\n".join(
        [
            "# Stored against online distillation",
            "",
            text,
            "",
            "![Loss above the least that the targets allow, against wall-clock and epochs](loss.png)",
            "",
            "![kNN accuracy during training, against wall-clock and epochs](knn.png)",
            "",
            "## What was run",
            "",
            *[f"- `{key}`: {value}" for key, value in results["config"].items() if value is not None],
            *[f"- {name} {version}" for name, version in results["versions"].items()],
            "",
        ]
    )
    files.replace(folder / "report.md", page.encode())
    return text


def _table(results: dict[str, Any]) -> list[str]:
    """One line an arm: the mean over seeds, and the deviation where there are several."""
    lines = [
        "| arm | kNN top-1 | linear top-1 | training seconds | seconds an epoch | waiting for data | teacher forwards | peak "
        "memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in [name for kind in ("teacher", "online", "stored", "untrained") for name in _names(results, kind)]:
        arms = [arm for arm in results["arms"] if arm["name"] == name]
        cells = [name, _mean(arms, "knn_top1", "{:.2f}"), _mean(arms, "linear_top1", "{:.2f}")]
        if arms[0]["train_seconds"] is None:
            cells += ["", "", "", "", ""]
        else:
            per_epoch = [{"seconds": arm["train_seconds"] / arm["epochs"]} for arm in arms]
            waiting = [{"percent": 100 * arm["data_wait"]} for arm in arms]
            memory = [{"megabytes": arm["peak_memory_bytes"] / 1e6} for arm in arms]
            cells += [
                _mean(arms, "train_seconds", "{:.0f}"),
                _mean(per_epoch, "seconds", "{:.2f}"),
                f"{_mean(waiting, 'percent', '{:.0f}')} %",
                f"{arms[0]['teacher_forwards']:,}",
                f"{_mean(memory, 'megabytes', '{:.0f}')} MB",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _names(results: dict[str, Any], kind: str) -> list[str]:
    """The arms of one kind: `stored`, or of several teachers `stored:A`, `stored:B`, and last `stored:A+B`."""
    names = dict.fromkeys(arm["name"] for arm in results["arms"])
    return [name for name in names if name.partition(":")[0] == kind]


def _mean(arms: list[dict[str, Any]], key: str, form: str) -> str:
    values = [arm[key] for arm in arms]
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"


def _summary(results: dict[str, Any]) -> list[str]:
    config = results["config"]
    seeds = f"{config['seeds']} seed{'s' if config['seeds'] > 1 else ''}"
    lines = [
        f"{config['student']}, {config['epochs']:g} epochs of one crop of {results['images']:,} images at "
        f"{config['pixels']} px, {seeds}, {results['val_images']:,} test images.",
        "",
    ]
    for probe, name in _PROBE_NAMES.items():
        d = results["differences"][probe]
        verdict = "equal within 1.5 points" if d["equal"] else "not shown equal within 1.5 points"
        stored, online = (_names(results, kind)[-1] for kind in ("stored", "online"))
        lines.append(
            f"- {name}, {stored} minus {online}: {d['difference']:+.2f} points, 90 % paired-bootstrap interval "
            f"{d['low']:+.2f} to {d['high']:+.2f}: {verdict}."
        )
        for other, gain in results.get("gains", {}).items():
            g = gain[probe]
            lines.append(
                f"- {name}, {stored} minus {other}: {g['difference']:+.2f} points, 90 % paired-bootstrap interval "
                f"{g['low']:+.2f} to {g['high']:+.2f}."
            )
    seconds = {
        kind: statistics.mean(arm["train_seconds"] for arm in results["arms"] if arm["name"] == _names(results, kind)[-1])
        for kind in ("stored", "online")
    }
    lines.append(
        f"- Training on stored targets takes {seconds['stored'] / seconds['online']:.2f} of online's time "
        f"({seconds['online'] / seconds['stored']:.2f} times as fast)."
    )
    crops = results["images"] * results["crops"]
    seconds_taken = results["precompute_seconds"]
    store = (
        f"The store of {results['crops']} crops an image took {'?' if seconds_taken is None else f'{seconds_taken:.0f}'} s and "
        f"{results['store_bytes'] / 1e6:.1f} MB ({results['store_bytes'] / crops:.0f} bytes a crop)"
    )
    students = results["break_even_students"]
    if seconds_taken is None:
        lines.append(f"- {store}; it was finished by a run that was killed before it noted its time: no break-even.")
    elif students is None:
        lines.append(f"- {store}; online was not slower here, so it never pays.")
    else:
        lines.append(f"- {store}; it has paid for itself after {students} student{'s' if students > 1 else ''}.")
    return lines


def _plot(results: dict[str, Any], folder: Path, column: str, label: str, out: Path) -> None:
    """One measure against wall-clock (stored also with its precomputing before it) and against epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for arm in results["arms"]:
        if arm["train_seconds"] is None:
            continue
        name, kind = arm["name"], arm["name"].partition(":")[0]
        names = _names(results, kind)
        lines = [
            line
            for line in read_metrics(folder / "runs" / run_name(name, arm["seed"]) / "metrics.csv")
            if line[column] is not None
        ]
        values = [line[column] for line in lines]
        marker = "o" if column == "knn_top1" else None
        style: dict[str, Any] = {"color": _COLOURS[kind], "marker": marker, "markersize": 3, "linewidth": 1.2}
        style["linestyle"] = _LINES[(len(names) - 1 - names.index(name)) % len(_LINES)]
        first = name if arm["seed"] == 0 else None
        axes[0].plot([line["seconds"] for line in lines], values, label=first, **style)
        axes[1].plot([line["epoch"] for line in lines], values, label=first, **style)
        if kind == "stored" and name == names[-1]:
            shifted = [(line["seconds"] or 0) + (results["precompute_seconds"] or 0) for line in lines]
            with_store = f"{name}, precomputing first" if first else None
            axes[0].plot(shifted, values, label=with_store, **{**style, "linestyle": ":"})
    if column in _PROBE_NAMES:
        for name in [*_names(results, "teacher"), "untrained"]:
            score = statistics.mean(arm[column] for arm in results["arms"] if arm["name"] == name)
            for axis in axes:
                axis.axhline(score, color=_COLOURS[name.partition(":")[0]], linestyle="--", linewidth=1, label=name)
    else:
        axes[0].set_yscale("log")
    axes[0].set(xlabel="seconds of training", ylabel=label)
    axes[1].set(xlabel="epochs (one crop of every image)")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8, loc="center right" if column in _PROBE_NAMES else "upper right")
    figure.savefig(out, dpi=130)
    plt.close(figure)
