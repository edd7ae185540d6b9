"""The result of an evaluation, and with `out` its results.json with everything that affects the score."""

import dataclasses
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fkd_ssl import files, runs
from fkd_ssl.commands import console
from fkd_ssl.errors import RequestError
from fkd_ssl.results import Result, Score
from fkd_ssl.text import plural

CORRECT, COUNTS = "correct.npy", "counts.npy"
"""Files beside results.json: which images were correct, bool [n], or the counts of a segmentation, int64 [n, 3 C]."""


def finished(config: Any, inputs: runs.Inputs, name: str = CORRECT) -> tuple[dict[str, Any], Any, Path] | None:
    """Reads the results of this evaluation from `config.out`: its values, the array in the file `name`, and the folder.

    Returns None if the folder has no results yet.

    Raises:
        RequestError: The folder has another evaluation, this evaluation with other inputs, or other files.
    """
    if config.out is None or runs.peek(config.out, config, inputs) != "done":
        return None
    folder = Path(config.out)
    found = runs.read_results(folder)
    skipped = found.get("unreadable_images")
    more = f"; it skipped {plural(skipped, 'unreadable image')}" if skipped else ""
    console.log(f"{folder}: this evaluation is done{more}")
    return found, read_array(folder, name), folder


@contextmanager
def opened(config: Any, inputs: runs.Inputs) -> Iterator[None]:
    """Opens the run folder `config.out`, if given; call it after the request has been checked.

    Raises:
        RequestError: `finished` raises it, or another process is using the folder.
    """
    if config.out is None:
        yield
        return
    with runs.open_run(config.out, config, inputs):
        yield


def score(kind: str, title: str, config: Any, protocol: str, details: dict[str, Any], result: dict[str, Any]) -> Score:
    """Makes the result of an evaluation, and with `out` also writes it.

    Args:
        kind: Name of the command.
        title: Start of the line.
        config: Config of the command, with the `pixels` that were used.
        protocol: The protocol's name or settings.
        details: `model`, `data` and `transform`.
        result: `top1`, `top5`, `correct`, `baselines`, `notes` and other values of the evaluation.
    """
    from fkd_ssl.eval import baselines
    from fkd_ssl.eval.stats import wilson

    correct = result["correct"]
    low, high = wilson(int(correct.sum()), len(correct))
    if "draws" in result:
        line = f"{title}: top-1 {result['top1']:.2f} ± {result['top1_std']:.2f} %, top-5 {result['top5']:.2f} ± "
        line += f"{result['top5_std']:.2f} % (mean and deviation of {len(result['draws'])} draws)"
    else:
        line = f"{title}: top-1 {result['top1']:.2f} % (95 % interval {low:.2f} to {high:.2f}), top-5 {result['top5']:.2f} %"
    line += f"; {baselines.line(result['baselines'])}"
    said = {key: value for key, value in result.items() if key != "correct"}
    said["notes"] = [*result["notes"], *baselines.note(result["top1"], result["baselines"])]
    if "draws" not in result:
        said["interval95"] = [low, high]
    return Score.of(*finish({"kind": kind, "protocol": protocol, **details, **said}, line, config, CORRECT, correct))


def finish(value: dict[str, Any], line: str, config: Any, name: str, array: Any) -> tuple[dict[str, Any], Any, Path | None]:
    """Completes the values of an evaluation; with `out`, also writes results.json and the array. Returns as `finished`."""
    settings = dataclasses.asdict(config)
    whole = {"seed": settings.get("seed"), **value, "line": line, "config": settings}
    whole = json.loads(json.dumps(whole), parse_constant=str)  # JSON cannot represent an infinite temperature
    folder = None if config.out is None else Path(config.out)
    if folder is not None:
        buffer = io.BytesIO()
        np.save(buffer, array if array.ndim == 1 else array.reshape(len(array), -1))
        files.replace(folder / name, buffer.getvalue())
        runs.finish(folder, whole)
    return {**whole, "versions": runs.versions()}, array, folder


def show(result: Result, *, json: bool) -> None:
    """Prints a result: its line and notes, or all values as one JSON object."""
    if json:
        console.print_json(result.values)
        return
    for note in result.values.get("notes", []):
        console.log(f"note: {note}")
    console.print_result(result.line)


def read_array(folder: Path, name: str = CORRECT) -> Any:
    """Reads correct.npy, bool [n], or counts.npy, int64 [n, 3, C], of an evaluation; raises RequestError if it is invalid."""
    array = files.map_user_npy(folder / name, kinds="fiub")
    what = f"{folder / name}: holds {array.dtype} {list(array.shape)}, expected"
    if name == CORRECT and (array.dtype != np.bool_ or array.ndim != 1):
        raise RequestError(f"{what} one boolean for each image")
    if name == CORRECT:
        return array
    if array.dtype != np.int64 or array.ndim != 2 or array.shape[1] % 3 or not array.size:
        raise RequestError(f"{what} int64 [images, 3 times the classes]")
    return array.reshape(len(array), 3, -1)
