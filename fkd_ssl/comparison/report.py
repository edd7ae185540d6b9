"""The report of a comparison: report.html, which is one file without a network, report.md, and the plots as PNGs."""

import base64
import dataclasses
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fkd_ssl import files
from fkd_ssl.comparison import plots
from fkd_ssl.comparison.arms import run_name
from fkd_ssl.comparison.config import CompareConfig
from fkd_ssl.errors import FkdError
from fkd_ssl.store import Store, open_store
from fkd_ssl.text import format_bytes, format_duration, printable

PROBE_NAMES = {"knn_top1": "kNN", "linear_top1": "linear probe", "top1": "top-1 of its own classes"}
TITLE = "Stored against online distillation"
SHEET = "sheet.png"
SHEET_CAPTION = (
    "An image with the boxes of its first stored crops, these crops, and the crops of other images that are nearest to each "
    "for the teacher, by the cosine of their stored targets"
)
_COLUMNS = (
    "arm",
    "kNN top-1",
    "linear top-1",
    "mAP@R",
    "training seconds",
    "seconds an epoch",
    "waiting for data",
    "teacher forwards",
    "peak memory",
)


def write(results: dict[str, Any], folder: Path, draw_sheet: Callable[[Store], bytes] | None = None) -> str:
    """Writes report.html, report.md and plots beside a comparison's results.json.

    Args:
        results: The results.json.
        folder: The comparison's folder.
        draw_sheet: Draws the contact sheet of a store as PNG; it may raise FkdError. None leaves it out.

    Returns:
        The table and the findings as text.
    """
    import jinja2

    table, findings = _table(results), _findings(results)
    drawn = plots.draw_all(results, folder)
    text = "\n".join([*_markdown(table), "", what(results), "", *(f"- {line}" for line in findings)])
    config = {k: v for k, v in results["config"].items() if v not in (None, "") and k != "json"}
    sheet, commands = _sheet(folder, draw_sheet), _commands(results)
    page = [
        f"# {TITLE}",
        "",
        text,
        "",
        *(line for plot in drawn for line in (f"![{plot.caption}]({plot.name}.png)", "")),
        *([f"![{SHEET_CAPTION}]({SHEET})", ""] if sheet else []),
        "## What was run",
        "",
        "```bash",
        *commands,
        "```",
        "",
        *(f"- `{key}`: {value}" for key, value in config.items()),
        *(f"- {name} {version}" for name, version in results["versions"].items()),
        "",
    ]
    files.replace(folder / "report.md", printable("\n".join(page)).encode())
    loader = jinja2.PackageLoader("fkd_ssl.comparison", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.get_template("report.html.jinja").render(
        title=TITLE,
        what=what(results),
        table=table,
        findings=findings,
        plots=drawn,
        commands=commands,
        config=config,
        versions=results["versions"],
        sheet=base64.b64encode(sheet).decode(),
        caption=SHEET_CAPTION,
    )
    files.replace(folder / "report.html", printable(html).encode())
    return text


def what(results: dict[str, Any]) -> str:
    """A sentence about what was compared."""
    config = results["config"]
    seeds = f"{config['seeds']} seed{'s' if config['seeds'] > 1 else ''}"
    return (
        f"{config['student']}, {config['epochs']:g} epochs of one crop of {results['images']:,} images at "
        f"{config['pixels']} px, {seeds}, {results['val_images']:,} test images."
    )


def names_of(results: dict[str, Any], kind: str) -> list[str]:
    """Arms of a kind: `stored`, or with several teachers `stored:A`, `stored:B`, `stored:A+B`; then further arms."""
    names = dict.fromkeys(arm["name"] for arm in results["arms"])
    return [name for name in names if name.partition(":")[0] == kind]


def headline(results: dict[str, Any]) -> tuple[str, str]:
    """The main stored and online arms; with two teachers those of both."""
    first = results["differences"][0]
    return first["arm"], first["minus"]


def _table(results: dict[str, Any]) -> list[list[str]]:
    """A header and a row for each arm: the mean over seeds, and the standard deviation if there are several."""
    rows = [list(_COLUMNS)]
    own = any("top1" in arm for arm in results["arms"])
    if own:
        rows[0].insert(1, "top-1")
    kinds = ("teacher", "online", "stored", "relabel", "labels", "alone", "untrained")
    for name in [name for kind in kinds for name in names_of(results, kind)]:
        arms = [arm for arm in results["arms"] if arm["name"] == name]
        scores = (*(["top1"] if own else []), "knn_top1", "linear_top1", "map_at_r")
        cells = [name, *(_mean(arms, key, "{:.2f}") for key in scores)]
        cells += [_mean(arms, "train_seconds", "{:.0f}"), _per_epoch(arms), _mean(arms, "data_wait", "{:.0%}")]
        forwards = arms[0]["teacher_forwards"]
        cells += ["" if forwards is None else f"{forwards:,}", _mean(arms, "peak_memory_bytes", "{:.0f} MB", 1e-6)]
        rows.append(cells)
    return rows


def _mean(arms: Sequence[dict[str, Any]], key: str, form: str, factor: float = 1) -> str:
    if any(arm.get(key) is None for arm in arms):
        return ""
    values = [arm[key] for arm in arms]
    mean = form.format(factor * statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(factor * statistics.stdev(values))}"


def _per_epoch(arms: Sequence[dict[str, Any]]) -> str:
    if arms[0]["train_seconds"] is None:
        return ""
    return _mean([{"seconds": arm["train_seconds"] / arm["epochs"]} for arm in arms], "seconds", "{:.2f}")


def _markdown(table: Sequence[Sequence[str]]) -> list[str]:
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return [head, f"|{'---|' * len(table[0])}", *rows]


def _verdict(difference: dict[str, Any]) -> str:
    """What the interval of a difference shows, in words."""
    if difference["equal"]:
        return "equal within 1.5 points"
    if difference["low"] > 0 or difference["high"] < 0:
        return "better" if difference["low"] > 0 else "worse"
    return "not worse by 1.5 points, not shown equal" if difference["low"] >= -1.5 else "not shown equal within 1.5 points"


def _findings(results: dict[str, Any]) -> list[str]:
    """The findings, a sentence each; each difference with its interval."""
    lines = []
    for pair in results["differences"]:
        for probe, name in PROBE_NAMES.items():
            if probe not in pair:
                continue
            d = pair[probe]
            lines.append(
                f"{name}, {pair['arm']} minus {pair['minus']}: {d['difference']:+.2f} points, 90 % paired-bootstrap interval "
                f"{d['low']:+.2f} to {d['high']:+.2f}: {_verdict(d)}."
            )
    stored, online = headline(results)
    seconds = {
        name: statistics.mean(arm["train_seconds"] for arm in results["arms"] if arm["name"] == name)
        for name in (stored, online)
    }
    lines.append(
        f"Training on stored targets takes {seconds[stored] / seconds[online]:.2f} of online's time "
        f"({seconds[online] / seconds[stored]:.2f} times as fast)."
    )
    lines.append(_cost(results, stored))
    for name, store in results["stores"].items():
        if store["crops"] is None:
            took = "" if store["seconds"] is None else f", made in {format_duration(store['seconds'])}"
            each = store["bytes"] / results["images"]
            lines.append(f"The label maps of {name}: {format_bytes(store['bytes'])} ({each:.0f} bytes an image){took}.")
        elif name not in (stored, *(pair["minus"] for pair in results["differences"][:3])):
            lines.append(f"The store of {name}: {_size(results, store)}.")
    lines.append(_reached(results, stored, online))
    if names_of(results, "alone"):
        lines.append(
            "The arm alone has no teacher: MoCo v2 (lightly's parts) for as many epochs as take the time of precomputing and "
            "of training on stored targets."
        )
    return lines


def _cost(results: dict[str, Any], stored: str) -> str:
    taken = results["precompute_seconds"]
    store = f"The store of {results['crops']} crops an image took {'? s' if taken is None else format_duration(taken)}"
    store += f" and {_size(results, results['stores'][stored])}"
    students, epochs = results["break_even_students"], results["break_even_epochs"]
    if taken is None:
        return f"{store}; its time is not known, since a run was killed while it was made: no break-even."
    if students is None:
        return f"{store}; online was not slower, so the store does not pay off."
    return (
        f"{store}; it has paid for itself after {students} student{'s' if students > 1 else ''}, or {epochs:.0f} epochs of "
        "students in all."
    )


def _size(results: dict[str, Any], store: dict[str, Any]) -> str:
    crops = results["images"] * store["crops"]
    return f"{format_bytes(store['bytes'])} ({store['bytes'] / crops:.0f} bytes a crop)"


def _reached(results: dict[str, Any], stored: str, online: str) -> str:
    reached, taken = results["reached"], results["precompute_seconds"]
    at = reached["seconds"]
    goal = f"kNN within 1.5 points of online's last ({reached['knn_top1']:.2f} %)"
    if at[stored] is None:
        return f"Not all trainings on stored targets reached {goal}."
    own = "" if at[online] is None else f"; online itself {format_duration(at[online])}"
    first = "" if taken is None else f" ({format_duration(at[stored] + taken)} with precompute)"
    return f"Training on stored targets reached {goal} after {format_duration(at[stored])}{first}{own}."


def _commands(results: dict[str, Any]) -> list[str]:
    """The command of the comparison and those of its trainings."""
    config, usual = results["config"], {f.name: f.default for f in dataclasses.fields(CompareConfig)}
    options = [f"--{k} {shlex.quote(str(v))}" for k, v in config.items() if k in usual and v != usual[k]]
    runs = dict.fromkeys((arm["name"], arm["seed"]) for arm in results["arms"] if arm["train_seconds"] is not None)
    of_runs = [(("pretrain" if name == "alone" else "train"), run_name(name, seed)) for name, seed in runs]
    return [
        f"fkd-ssl compare {' '.join(options)}",
        *(f"fkd-ssl {verb} --config {shlex.quote(config.get('out', ''))}/runs/{run}.yaml" for verb, run in of_runs),
    ]


def _sheet(folder: Path, draw: Callable[[Store], bytes] | None) -> bytes:
    """The contact sheet as PNG, drawn once; empty if there is none, or the store or the images have been removed."""
    if (folder / SHEET).exists():
        return (folder / SHEET).read_bytes()
    if draw is None or not (folder / "store").is_dir():
        return b""
    try:
        picture = draw(open_store(folder / "store"))
    except FkdError:
        return b""
    files.replace(folder / SHEET, picture)
    return picture
