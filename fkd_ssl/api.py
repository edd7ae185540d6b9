"""The verbs of the command line as functions of the same options, which also take Python objects.

A config keeps an object as a `Named`: its name, which is written to config.yaml and results.json, with the object itself. A run
is identified by digests of its inputs, so a module with other weights under the same name is noticed.
"""

import dataclasses
import inspect
import os
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from fkd_ssl import allocator, cli, options, results
from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.options import OBJECT, Named

_OBJECTS = {
    "images": "an ImageSource",
    "gallery": "an ImageSource, or arrays (features, labels)",
    "queries": "an ImageSource, or arrays (features, labels)",
    "val": "an ImageSource, or arrays (features, labels)",
    "train": "an ImageSource, or arrays (features, labels)",
    "model": "a torch.nn.Module, or a function of ImageNet-normalised floats [B, 3, H, W] that returns features [B, F]",
    "teacher": "a torch.nn.Module, or a function of ImageNet-normalised floats [B, 3, H, W] that returns vectors [B, D]",
    "student": "a torch.nn.Module of ImageNet-normalised floats [B, 3, H, W] that returns features [B, F]",
    "init": "a torch.nn.Module",
}
"""Name of an option -> the Python objects that it also accepts."""
_LISTS = ("k", "temperature", "protocol", "teacher_weights", "lr_decay", "checkpoint", "column", "classes")
"""Options that accept several values, separated by commas on the command line."""
_LEFT_OUT = ("json",)  # a function returns all values


def _function(verb: str, returns: Any) -> Callable[..., Any]:
    command = cli.command_of(verb)
    names, hints, defaults = _names(command.Config), typing.get_type_hints(command.Config), _defaults(command.Config)

    def call(*args: Any, **given: Any) -> Any:
        if len(args) > 1 or (args and names[0] in given):
            raise RequestError(f"{verb}: takes one positional argument, {names[0]}; pass the other options by name")
        allocator.keep_freed_memory()
        return command.work(_config(verb, command.Config, {**dict(zip(names, args, strict=False)), **given}))

    call.__name__ = call.__qualname__ = verb
    call.__module__ = "fkd_ssl"
    objects = {} if verb == "compare" else _OBJECTS  # compare trains in other processes, which cannot receive objects
    call.__doc__ = _doc(command.__doc__ or "", cli.option_helps(command.Config), names, objects)
    kinds = [inspect.Parameter.POSITIONAL_OR_KEYWORD, *[inspect.Parameter.KEYWORD_ONLY] * (len(names) - 1)]
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, kind, default=defaults.get(name, inspect.Parameter.empty), annotation=hints[name])
            for name, kind in zip(names, kinds, strict=True)
        ],
        return_annotation=returns,
    )
    return call


def _names(config: type) -> list[str]:
    """Returns the options of a verb's function: those of the verb, except the ones for the command line only."""
    return [name for name in options.names_of(config) if name not in _LEFT_OUT]


def _defaults(config: type) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}


def _config(verb: str, config: type, given: dict[str, Any]) -> Any:
    """Makes the config of a verb.

    Raises:
        RequestError: An option is unknown, missing or of the wrong type.
    """
    names, hints = _names(config), typing.get_type_hints(config)
    for name in given:
        if name not in names:
            raise RequestError(f"{verb}: no option {name!r}{did_you_mean(name, names)}")
    if missing := [name for name in names if name not in given and name not in _defaults(config)]:
        raise RequestError(f"{verb}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} needed")
    pixels = given.get("teacher_pixels") or given.get("pixels")
    values = {}
    for name, value in given.items():
        if value is None and _defaults(config).get(name, "") is None:
            continue
        values[name] = _value(name, value, pixels if isinstance(pixels, int) else None)
        if not _fits(values[name], hints[name]) and isinstance(value, (int, float)) and _fits("", hints[name]):
            values[name] = str(value)  # such as shots=5
        if not _fits(values[name], hints[name]):
            raise RequestError(f"{verb}: {name} {value!r:.80}: expected {_words(name, hints[name])}")
    cli.check_values(verb, values)
    return config(**values)


