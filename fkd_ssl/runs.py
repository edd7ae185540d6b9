"""Run folders: where a command writes its results, and what identifies a run.

A run is identified by its options (config.yaml) and by digests of its inputs (inputs.json). With the same options and inputs,
an unfinished run is resumed and the results of a finished run are shown; other options or inputs raise an error. Paths are not
compared, so inputs and run folders may be moved or copied.

Only one process at a time uses a run folder: the one that has locked the file `.lock` in it.

A config dataclass lists the fields that are not compared: `EXECUTION`, which change how a run is executed but not its
results, and `PATHS`, which are compared by the digests of their contents instead.
"""

import dataclasses
import json
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from fkd_ssl import files, locks, processes
from fkd_ssl.errors import FkdError, ImageError, RequestError
from fkd_ssl.images import CONTENTS
from fkd_ssl.options import declared, nested

CONFIG, INPUTS, RESULTS, LOCK = "config.yaml", "inputs.json", "results.json", ".lock"
_MAX_CONFIG = 2**16  # bytes
_WRITTEN = (".", "checkpoints", "scores")  # the folders of a run; only the process that holds the lock writes to them
_BEFORE_RESULTS = {CONFIG, INPUTS, "metrics.csv"}  # a run with only these files has no results: its inputs may still change
State = Literal["new", "resume", "done"]
Inputs = Mapping[str, str]
"""Digests of a run's inputs, by name. Two runs with the same config and the same inputs give the same results."""


def peek(out: str | Path, config: Any, inputs: Inputs | None = None) -> State:
    """Returns the state of the run folder `out`: new, to be resumed, or done (it has a results.json).

    Args:
        out: The run folder; it may be missing.
        config: A config dataclass.
        inputs: The run's inputs; None compares only the config.

    Raises:
        RequestError: The folder contains a run with another config or other inputs, or files that do not belong to a run, or
            another process is using it.
    """
    state = _state(Path(out), config, inputs)
    if state != "done" and (Path(out) / LOCK).exists() and not processes.rank()[0]:
        with _hold(Path(out)):
            pass
    return state


def _state(folder: Path, config: Any, inputs: Inputs | None) -> State:
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise RequestError(f"{place}: is a file; --out must name a folder")
    present = _names(folder)
    if not present:
        return "new"
    if not (folder / CONFIG).exists():
        raise RequestError(f"{folder}: exists and is not a run of fkd-ssl; choose another --out")
    check_config(folder, read_config(folder), config)
    if inputs is not None and not present <= _BEFORE_RESULTS:
        found = _read_inputs(folder)
        unknown = [name for name in inputs if name.startswith(CONTENTS) and name not in found]  # `forget_contents` was called
        check_inputs(folder, found, {name: value for name, value in inputs.items() if name not in unknown})
    return "done" if (folder / RESULTS).exists() else "resume"


@contextmanager
def open_run(out: str | Path, config: Any, inputs: Inputs | None) -> Iterator[tuple[Path, State]]:
    """Creates or reopens the run folder `out` and locks it until the block ends; yields the folder and its state.

    If a training has several processes, the first one holds the lock. A run that stopped at an unreadable image can continue
    after the image is repaired.

    Raises:
        RequestError: As in `peek`.
    """
    folder = Path(out)
    try:
        if processes.rank()[0]:
            yield folder, "resume"
            return
        _state(folder, config, inputs)  # before creating the folder
        folder.mkdir(parents=True, exist_ok=True)
        with _hold(folder):
            state = _state(folder, config, inputs)  # again, since another process may have written to the folder meanwhile
            if state == "new":
                files.replace(folder / CONFIG, to_yaml(config).encode())
            if state != "done":  # the contents of repaired images may have changed
                files.replace(folder / INPUTS, _json(inputs or {}))
            for name in _WRITTEN:
                files.remove_leftovers(folder / name, seconds=0)  # temporary files of a process that was killed
            yield folder, state
    except ImageError:
        forget_contents(folder)
        raise


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    with locks.locked(folder / LOCK, seconds=locks.PATIENCE) as ours:
        if not ours:
            raise RequestError(f"another process is using {folder}: wait until it ends, or choose another --out")
        yield


def require_held(folder: Path) -> None:
    """Raises FkdError if the run folder was removed or replaced since this process opened it."""
    if locks.is_lost(folder / LOCK):
        raise FkdError(f"{folder}: the run folder was removed or replaced while the run was writing to it; start the run again")


def read_config(out: str | Path) -> dict[str, Any]:
    """Returns the options in the config.yaml of the run folder `out`; empty if the file is missing or not valid."""
    try:
        values = yaml.safe_load(files.read_user_file(Path(out) / CONFIG, _MAX_CONFIG).decode(errors="replace"))
    except Exception:  # PyYAML raises many kinds of error on damaged text
        return {}
    found: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        found |= value if isinstance(value, dict) else {key: value}  # a section contributes its options
    # an option is one word or number; nested lists of YAML aliases could expand to more text than fits in memory
    return {} if any(isinstance(value, (dict, list, set)) for value in found.values()) else found


