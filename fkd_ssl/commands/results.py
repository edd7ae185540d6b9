"""Output of an evaluation: a line or a JSON object, and with --out a results.json with everything that affects the score."""

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

CORRECT = "correct.npy"


def show_finished(config: Any, inputs: runs.Inputs) -> bool:
    """Shows the results of this evaluation if `config.out` already has them; returns whether it has.

    Raises:
        RequestError: The folder has another evaluation, this evaluation with other inputs, or other files.
    """
    if config.out is None or runs.peek(config.out, config, inputs) != "done":
        return False
    found = runs.read_results(Path(config.out))
    console.log(f"{config.out}: this evaluation is done")
    if config.json:
        console.print_json(found)
    else:
        console.print_result(found["line"])
    return True


@contextmanager
def opened(config: Any, inputs: runs.Inputs) -> Iterator[None]:
    """Opens the run folder `config.out`, if given; call it after the request has been checked.

    Raises:
        RequestError: `show_finished` raises it, or another process is using the folder.
    """
    if config.out is None:
        yield
        return
    with runs.open_run(config.out, config, inputs):
        yield


def show(kind: str, title: str, config: Any, protocol: str, about: dict[str, Any], result: dict[str, Any]) -> None:
    """Shows the result of an evaluation: a line, or with `--json` the full result with config and versions.

    Args:
        kind: Name of the command.
        title: Start of the line.
        config: Config of the command, with the `pixels` that were used.
        protocol: The protocol's name or settings.
        about: `model`, `data` and `transform`.
        result: `top1`, `top5`, `correct`, `notes` and other values of the evaluation.
    """
    from fkd_ssl.eval.stats import wilson

    correct = result["correct"]
    low, high = wilson(int(correct.sum()), len(correct))
    if "draws" in result:
        line = f"{title}: top-1 {result['top1']:.2f} ± {result['top1_std']:.2f} %, top-5 {result['top5']:.2f} ± "
        line += f"{result['top5_std']:.2f} % (mean and deviation of {len(result['draws'])} draws)"
    else:
        line = f"{title}: top-1 {result['top1']:.2f} % (95 % interval {low:.2f} to {high:.2f}), top-5 {result['top5']:.2f} %"
    said = {key: value for key, value in result.items() if key != "correct"}
    if "draws" not in result:
        said["interval95"] = [low, high]
    finish({"kind": kind, "protocol": protocol, **about, **said}, line, config, correct)


def finish(value: dict[str, Any], line: str, config: Any, correct: Any = None) -> None:
    """Shows `value` or `line`; with --out also writes results.json and correct.npy (which images were classified correctly)."""
    settings = dataclasses.asdict(config)
    whole = {"seed": settings.get("seed"), **value, "line": line, "config": settings}
    whole = json.loads(json.dumps(whole), parse_constant=str)  # JSON cannot represent an infinite temperature
    if config.out is not None:
        folder = Path(config.out)
        if correct is not None:
            buffer = io.BytesIO()
            np.save(buffer, correct)
            files.replace(folder / CORRECT, buffer.getvalue())
        runs.finish(folder, whole)
    if config.json:
        console.print_json({**whole, "versions": runs.versions()})
        return
    for note in value.get("notes", []):
        console.log(f"note: {note}")
    console.print_result(line)


def read_correct(folder: Path) -> Any:
    """Reads which images the evaluation in `folder` classified correctly, bool [n]; raises RequestError if unreadable."""
    correct = files.map_user_npy(folder / CORRECT, kinds="fiub")
    if correct.dtype != np.bool_ or correct.ndim != 1:
        raise RequestError(
            f"{folder / CORRECT}: holds {correct.dtype} {list(correct.shape)}, expected one boolean for each image"
        )
    return correct
