"""Collects the results.json files of knn, linear, segment and retrieve in one table: mean and standard deviation over seeds.

Each row has the evaluations of one model, protocol, image set and image size. Evaluations that differ only in their seed share
a row: the seed is seed0, seed-0 or seed_0 in the model's name, and the evaluation's --seed. A changed protocol, for instance
with --epochs, gets its own row. --baseline NAME adds the difference to that model under the same protocol, with the 90 %
interval of a bootstrap over images and seeds, paired by seed.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fkd_ssl.errors import RequestError

if TYPE_CHECKING:
    from pathlib import Path

POSITIONALS = ("folders",)
KINDS = ("knn", "linear", "segment", "retrieve")
METRICS = {"top1": "top-1", "top5": "top-5", "map_at_r": "mAP@R", "miou": "mIoU", "knn_miou": "kNN mIoU"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of report."""

    folders: list[str]
    """--out folders of evaluations, or folders that contain them."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """Format of the table."""
    baseline: str | None = None
    """Model in the table that the others are compared with."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Prints the table."""
    from fkd_ssl.commands import console

    rows = grouped(collect(config.folders))
    if config.baseline is not None:
        compare(rows, config.baseline)
    if config.json:
        shown = [{key: value for key, value in row.items() if key != "runs"} for row in rows]
        console.print_json({"kind": "report", "rows": shown})
        return 0
    console.print_result(FORMATS[config.format](cells(rows)))
    return 0


def collect(folders: list[str]) -> list[tuple["Path", dict[str, Any]]]:
    """Finds the folder and results.json of each evaluation, sorted by path.

    Raises:
        RequestError: A folder does not exist, no evaluation was found, or a results.json cannot be read.
    """
    from pathlib import Path

    from fkd_ssl import runs

    found: dict[Path, dict[str, Any]] = {}
    for name in folders:
        if not Path(name).is_dir():
            raise RequestError(f"{name}: no such folder of results")
        for path in sorted(Path(name).rglob(runs.RESULTS)):
            results = runs.read_results(path.parent)
            if isinstance(results, dict) and results.get("kind") in KINDS:
                found[path.parent.resolve()] = results
    if not found:
        raise RequestError(f"{', '.join(folders)}: no {runs.RESULTS} of {', '.join(KINDS)}; evaluate with --out first")
    return list(found.items())


