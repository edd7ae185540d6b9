"""Run folders: where a command writes its results, and what identifies a run.

A run is identified by its options (config.yaml) and by digests of its inputs (inputs.json). The same options and inputs resume
an unfinished run and show a finished one; others are refused. Paths are not compared: inputs and run folders may be moved,
copied or written in another way.

One process at a time uses a run folder: it holds the lock of the file `.lock` in it.

A config dataclass names its fields that are not compared: `EXECUTION`, which say how a run is executed and not what it
computes, and `PATHS`, whose contents are compared by digest instead.
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
_WRITTEN = (".", "checkpoints", "scores")  # the folders of a run that only the process that holds its lock writes to
_BEFORE_RESULTS = {CONFIG, INPUTS, "metrics.csv"}  # a run with nothing else has saved nothing yet: its inputs may still change
State = Literal["new", "resume", "done"]
Inputs = Mapping[str, str]
"""What a run reads, by name, each with its digest: two runs of the same config and the same inputs give the same results."""


def peek(out: str | Path, config: Any, inputs: Inputs | None = None) -> State:
    """The state of the run folder `out`: new, to be resumed, or done (it has a results.json).

    Args:
        out: The run folder; it may be missing.
        config: A config dataclass.
        inputs: What the run reads; None compares the config alone.

    Raises:
        RequestError: The folder has a run of another config or of other inputs, or files that are not a run's, or another
            process is using it.
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
    """Creates or reopens the run folder `out` and locks it until the block ends; yields it and its state.

    Of several processes of one training the first one holds the lock. A run that an unreadable image ends can continue when
    the image is repaired.

    Raises:
        RequestError: As `peek`.
    """
    folder = Path(out)
    try:
        if processes.rank()[0]:
            yield folder, "resume"
            return
        _state(folder, config, inputs)  # before a folder is made
        folder.mkdir(parents=True, exist_ok=True)
        with _hold(folder):
            state = _state(folder, config, inputs)  # again: another process may have written to it meanwhile
            if state == "new":
                files.replace(folder / CONFIG, to_yaml(config).encode())
            if state != "done":  # the contents of repaired images may be new
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
    """Raises FkdError if the run folder was removed, or replaced by another, since this process opened it."""
    if locks.is_lost(folder / LOCK):
        raise FkdError(f"{folder}: the run folder was removed or replaced while the run was writing to it; start the run again")


def read_config(out: str | Path) -> dict[str, Any]:
    """The options by name in the config.yaml of the run folder `out`; empty if there is none, or it is not one of ours."""
    try:
        values = yaml.safe_load(files.read_user_file(Path(out) / CONFIG, _MAX_CONFIG).decode(errors="replace"))
    except Exception:  # PyYAML raises many kinds of error on damaged text
        return {}
    found: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        found |= value if isinstance(value, dict) else {key: value}  # of a section, its options
    # an option is one word or number: a list of lists of aliases has more text than fits in memory
    return {} if any(isinstance(value, (dict, list, set)) for value in found.values()) else found


def check_config(place: Path, found: Mapping[str, Any], config: Any) -> None:
    """Raises RequestError if `found`, the options of the run in `place`, give other results than `config`.

    An option that `found` lacks has its default: a later version may have added it.
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
    """Raises RequestError if `found`, what the run in `place` began with, are not these inputs; the message names one."""
    for name in {**found, **inputs}:
        was, now = found.get(name, "missing"), inputs.get(name, "missing")
        if was != now:
            raise RequestError(
                f"{place}: {name} changed since the run began (then {_short(was)}, now {_short(now)}); restore what it began "
                "with, or choose another --out"
            )


def forget_contents(folder: Path) -> None:
    """Lets a run continue with images of other contents, since one was damaged."""
    if (folder / INPUTS).exists():
        kept = {name: value for name, value in _read_inputs(folder).items() if not name.startswith(CONTENTS)}
        files.replace(folder / INPUTS, _json(kept))


def identity(config: Any, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """What a checkpoint keeps of its run, for `check_identity`: a damaged image may be repaired, so no contents."""
    kept = {name: value for name, value in inputs.items() if not name.startswith(CONTENTS)}
    return {"config": dataclasses.asdict(config), "inputs": kept}


def check_identity(checkpoint: Path, found: Any, config: Any, inputs: Inputs | None) -> None:
    """Raises RequestError if a checkpoint, whose `identity` is `found`, is not of the run of `config` and `inputs`."""
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("config", "inputs")):
        raise RequestError(f"{checkpoint}: does not say which run it is of; delete it to train from the start")
    check_config(checkpoint, found["config"], config)
    if inputs is not None:
        check_inputs(checkpoint, found["inputs"], identity(config, inputs)["inputs"])


def _names(folder: Path) -> set[str]:
    """The names in a folder that may be missing, without the lock and temporary files."""
    ours = (files.TEMPORARY, LOCK)
    return {path.name for path in folder.iterdir() if not path.name.startswith(ours)} if folder.exists() else set()


def _read_inputs(folder: Path) -> dict[str, str]:
    """The inputs.json of a run folder."""
    try:
        return _read_json(folder / INPUTS)
    except RequestError as error:
        raise RequestError(f"{error}; restore it or choose another --out") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run folder; raises RequestError if it cannot be read."""
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
    """The text of an input with its digests cut, which are long."""
    return re.sub(r"([0-9a-f]{12})[0-9a-f]{52}", r"\1...", str(value))


def finish(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json, which marks the run as done; the versions that made it are added.

    Raises:
        FkdError: As `require_held`.
    """
    require_held(folder)
    files.replace(folder / RESULTS, _json({**results, "versions": versions()}))


def read_results(folder: Path) -> dict[str, Any]:
    """The results.json of a finished run; raises RequestError if there is none."""
    try:
        return _read_json(folder / RESULTS)
    except RequestError as error:
        raise RequestError(f"{error}; not a finished run") from error


def to_yaml(config: Any) -> str:
    """The config as YAML, one key a line, in the order of its fields or in sections if it has groups."""
    return yaml.safe_dump(nested(dataclasses.asdict(config), type(config)), sort_keys=False)


def versions() -> dict[str, str]:
    """Versions of the software that results depend on."""
    names = ("fkd_ssl", "torch", "torchvision", "lightly", "pytorch_lightning", "faiss-cpu", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
