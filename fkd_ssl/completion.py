"""Completion of verbs, options and choices in a shell, by argcomplete, which runs the program at each press of Tab."""

import argparse
import dataclasses
import os
import typing
from collections.abc import Iterable
from importlib import import_module


def complete(verbs: Iterable[str]) -> None:
    """Prints the completions of the command line in the environment and ends the process, if argcomplete is installed."""
    try:
        import argcomplete
    except ImportError:
        return
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    typed = os.environ.get("COMP_LINE", "").split()[1:2]
    for verb in verbs:
        command = commands.add_parser(verb)
        if [verb] == typed:
            _add_options(command, verb)
    argcomplete.autocomplete(parser)


def _add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """Adds the options of a verb, without jsonargparse, whose import would delay every completion."""
    module = import_module(f"fkd_ssl.commands.{verb.replace('-', '_')}")
    types, positionals = typing.get_type_hints(module.Config), getattr(module, "POSITIONALS", ())
    for name in positionals:
        parser.add_argument(name, nargs="?")
    parser.add_argument("--config")
    for field in dataclasses.fields(module.Config):
        if field.name in positionals:
            continue
        if types[field.name] is bool:
            parser.add_argument(f"--{field.name}", f"--no_{field.name}", action="store_true")
            continue
        kinds = (types[field.name], *typing.get_args(types[field.name]))
        choices = [choice for kind in kinds if typing.get_origin(kind) is typing.Literal for choice in typing.get_args(kind)]
        parser.add_argument(f"--{field.name}", choices=choices or None)