def grouped(evaluations: list[tuple["Path", dict[str, Any]]]) -> list[dict[str, Any]]:
    """Makes a row for each model, protocol, image set and size: `seeds`, and mean and standard deviation of each metric.

    `runs` has the folder and the seeds (from the model's name and of the evaluation) of each run.
    """
    import json
    import statistics

    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], tuple[Path, dict[str, Any]]]] = {}
    for folder, results in evaluations:
        data = results["data"]
        model = _SEED.sub("", _name(results))
        scored = data.get("val") or data.get("queries") or next(iter(data.values()))
        transform = results["transform"] or {}
        pixels = transform.get("centre_crop", transform.get("short_side"))
        key = (model, results["kind"], _protocol(results), scored["source"], scored["images"], pixels)
        once = (json.dumps(results["model"], sort_keys=True), results.get("seed"))
        groups.setdefault(key, {}).setdefault(once, (folder, results))  # a repeated evaluation counts once
    rows = []
    for (model, kind, protocol, source, images, pixels), evaluated in groups.items():
        members = list(evaluated.values())
        row = {"model": model, "kind": kind, "protocol": protocol, "data": source, "images": images, "pixels": pixels}
        row |= {"seeds": len(members), "runs": [(_seeds(results), folder) for folder, results in members]}
        for metric in METRICS:
            values = [results[metric] for _, results in members if metric in results]
            row[metric] = statistics.mean(values) if values else None
            row[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


_SEED = re.compile(r"[-_./]?seed[-_]?(\d+)")


def _name(results: dict[str, Any]) -> str:
    """The model's name, or that of the first set if features came from files."""
    name: str = (results["model"] or {}).get("name") or next(iter(results["data"].values()))["source"]
    return name


def _seeds(results: dict[str, Any]) -> str:
    """The seeds of a run as text: the seed in the model's name, and the seed of the evaluation."""
    return ", ".join([*_SEED.findall(_name(results)), *([f"--seed {results['seed']}"] if results.get("seed") else [])])


def _protocol(results: dict[str, Any]) -> str:
    """The name of the protocol, and the settings that depart from it."""
    notes = [note.partition(": ")[2] for note in results.get("notes", []) if note.startswith("departs from")]
    return f"{results['protocol']} ({', '.join(notes)})" if notes else results["protocol"]


def compare(rows: list[dict[str, Any]], baseline: str) -> None:
    """Adds `difference`, `low` and `high` in points of top-1 or mIoU to each row that has a matching row of the baseline.

    Runs are paired by their seeds.

    Raises:
        RequestError: The baseline has no row, or the runs to compare differ in their seeds or images.
    """
    import numpy as np

    from fkd_ssl.commands import results
    from fkd_ssl.errors import did_you_mean
    from fkd_ssl.eval import iou, stats

    same = ("kind", "protocol", "data", "images")
    base = {tuple(row[key] for key in same): row for row in rows if row["model"] == baseline}
    if not base:
        names = list(dict.fromkeys(row["model"] for row in rows))
        raise RequestError(f"--baseline {baseline}: no such model in the table{did_you_mean(baseline, names)}")
    for row in rows:
        other = base.get(tuple(row[key] for key in same))
        if other is None or other is row:
            continue
        own, its = (sorted(part["runs"]) for part in (row, other))
        seeds, its_seeds = ([seed for seed, _ in runs] for runs in (own, its))
        if seeds != its_seeds or len(set(seeds)) < len(seeds):
            raise RequestError(
                f"--baseline {baseline}: runs are paired by seed: {row['model']} has seeds {_listed(seeds)}, the baseline "
                f"{_listed(its_seeds)} ({row['protocol']}); evaluate the same seeds of both, each once"
            )
        segmented = row["kind"] == "segment"
        name = results.COUNTS if segmented else results.CORRECT
        arms = [[results.read_array(folder, name) for _, folder in runs] for runs in (own, its)]
        if len({array.shape for arm in arms for array in arm}) != 1:
            raise RequestError(f"--baseline {baseline}: {row['model']} was scored on other images or classes; use the same")
        bootstrap = iou.paired_bootstrap if segmented else stats.paired_bootstrap
        difference, low, high = bootstrap(np.stack(arms[0]), np.stack(arms[1]))
        row |= {"difference": difference, "low": low, "high": high}


def _listed(seeds: list[str]) -> str:
    return " / ".join(seed or "none" for seed in seeds)


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Formats the rows as text cells, with a heading; empty columns are left out."""

    def score(row: dict[str, Any], metric: str) -> str:
        if row[metric] is None:
            return ""
        deviation = row[f"{metric}_std"]
        return f"{row[metric]:.2f}" if deviation is None else f"{row[metric]:.2f} ± {deviation:.2f}"

    columns = {
        "model": [row["model"] for row in rows],
        "protocol": [f"{row['kind']}: {row['protocol']}" for row in rows],
        "images": [f"{row['data']} ({row['images']})" for row in rows],
        "px": ["" if row["pixels"] is None else str(row["pixels"]) for row in rows],
        "seeds": [str(row["seeds"]) for row in rows],
        **{heading: [score(row, metric) for row in rows] for metric, heading in METRICS.items()},
        "difference": [f"{r['difference']:+.2f} ({r['low']:+.2f} to {r['high']:+.2f})" if "low" in r else "" for r in rows],
    }
    shown = {name: column for name, column in columns.items() if any(column)}
    return [list(shown), *map(list, zip(*shown.values(), strict=True))]


def markdown(table: list[list[str]]) -> str:
    """Formats a table as GitHub Markdown."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def csv(table: list[list[str]]) -> str:
    """Formats a table as comma-separated values."""
    import csv as library
    import io

    text = io.StringIO()
    library.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue().rstrip("\n")


def latex(table: list[list[str]]) -> str:
    """Formats a table as a LaTeX tabular with booktabs."""
    special = {char: f"\\{char}" for char in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
    special |= {"±": r"$\pm$"}

    def line(row: list[str]) -> str:
        return " & ".join("".join(special.get(char, char) for char in cell) for cell in row) + r" \\"

    head, *body = map(line, table)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{'l' * len(table[0])}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


FORMATS = {"markdown": markdown, "csv": csv, "latex": latex}
