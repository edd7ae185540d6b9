"""Config dataclasses with groups of options. A YAML file has one section per group; Python and the command line have none."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from fkd_ssl.errors import RequestError, did_you_mean

OBJECT = "object:"
"""Prefix of the names of Python objects."""


class Named(str):
    """The name of a Python object in a config. It holds the object, but copies, files and other processes get the name only.

    Attributes:
        value: The object; a list of names for several objects.
        pixels: Side of the images that a network is used at, if it was given.
    """

    value: Any
    pixels: int | None

    def __new__(cls, name: str, value: Any, pixels: int | None = None) -> Self:
        """Makes the name."""
        named = super().__new__(cls, name)
        named.value, named.pixels = value, pixels
        return named

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


def names_of(config: type) -> list[str]:
    """Returns the names of the options of a config dataclass, in the order of its groups."""
    groups = groups_of(config)
    return [name for names in groups.values() for name in names] or [field.name for field in dataclasses.fields(config)]


def groups_of(config: type) -> dict[str, list[str]]:
    """Returns the names of the options in each group of a config dataclass; empty if it has no groups."""
    return {name: [f.name for f in dataclasses.fields(group)] for name, group in getattr(config, "GROUPS", {}).items()}


def declared(config: type, attribute: str) -> set[str]:
    """Returns the option names that a config dataclass and its groups list in a class attribute."""
    return {name for parent in config.__mro__ for name in parent.__dict__.get(attribute, ())}


def nested(values: Mapping[str, Any], config: type) -> dict[str, Any]:
    """Sorts flat values into sections, one per group, in the order of the groups."""
    groups = groups_of(config)
    if not groups:
        return dict(values)
    return {group: {name: values[name] for name in names if name in values} for group, names in groups.items()}


def flat(values: Mapping[str, Any], config: type) -> dict[str, Any]:
    """Takes values out of their sections; the inverse of `nested`.

    Raises:
        RequestError: A key is unknown or in the wrong section; the message says where it belongs.
    """
    groups = groups_of(config)
    if not groups:
        return dict(values)
    home = {name: group for group, names in groups.items() for name in names}
    found: dict[str, Any] = {}
    for group, section in values.items():
        if group not in groups or not isinstance(section, (dict, type(None))):
            if group in home:
                raise RequestError(f"key {group!r}: belongs in the section {home[group]!r}; indent it below {home[group]}:")
            if group in groups:
                raise RequestError(f"section {group!r}: expected options below it, found {section!r}")
            raise RequestError(f"no section {group!r}{did_you_mean(str(group), groups)}; there are {', '.join(groups)}")
        for name, value in (section or {}).items():
            if name not in home:
                raise RequestError(f"no key {name!r} in the section {group!r}{did_you_mean(str(name), home)}")
            if home[name] != group:
                raise RequestError(f"key {name!r}: belongs in the section {home[name]!r}, not in {group!r}")
            found[name] = value
    return found
