"""The command line. Each file of `fkd_ssl.commands` is one verb, with options from its config dataclass.

Errors are shown without a traceback. Heavy modules are imported only when a command needs them, so that `--help` is fast.
"""

import dataclasses
import errno
import importlib
import os
import re
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType, ModuleType
from typing import Any

from fkd_ssl import __version__, allocator, options, processes
from fkd_ssl.commands import console
from fkd_ssl.errors import FkdError, RequestError, did_you_mean
from fkd_ssl.text import is_url, printable

VERBS = {
    "demo": "run the whole pipeline on a generated image set, in minutes, without downloads",
    "teachers": "list known teachers; `teachers fetch NAME` downloads the weights of one",
    "pretrain": "pretrain a MoCo v2 or SwAV teacher on images",
    "cache": "copy images at a smaller size, for training on small crops",
    "plan": "show the size of a store in each codec before it is made",
    "precompute": "run a teacher on random crops of every image and store its targets",
    "inspect": "show the contents of a store",
    "show": "draw an image's stored crops and their nearest neighbours",
    "verify": "check a store's files, images and targets; --repair mends it",
    "subset": "copy part of a store: fewer crops, columns or images",
    "publish": "write a store to a URL, with a card, for others to train from",
    "pull": "copy a published store, or a part of it, into a folder",
    "recode": "convert stored targets to another codec, without the teacher",
    "import-fkd": "make a store from FKD's published label files",
    "export-fkd": "write a store's class probabilities as FKD's label files",
    "label-maps": "store ReLabel's label maps: a classifier's logits at each position of every image",
    "train": "train a student on stored targets, with an online teacher, or on labels",
    "export": "export a student's backbone to safetensors, for torchvision or timm, or to ONNX",
    "features": "compute the features of images once, for knn, linear and retrieve",
    "knn": "evaluate a model by k-nearest-neighbour classification",
    "linear": "evaluate a model by a linear probe",
    "segment": "evaluate a model's feature maps by semantic segmentation",
    "retrieve": "evaluate a model by image retrieval, or find the images most similar to a query",
    "report": "summarise the results of several evaluations in one table",
    "compare": "train and compare students of stored and online targets, with a report",
}
_SHARED = ("precompute", "train", "features", "label-maps")  # verbs that several processes of torchrun can share
_MAKE_STORES = ("plan", "precompute", "import-fkd")
_STOPPED = "stopped; repeat the command to continue"
_USAGE = "usage: fkd-ssl VERB [options]     (fkd-ssl VERB --help lists the options of a verb)"


def main(argv: list[str] | None = None) -> int:
    """Runs a command line. Returns 0 if it is done, 1 if the work or a check failed, and 2 if the request was wrong."""
    args = sys.argv[1:] if argv is None else argv
    if "_ARGCOMPLETE" in os.environ:
        from fkd_ssl import completion

        completion.complete(VERBS)
    verb = args[0] if args else "--help"
    if parent := os.environ.pop(processes.PARENT, None):
        processes.end_with_parent(int(parent))
    with _CtrlC(verb), console.printing():
        try:
            return _run(verb, args[1:]) if args else _run(verb, args) or 2
        except BaseException as error:
            return _status_of(verb, error)


def _run(verb: str, args: list[str]) -> int:
    if verb in ("-h", "--help", "help", "--version"):
        print(__version__ if verb == "--version" else _help(), flush=True)  # noqa: T201
        return 0
    if verb not in VERBS:
        raise RequestError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; fkd-ssl --help lists them")
    command = command_of(verb)
    config = parse(verb, command, args)
    if processes.rank()[1] > 1 and verb not in _SHARED:
        raise RequestError("runs in one process: start it without torchrun (WORLD_SIZE is over 1)")
    allocator.keep_freed_memory()
    status: int = command.run(config)
    return status


