"""The report of a comparison: report.html (a single file that loads nothing), report.md, and the plots as PNGs."""

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
from fkd_ssl.eval import baselines
from fkd_ssl.store import Store, open_store
from fkd_ssl.text import format_bytes, format_duration, printable

PROBE_NAMES = {"knn_top1": "kNN", "linear_top1": "linear probe", "top1": "top-1 of its own classes"}
SHEET = "sheet.png"
SHEET_CAPTION = (
    "An image with the boxes of its first stored crops, and each crop with the crops of other images whose stored targets have "
    "the highest cosine similarity to its own"
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
_KINDS = ("teacher", "online", "stored", "relabel", "labels", "alone", "untrained")
_SENTENCES = {
    "equal": "{arm} and {minus} are equal within 1.5 points",
    "better": "{arm} is better than {minus}",
    "worse": "{arm} is worse than {minus}",
    "inconclusive": "inconclusive: {needed} to compare {arm} with {minus}",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A line of the verdict.

    Attributes:
        kind: `equal`, `better`, `worse` or `inconclusive`; `cost` for a line about time or space.
        sentence: What was found, without a full stop.
        detail: The numbers behind it.
    """

    kind: str
    sentence: str
    detail: str


def write(results: dict[str, Any], folder: Path, draw_sheet: Callable[[Store], bytes] | None = None) -> str:
    """Writes report.html, report.md and the plots next to the results.json of a comparison.

    Args:
        results: The content of results.json.
        folder: The comparison's folder.
        draw_sheet: Draws the contact sheet of a store as PNG; it may raise FkdError. None leaves the sheet out.

    Returns:
        As `text_of`.
    """
    import jinja2

    drawn, sheet, commands = plots.draw_all(results, folder), _sheet(results, folder, draw_sheet), _commands(results)
    text = text_of(results)
    config = {k: v for k, v in results["config"].items() if v not in (None, "") and k != "json"}
    page = [
        f"# {title(results)}",
        "",
        text,
        "",
        *(line for plot in drawn for line in (f"![{plot.caption}]({plot.name}.png)", "")),
        *([f"![{SHEET_CAPTION}]({SHEET})", ""] if sheet else []),
        "## Commands",
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
        title=title(results),
        what=what(results),
        verdict=verdict_of(results),
        tables=[_scores(results), _differences(results)],
        notes=_notes(results),
        plots=drawn,
        colours=plots.colours_of(results),
        commands=commands,
        config=config,
        versions=results["versions"],
        sheet=base64.b64encode(sheet).decode(),
        caption=SHEET_CAPTION,
    )
    files.replace(folder / "report.html", printable(html).encode())
    return text


def text_of(results: dict[str, Any]) -> str:
    """Returns the verdict and the tables as text."""
    lines = [what(results), "", *(f"- {line.sentence} ({line.detail})." for line in verdict_of(results)), ""]
    lines += [*_markdown(_scores(results)), "", *(f"- {note}" for note in _notes(results)), ""]
    return "\n".join([*lines, *_markdown(_differences(results))])


def title(results: dict[str, Any]) -> str:
    """Names the student, the teacher and the images."""
    config = results["config"]
    images, files_of = "/".join(Path(config["images"]).parts[-2:]), (config["checkpoint"] or "").split(",")
    weights = ", ".join(Path(file).name for file in files_of if file)
    return f"{config['student']} distilled from {config['teacher']}{f' ({weights})' if weights else ''} on {images}"


def what(results: dict[str, Any]) -> str:
    """Describes what was compared, in a sentence."""
    config = results["config"]
    seeds = f"{config['seeds']} seed{'s' if config['seeds'] > 1 else ''}"
    return (
        f"{config['epochs']:g} epochs of one crop of {results['images']:,} images at {config['pixels']} px, {seeds}, scored on "
        f"{results['val_images']:,} test images."
    )


def names_of(results: dict[str, Any], kind: str) -> list[str]:
    """Returns the arms of a kind: `stored`, or with two teachers `stored:A`, `stored:B`, `stored:A+B`; then further arms."""
    names = dict.fromkeys(arm["name"] for arm in results["arms"])
    return [name for name in names if name.partition(":")[0] == kind]


def headline(results: dict[str, Any]) -> tuple[str, str]:
    """Returns the main stored and online arms: with two teachers, those trained from both."""
    first = results["differences"][0]
    return first["arm"], first["minus"]


def verdict_of(results: dict[str, Any]) -> list[Verdict]:
    """Compares the main stored and online arms: scores, training time, cost of the store."""
    stored, online = headline(results)
    lines = _teachers(results)
    for probe, name in PROBE_NAMES.items():
        if difference := results["differences"][0].get(probe):
            kind = _judge(difference)
            sentence = f"{name}: {_SENTENCES[kind].format(arm=stored, minus=online, needed=_needed(difference))}"
            detail = f"{difference['difference']:+.2f} points, 90 % interval {_interval(difference)}"
            lines.append(Verdict(kind=kind, sentence=sentence, detail=detail))
    seconds = {
        name: statistics.mean(arm["train_seconds"] for arm in results["arms"] if arm["name"] == name)
        for name in (stored, online)
    }
    faster = f"speed: {stored} trains {seconds[online] / seconds[stored]:.2f} times as fast as {online}"
    lines.append(_cost(faster, f"{format_duration(seconds[stored])} instead of {format_duration(seconds[online])}"))
    return [*lines, _break_even(results, stored), _reached(results, stored, online)]


def _teachers(results: dict[str, Any]) -> list[Verdict]:
    """Says which teachers are no better than pixels, colours or chance."""
    lines = []
    for arm in results["arms"]:
        for probe, name in PROBE_NAMES.items() if arm["name"].partition(":")[0] == "teacher" else ():
            found = {baseline: scores[probe] for baseline, scores in results["baselines"].items() if probe in scores}
            for sentence in baselines.note(arm[probe], found, f"the {arm['name']}") if found else ():
                detail = "a student learns no more than its teacher knows"
                lines.append(Verdict(kind="worse", sentence=f"{name}: {sentence}", detail=detail))
    return lines


def _judge(difference: dict[str, Any]) -> str:
    """Says what the interval of a difference shows: `equal`, `better`, `worse` or `inconclusive`."""
    if difference["equal"]:
        return "equal"
    if difference["low"] > 0 or difference["high"] < 0:
        return "better" if difference["low"] > 0 else "worse"
    return "inconclusive"


def _needed(difference: dict[str, Any]) -> str:
    """Says what would make an inconclusive difference conclusive."""
    seeds = difference["more_seeds"]
    if seeds is None:
        return "more test images are needed"
    return f"about {seeds:,} more seed{'s are' if seeds > 1 else ' is'} needed"


def _interval(difference: dict[str, Any]) -> str:
    return f"{difference['low']:+.2f} to {difference['high']:+.2f}"


def _cost(sentence: str, detail: str) -> Verdict:
    return Verdict(kind="cost", sentence=sentence, detail=detail)


def _break_even(results: dict[str, Any], stored: str) -> Verdict:
    taken, store = results["precompute_seconds"], _size(results, results["stores"][stored])
    students, epochs = results["break_even_students"], results["break_even_epochs"]
    if taken is None:
        given = results["config"].get("store")
        why = "the store was made before the comparison" if given else "a run was killed while the store was made"
        return _cost(f"cost: break-even is unknown, because {why}", store)
    store = f"made in {format_duration(taken)}, {store}"
    if students is None:
        return _cost("cost: the store does not pay off, because online was not slower", store)
    total = f"{epochs:.0f} epochs of students in total"
    return _cost(f"cost: the store pays off after {students} student{'s' if students > 1 else ''}", f"{total}; {store}")


def _reached(results: dict[str, Any], stored: str, online: str) -> Verdict:
    reached, taken = results["reached"], results["precompute_seconds"]
    at = reached["seconds"]
    goal = f"within 1.5 points of {online}'s final kNN"
    if at[stored] is None:
        return _cost(f"time to online's accuracy: not every {stored} training came {goal}", f"{reached['knn_top1']:.2f} %")
    first = "" if taken is None else f"; {format_duration(at[stored] + taken)} including precomputing"
    own = "" if at[online] is None else f"; {online} itself: {format_duration(at[online])}"
    sentence = f"time to online's accuracy: {stored} came {goal} after {format_duration(at[stored])}"
    return _cost(sentence, f"{reached['knn_top1']:.2f} %{first}{own}")


def _scores(results: dict[str, Any]) -> list[list[str]]:
    """A header, and a row for each arm: the mean over seeds, with the standard deviation if there are several."""
    rows = [list(_COLUMNS)]
    own = any("top1" in arm for arm in results["arms"])
    scores = (*(["top1"] if own else []), "knn_top1", "linear_top1", "map_at_r")
    if own:
        rows[0].insert(1, "top-1")
    for name in [name for kind in _KINDS for name in names_of(results, kind)]:
        arms = [arm for arm in results["arms"] if arm["name"] == name]
        cells = [name, *(_mean(arms, key, "{:.2f}") for key in scores)]
        cells += [_mean(arms, "train_seconds", "{:.0f}"), _per_epoch(arms), _mean(arms, "data_wait", "{:.0%}")]
        forwards = arms[0]["teacher_forwards"]
        cells += ["" if forwards is None else f"{forwards:,}", _mean(arms, "peak_memory_bytes", "{:.0f} MB", 1e-6)]
        rows.append(cells)
    for name, label in baselines.NAMES.items():
        found = results["baselines"][name]
        cells = [f"{found[key]:.2f}" if key in found else "" for key in scores]
        rows.append([label, *cells, *[""] * (len(rows[0]) - 1 - len(cells))])
    return rows


def _differences(results: dict[str, Any]) -> list[list[str]]:
    """A header, and a row for each difference of two arms in a score."""
    rows = [["difference", "score", "points", "90 % interval", "verdict"]]
    for pair in results["differences"]:
        for probe, name in PROBE_NAMES.items():
            if d := pair.get(probe):
                kind = _judge(d)
                words = {"equal": "equal within 1.5 points", "inconclusive": f"inconclusive: {_needed(d)}"}.get(kind, kind)
                between = f"{pair['arm']} minus {pair['minus']}"
                rows.append([between, name, f"{d['difference']:+.2f}", _interval(d), words])
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


def _notes(results: dict[str, Any]) -> list[str]:
    """Explains the tables."""
    seeds, stored = results["config"]["seeds"], headline(results)[0]
    lines = [
        "kNN, linear and mAP@R are in percent, of backbone features of the test images."
        + (f" ± is the standard deviation over the {seeds} seeds." if seeds > 1 else ""),
        "The 90 % interval is a paired bootstrap over test images and seeds; two arms are equal if it is within ±1.5 points."
        + (" With one seed it leaves out the variance between seeds." if seeds == 1 else ""),
    ]
    lines.append("The last rows are baselines: the same probes on pixels and on colours, and the most frequent class (chance).")
    for name, store in results["stores"].items():
        if store["crops"] is None:
            took = "" if store["seconds"] is None else f", made in {format_duration(store['seconds'])}"
            each = store["bytes"] / results["images"]
            lines.append(f"Label maps of {name}: {format_bytes(store['bytes'])} ({each:.0f} bytes per image){took}.")
        elif name not in (stored, *(pair["minus"] for pair in results["differences"][:3])):
            lines.append(f"Store of {name}: {_size(results, store)}.")
    if names_of(results, "alone"):
        unknown = results["precompute_seconds"] is None
        time = "stored (the time of precomputing is unknown)" if unknown else "precomputing plus stored"
        lines.append(f"alone has no teacher: MoCo v2 (lightly's parts), trained for as long as {time}.")
    return lines


def _size(results: dict[str, Any], store: dict[str, Any]) -> str:
    count = store["crops"]
    each = (
        f"{count} crop{'s' if count > 1 else ''} per image, {store['bytes'] / (results['images'] * count):.0f} bytes per crop"
    )
    return f"{format_bytes(store['bytes'])}, {each}"


def _commands(results: dict[str, Any]) -> list[str]:
    """The command of the comparison and those of its trainings."""
    config, defaults = results["config"], {f.name: f.default for f in dataclasses.fields(CompareConfig)}
    options = [f"--{k} {shlex.quote(str(v))}" for k, v in config.items() if k in defaults and v != defaults[k]]
    runs = dict.fromkeys((arm["name"], arm["seed"]) for arm in results["arms"] if arm["train_seconds"] is not None)
    of_runs = [(("pretrain" if name == "alone" else "train"), run_name(name, seed)) for name, seed in runs]
    return [
        f"fkd-ssl compare {' '.join(options)}",
        *(f"fkd-ssl {verb} --config {shlex.quote(config.get('out', ''))}/runs/{run}.yaml" for verb, run in of_runs),
    ]


def _sheet(results: dict[str, Any], folder: Path, draw: Callable[[Store], bytes] | None) -> bytes:
    """The contact sheet as PNG, drawn only once; empty if it cannot be drawn: there is no store, or its images were removed."""
    if (folder / SHEET).exists():
        return (folder / SHEET).read_bytes()
    if draw is None:
        return b""
    try:
        picture = draw(open_store(results["config"].get("store") or folder / "store"))
    except FkdError:
        return b""
    files.replace(folder / SHEET, picture)
    return picture
