"""The tables and the plot of strong_teacher.py, from the scores of finished runs."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import students

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.eval import stats
from fkd_ssl.store import open_store

PROBES = {"knn": "kNN", "linear": "linear", "tuned": "fine-tuned", "top1": "own classes"}
UNTRAINED = ("teacher", "untrained")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The finished runs of an arm."""

    name: str
    scores: list[dict[str, Any]]
    """The scores.json of each seed."""
    correct: dict[str, Any]
    """Which test images are classified correctly: bool [seeds, n] by probe."""
    bytes: int | None
    """Bytes of a crop with its record; None without a store."""

    @classmethod
    def read(cls, name: str, runs: Sequence[Path], store: Path | None) -> "Row | None":
        """Reads the runs of seeds 0, 1 and so on, up to the first that is not finished. Returns None if seed 0 is not."""
        runs = list(takewhile(lambda run: (run / "scores.json").exists(), runs))
        if not runs:
            return None
        arrays = [np.load(run / "correct.npz", allow_pickle=False) for run in runs]
        correct = {probe: np.stack([array[probe] for array in arrays]) for probe in arrays[0]}
        size = None if store is None else open_store(store).column().meta.code_size + CROP_DTYPE.itemsize
        return cls(name=name, scores=[files.read_json(run / "scores.json") for run in runs], correct=correct, bytes=size)

    @property
    def trained(self) -> bool:
        """Whether this is a student that was trained."""
        return self.name not in UNTRAINED

    def accuracies(self, probe: str) -> list[float]:
        """Returns the accuracy of each seed, in percent."""
        return [100 * float(hits.mean()) for hits in self.correct.get(probe, [])]

    def difference(self, probe: str, reference: "Row | None") -> str:
        """Returns the difference to the reference over their common seeds; empty for arms that were not trained."""
        if (
            reference is None
            or self is reference
            or not self.trained
            or not (probe in self.correct and probe in reference.correct)
        ):
            return ""
        seeds = min(len(self.scores), len(reference.scores))
        gain, low, high = stats.paired_bootstrap(self.correct[probe][:seeds], reference.correct[probe][:seeds])
        return students.difference({"difference": gain, "low": low, "high": high, "equal": stats.equal(low, high)})

    @property
    def seconds(self) -> list[float]:
        """The time of each training."""
        return [score["train_seconds"] for score in self.scores if "train_seconds" in score]


def table(rows: list[Row], reference: Row | None) -> str:
    """Returns the rows in Markdown."""
    probes = [probe for probe in PROBES if any(probe in row.correct for row in rows)]
    compared = [probe for probe in probes if reference and probe in reference.correct]
    minus = [f"minus {reference.name}"] if reference else []
    head = ["arm"]
    for probe in probes:
        head += [f"{PROBES[probe]} top-1", *(minus if probe in compared else [])]
    lines = [[*head, "bytes per crop", "seconds", "seeds"], ["---"] * (len(head) + 3)]
    for row in rows:
        cells = [row.name]
        for probe in probes:
            cells += [mean(row.accuracies(probe), 2), *([row.difference(probe, reference)] if probe in compared else [])]
        lines.append([*cells, f"{row.bytes:,}" if row.bytes else "", mean(row.seconds, 0), str(len(row.scores))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare(one: Row, other: Row) -> str:
    """Returns the difference of two arms in all their probes."""
    found = [f"{name} {difference}" for probe, name in PROBES.items() if (difference := one.difference(probe, other))]
    return f"`{one.name}` minus `{other.name}`: {', '.join(found)}."


def about(rows: list[Row], reference: Row | None, missing: list[str]) -> str:
    """Returns what is common to the runs of a table, in Markdown. The objective and the rate are those of the reference."""
    first = next((row.scores[0] for row in [reference, *rows] if row and "config" in row.scores[0]), None)
    words = ""
    if first is not None:
        c = first["config"]
        words = f"{c['epochs']:g} epochs of {first['images']:,} images, batches of {c['batch_size']} crops, "
        words += f"`{c['objective']}`, learning rate {c['lr']:g}, " if reference else ""
        words += f"student crops of {c['pixels']} px; "
    n, v = next(iter(rows[0].correct.values())).shape[1], rows[0].scores[0]["versions"]
    words += f"{n:,} test images. "
    words += f"Not run: {', '.join(missing)}. " if missing else ""
    names = ("torch", "torchvision", "lightly", "pytorch_lightning", "faiss-cpu", "numpy")
    return f"{words}Python {v['python']}, {', '.join(f'{name} {v[name]}' for name in names)}; {machine()}."


def mean(values: list[float], digits: int) -> str:
    return students.mean(values, digits) if values else ""


def machine() -> str:
    """Returns the processors in words."""
    return (
        f"{os.cpu_count()} cores of an {gpu.processor()} that also did other work, one thread per process, {platform.system()}"
    )


def write(page: Path, name: str, text: str) -> None:
    """Writes text between the markers of an experiment on a page."""
    begin, end = f"<!-- {name}: printed by the script -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(begin)
    if found:
        page.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}")


def plot(rows: list[Row], probe: str, out: Path) -> None:
    """Plots the accuracy against the bytes of a crop. Arms without a store are lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    colours = plt.get_cmap("tab20")
    for k, row in enumerate(row for row in rows if row.trained):
        values = row.accuracies(probe)
        height, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
        if row.bytes is None:
            axis.axhline(height, label=row.name, color=colours(k), linestyle="--", linewidth=1)
        else:
            axis.errorbar(row.bytes, height, yerr=deviation, label=row.name, color=colours(k), marker="o", capsize=3)
    axis.set(xscale="log", xlabel="bytes per crop, with its record", ylabel=f"{PROBES[probe]} top-1, %")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)
    plt.close(figure)