def check_config(place: Path, found: Mapping[str, Any], config: Any) -> None:
    """Raises RequestError if `found`, the options of the run in `place`, would give other results than `config`.

    An option missing from `found` has its default value, since a later version may have added it.
    """
    try:
        if not found:
            raise RequestError("its config.yaml cannot be read")
        if unknown := found.keys() - {field.name for field in dataclasses.fields(config)}:
            raise RequestError(f"this version has no option {sorted(map(str, unknown))[0]!r}")
        begun = type(config)(**found)
    except (TypeError, RequestError) as error:
        raise RequestError(f"{place}: holds a run of another config ({error}); choose another --out") from error
    execution, paths = (declared(type(config), attribute) for attribute in ("EXECUTION", "PATHS"))
    changes = []
    for name in (field.name for field in dataclasses.fields(config) if field.name not in execution):
        was, now = getattr(begun, name), getattr(config, name)
        if (was is None) != (now is None) if name in paths else was != now:
            changes.append(f"{name} is {was!r} there, {now!r} here")
    if changes:
        raise RequestError(f"{place}: holds a run of another config ({'; '.join(changes[:3])}); choose another --out")


def check_inputs(place: Path, found: Inputs, inputs: Inputs) -> None:
    """Raises RequestError if `found`, the inputs that the run in `place` began with, differ from `inputs`."""
    for name in {**found, **inputs}:
        was, now = found.get(name, "missing"), inputs.get(name, "missing")
        if was != now:
            raise RequestError(
                f"{place}: {name} changed since the run began (then {_short(was)}, now {_short(now)}); restore "
                "it, or choose another --out"
            )


def forget_contents(folder: Path) -> None:
    """Removes the digests of image contents from a run, so that it can continue after a damaged image is repaired."""
    if (folder / INPUTS).exists():
        kept = {name: value for name, value in _read_inputs(folder).items() if not name.startswith(CONTENTS)}
        files.replace(folder / INPUTS, _json(kept))


def identity(config: Any, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Returns what a checkpoint stores for `check_identity`. It omits image contents, so that images can be repaired."""
    kept = {name: value for name, value in inputs.items() if not name.startswith(CONTENTS)}
    return {"config": dataclasses.asdict(config), "inputs": kept}


def check_identity(checkpoint: Path, found: Any, config: Any, inputs: Inputs | None) -> None:
    """Raises RequestError if `found`, the `identity` in a checkpoint, is not that of a run with `config` and `inputs`."""
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("config", "inputs")):
        raise RequestError(f"{checkpoint}: has no config and inputs of its run; delete it to train from the start")
    check_config(checkpoint, found["config"], config)
    if inputs is not None:
        check_inputs(checkpoint, found["inputs"], identity(config, inputs)["inputs"])


def _names(folder: Path) -> set[str]:
    """Returns the names in a folder, without the lock and temporary files; empty if the folder is missing."""
    ours = (files.TEMPORARY, LOCK)
    return {path.name for path in folder.iterdir() if not path.name.startswith(ours)} if folder.exists() else set()


def _read_inputs(folder: Path) -> dict[str, str]:
    """Returns the values of a run folder's inputs.json."""
    try:
        return _read_json(folder / INPUTS)
    except RequestError as error:
        raise RequestError(f"{error}; restore it or choose another --out") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file of a run folder. Raises RequestError if it cannot be read."""
    try:
        value = json.loads(files.read_user_file(path, files.MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise RequestError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(values), indent=2) + "\n").encode()


def _short(value: Any) -> str:
    """Returns the text of an input with its long digests shortened."""
    return re.sub(r"([0-9a-f]{12})[0-9a-f]{52}", r"\1...", str(value))


def finish(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json, which marks the run as done, and adds the versions of the software to it.

    Raises:
        FkdError: As in `require_held`.
    """
    require_held(folder)
    files.replace(folder / RESULTS, _json({**results, "versions": versions()}))


def read_results(folder: Path) -> dict[str, Any]:
    """Returns the results.json of a finished run. Raises RequestError if the file is missing."""
    try:
        return _read_json(folder / RESULTS)
    except RequestError as error:
        raise RequestError(f"{error}; not a finished run") from error


def to_yaml(config: Any) -> str:
    """Returns the config as YAML, one key per line, in the order of its fields, with one section per group."""
    return yaml.safe_dump(nested(dataclasses.asdict(config), type(config)), sort_keys=False)


def versions() -> dict[str, str]:
    """Returns the versions of the software that results depend on."""
    names = ("fkd_ssl", "torch", "torchvision", "lightly", "pytorch_lightning", "faiss-cpu", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