def _status_of(verb: str, error: BaseException) -> int:
    """Prints the error and returns the exit status. Raises the error again if the user cannot fix it."""
    if isinstance(error, FkdError):
        return _fail(verb, str(error), error.exit_status)
    if isinstance(error, KeyboardInterrupt):
        return _fail(verb, _STOPPED, 130)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the process that reads our output has ended
        return 0
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)
        advice = "; finished work is kept: fix this and repeat the command" if full else ""
        return _fail(verb, f"{where}{error.strerror or error}{advice}", 1)
    memory = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
    if memory or isinstance(error, MemoryError):
        return _fail(verb, "out of memory: choose a smaller --batch_size, --chunk_size or --pixels", 1)
    raise error


class _CtrlC:
    """Handles Ctrl-C during a command: raises KeyboardInterrupt, and raises it again if a destructor swallows it.

    During an import, Ctrl-C ends the process: a partly imported module can fail in any way later, and torch can abort Python.
    """

    def __init__(self, verb: str) -> None:
        self._verb = verb

    def __enter__(self) -> None:
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        main = threading.current_thread() is threading.main_thread()
        self._ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ours:
            signal.signal(signal.SIGINT, self._stop)

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._hook
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if any(of.f_code.co_filename == "<frozen importlib._bootstrap>" for of in _outward(frame)):
            sys.stdout.flush()
            os._exit(_fail(self._verb, _STOPPED, 130))
        raise KeyboardInterrupt

    def _unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            threading.Thread(target=self._send, daemon=True).start()
        else:
            self._hook(unraisable)

    def _send(self) -> None:
        """Sends SIGINT to the main thread once it has left `_unraisable`, which would swallow it too."""
        main, code = threading.main_thread().ident, _CtrlC._unraisable.__code__
        assert main is not None
        while any(of.f_code is code for of in _outward(sys._current_frames()[main])):
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def command_of(verb: str) -> ModuleType:
    """Returns the module of a verb."""
    return importlib.import_module(f"fkd_ssl.commands.{verb.replace('-', '_')}")


def parse(verb: str, command: ModuleType, args: list[str]) -> Any:
    """Returns the config dataclass of a command, built from its options and `--config` files.

    Raises:
        RequestError: An option or a key is unknown, missing or of the wrong type; the message names it.
    """
    import jsonargparse

    config: type = command.Config
    fields = {f.name: f for f in dataclasses.fields(config)}
    positionals = getattr(command, "POSITIONALS", ())
    helps, kinds = option_helps(config), typing.get_type_hints(config)
    mode = _yaml_in_sections(config)
    parser = jsonargparse.ArgumentParser(
        prog=f"fkd-ssl {verb}", description=command.__doc__, allow_abbrev=False, exit_on_error=False, parser_mode=mode
    )
    for name in positionals:
        default = fields[name].default
        optional: dict[str, Any] = {} if default is dataclasses.MISSING else {"nargs": "?", "default": default}
        if kinds[name] == list[str]:
            optional["nargs"] = "+"
        parser.add_argument(name, help=helps[name], **optional)
    configurable = bool(set(fields) - set(positionals) - {"json"})
    if configurable:
        parser.add_argument("--config", action="config", help="YAML file with options; the command line takes precedence.")
    flags = [name for name in fields if kinds[name] is bool]
    groups = options.groups_of(config) or {"": [name for name in fields if name not in positionals]}
    for title, names in groups.items():
        section = parser.add_argument_group(title, _summary(config.GROUPS[title])) if title else parser  # type: ignore[attr-defined]
        for name in names:
            default = fields[name].default
            if name in flags:
                section.add_argument(f"--{name}", action=jsonargparse.ActionYesNo, default=default, help=helps[name])
            elif default is dataclasses.MISSING:
                section.add_argument(f"--{name}", type=kinds[name], required=True, help=helps[name])
            else:
                section.add_argument(f"--{name}", type=kinds[name], default=default, help=helps[name])
    known = [*fields, *(f"no_{name}" for name in flags), *(["config", "print_config"] if configurable else []), "help"]
    for arg in args:
        option = arg.split("=", 1)[0]
        if option.startswith("--") and option[2:] not in known:
            raise RequestError(f"no option {option}{did_you_mean(option[2:], known, '--')}")
    try:
        values = parser.parse_args(args).as_dict()
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise RequestError(_explain(str(error), known, kinds, positionals)) from error
    except SystemExit:  # --help or --print_config
        sys.stdout.flush()  # raises BrokenPipeError here, not when the process ends
        raise
    check_values(verb, values)
    return config(**{name: values[name] for name in fields})