def _value(name: str, value: Any, pixels: int | None) -> Any:
    """Converts the value of an option to the form in its config: paths and lists to text, objects to a `Named`."""
    if isinstance(value, results.Trained) and value.backbone is not None:
        return Named(str(value.out), value.student, value.pixels)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (bool, int, float, str)) or name not in (*_OBJECTS, *_LISTS):
        return value
    if not isinstance(value, (list, tuple)):
        return Named(_name_of(value), value, pixels)
    if len(value) == 2 and all(hasattr(one, "shape") for one in value):
        return Named(f"{OBJECT}arrays", value)
    if any(isinstance(one, (list, tuple)) for one in value):
        raise RequestError(f"{name}: found a list within a list; expected {_OBJECTS.get(name, 'values')}")
    parts = [_value(name, one, pixels) for one in value]
    for k, part in enumerate(parts):
        if isinstance(part, Named) and (before := sum(part == one for one in parts[:k])):  # two modules of one class
            parts[k] = Named(f"{part}-{before + 1}", part.value, part.pixels)
    text = ",".join(map(str, parts))
    return Named(text, parts) if any(isinstance(part, Named) for part in parts) else text


def _name_of(value: Any) -> str:
    """Returns the name of an object, for files and messages."""
    if hasattr(value, "spec") and hasattr(value, "names"):  # an ImageSource
        return str(value.spec)
    own = getattr(value, "__name__", type(value).__name__)
    return f"{OBJECT}{re.sub('[^A-Za-z0-9_]+', '', own) or 'function'}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an option."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is list:
        return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _words(name: str, hint: Any) -> str:
    """Describes the values that an option accepts, for messages."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    kinds = typing.get_args(hint) or (hint,)
    words = [_words(name, kind) if typing.get_origin(kind) else getattr(kind, "__name__", str(kind)) for kind in kinds]
    words = ["None" if word == "NoneType" else word for word in words]
    return " or ".join([*words, *([_OBJECTS[name]] if name in _OBJECTS else [])])


def _doc(text: str, helps: dict[str, str], names: list[str], objects: dict[str, str]) -> str:
    """Builds the docstring of a function from those of its command and of the config's fields."""
    lines = [text.strip(), "", "Args:"]
    for name in names:
        also = f" Or {objects[name]}." if name in objects else ""
        lines.append(f"    {name}: {' '.join(helps[name].split())}{also}")
    lines += ["", "Raises:", "    FkdError: The work or a check failed; RequestError if the request is wrong."]
    return re.sub(r"(?<![\w-])--([a-z_]+)", r"\1", "\n".join(lines))


precompute: Callable[..., results.Precomputed] = _function("precompute", results.Precomputed)
verify: Callable[..., results.Verified] = _function("verify", results.Verified)
show: Callable[..., results.Sheet] = _function("show", results.Sheet)
train: Callable[..., results.Trained] = _function("train", results.Trained)
export: Callable[..., results.Exported] = _function("export", results.Exported)
features: Callable[..., results.Features] = _function("features", results.Features)
knn: Callable[..., results.Score] = _function("knn", results.Score)
linear: Callable[..., Any] = _function("linear", results.Score | dict[str, results.Score])
segment: Callable[..., results.Segmentation] = _function("segment", results.Segmentation)
publish: Callable[..., results.Published] = _function("publish", results.Published)
pull: Callable[..., results.Copied] = _function("pull", results.Copied)
retrieve: Callable[..., Any] = _function("retrieve", results.Retrieval | results.Nearest)
compare: Callable[..., results.Compared] = _function("compare", results.Compared)

__all__ = [
    "compare",
    "export",
    "features",
    "knn",
    "linear",
    "precompute",
    "publish",
    "pull",
    "retrieve",
    "segment",
    "show",
    "train",
    "verify",
]
