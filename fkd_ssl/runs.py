"""Run folders: where a command writes. The same config resumes one, a finished one is left alone, others are refused."""

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from fkd_ssl import files
from fkd_ssl.errors import RequestError

CONFIG, RESULTS = "config.yaml", "results.json"
State = Literal["new", "resume", "done"]


def peek(out: str | Path, config: Any) -> State:
    """What the run folder `out` is to a config dataclass: new, to be resumed, or done (its results.json exists).

    How a run is run may change when it is continued, what it makes may not: the keys that a config names as `FREE` are not
    compared.

    Raises:
        RequestError: The folder holds another config's run, or files that are no run.
    """
    folder = Path(out)
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise RequestError(f"{place}: is a file; --out must name a folder")
    there = [path for path in folder.iterdir() if not path.name.startswith(files.TEMPORARY)] if folder.exists() else []
    if not there:
        return "new"
    if not (folder / CONFIG).exists():
        raise RequestError(f"{folder}: exists and is not a run of fkd-ssl; choose another --out")
    found, wanted = config_of(folder), _values(to_yaml(config))
    for key in getattr(config, "FREE", ()):
        found.pop(key, None)
        wanted.pop(key, None)
    if found != wanted:  # not their text: 100 and 100.0 are one number of epochs
        raise RequestError(f"{folder}: holds a run of another config ({difference(found, wanted)}); choose another --out")
    return "done" if (folder / RESULTS).exists() else "resume"


def config_of(out: str | Path) -> dict[str, Any]:
    """What the config.yaml of the run folder `out` says; nothing where there is none, or none that can be read."""
    try:
        return _values((Path(out) / CONFIG).read_text(errors="replace"))
    except OSError:
        return {}


def open_run(out: str | Path, config: Any) -> tuple[Path, State]:
    """Makes or re-opens the run folder `out`; returns it and what `peek` says of it, and raises as `peek` does."""
    folder, state = Path(out), peek(out, config)
    if state == "new":
        folder.mkdir(parents=True, exist_ok=True)
        files.replace(folder / CONFIG, to_yaml(config).encode())
    return folder, state


def finish(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json, which marks the run as done; the versions that made it are added."""
    files.replace(folder / RESULTS, (json.dumps({**results, "versions": versions()}, indent=2) + "\n").encode())


def read_results(folder: Path) -> dict[str, Any]:
    """The results.json of a finished run; raises RequestError where there is none."""
    try:
        results: dict[str, Any] = json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"{folder}: not a finished run: {RESULTS}: {error}") from error
    return results


def to_yaml(config: Any) -> str:
    """The config as YAML, one key a line, in the order of its fields."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first keys in which two configs differ, in words."""
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    return "; ".join(f"{key} is {found.get(key)!r} there, {wanted.get(key)!r} here" for key in keys[:3]) or "other keys"


def _values(text: str) -> dict[str, Any]:
    """A YAML file's keys; none where it is somebody else's file of another kind."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def versions() -> dict[str, str]:
    """Versions of what shapes a result."""
    names = ("fkd_ssl", "torch", "torchvision", "lightly", "pytorch_lightning", "faiss-cpu", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