def check_values(verb: str, values: Mapping[str, Any]) -> None:
    """Raises RequestError if a seed is too large for the generators of torch and numpy, or an output is a URL."""
    if not 0 <= (seed := values.get("seed", 0)) < 2**63:
        raise RequestError(f"--seed {seed}: must be between 0 and 2^63 - 1")
    for name in ("out", "record", *(["store"] if verb in _MAKE_STORES else [])):
        if isinstance(value := values.get(name), str) and is_url(value):
            raise RequestError(f"--{name}: a URL; choose a local folder, and send a finished store with fkd-ssl publish")


def _yaml_in_sections(config: type) -> str:
    """Returns the parser mode of jsonargparse that reads and prints YAML in sections, one per group of options."""
    import jsonargparse
    import yaml

    mode, load = "yaml_in_sections", jsonargparse.get_loader("yaml")
    switches = {name for name, kind in typing.get_type_hints(config).items() if {"on", "off"} <= {*typing.get_args(kind)}}

    def read(text: str) -> Any:
        values = load(text)
        if not isinstance(values, dict):
            return values
        values = options.flat(values, config)
        for name in switches & values.keys():
            values[name] = {True: "on", False: "off"}.get(values[name], values[name])  # YAML reads on and off as booleans
        return values

    jsonargparse.set_loader(mode, read, (yaml.YAMLError,))
    jsonargparse.set_dumper(mode, lambda values: yaml.safe_dump(options.nested(values, config), sort_keys=False))
    return mode


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        f"fkd-ssl {__version__}: distil a self-supervised teacher into small models from stored crops and targets\n\n"
        f"{_USAGE}\n\n{verbs}\n\n"
        "Typical use: store a teacher's targets once with precompute, train any number of students on them with train, and\n"
        "evaluate them with knn and linear. --config FILE reads options from a YAML file; --print_config prints them."
    )


def option_helps(config: type) -> dict[str, str]:
    """Returns the help of each option: the docstring below its field."""
    import docstring_parser

    parents = [parent for parent in config.__mro__ if dataclasses.is_dataclass(parent)]
    return {p.arg_name: p.description or "" for kind in parents for p in docstring_parser.parse_from_object(kind).params}


def _summary(group: type) -> str:
    """Returns the first line of a group's docstring."""
    return (group.__doc__ or "").split("\n", 1)[0]


def _explain(message: str, known: list[str], kinds: dict[str, Any], positionals: Sequence[str]) -> str:
    """Rewrites a message of jsonargparse in the words of the command line."""
    message = " ".join(message.split())
    if match := re.search(r"(?:Option|Key|key) '([^']+)' is not (?:accepted|expected)", message):
        return f"no key {match[1]!r}{did_you_mean(match[1], known)}"
    if (match := re.search(r"Parser key \"([^\"]+)\":.* value: (.*)", message)) and match[1] in kinds:
        return f"--{match[1]} {match[2]}: expected {_words(kinds[match[1]])}"
    if match := re.search(r"arguments are required: (.*)", message):
        names = [name.upper() if name in positionals else f"--{name}" for name in match[1].split(", ")]
        return f"{' and '.join(names)} must be given"
    if match := re.search(r"argument (--\w+): expected one argument", message):
        return f"{match[1]}: its value is missing"
    if match := re.search(r"argument (--\w+)/(--\w+): ignored explicit argument", message):
        return f"{match[1]}: takes no value; write {match[1]} or {match[2]}"
    return message


def _words(kind: Any) -> str:
    """Describes the values that an option's type allows."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    words: list[str] = []
    for part in parts:
        if typing.get_origin(part) is typing.Literal:
            words += map(str, typing.get_args(part))
        elif part is not type(None):
            words.append({float: "a number", int: "a whole number", bool: "true or false", str: "text"}.get(part, str(part)))
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _fail(verb: str, message: str, status: int) -> int:
    text = printable(f"fkd-ssl {verb}: {message}", encoding=sys.stderr.encoding)
    print(text, file=sys.stderr)  # noqa: T201
    return status
