"""Where commands write: results to standard output, everything else to standard error."""

import json
import sys
from typing import Any

_muted = False


def mute() -> None:
    """From now on nothing is said or shown: of several processes of one command the first one speaks."""
    global _muted
    _muted = True


def say(message: str) -> None:
    """A line for the user, on standard error."""
    if not _muted:
        print(message, file=sys.stderr, flush=True)  # noqa: T201


def show(text: str) -> None:
    """The command's result, on standard output."""
    if not _muted:
        print(text, flush=True)  # noqa: T201


def show_json(value: dict[str, Any]) -> None:
    """The command's result as one JSON object on standard output."""
    show(json.dumps(value))


def table(rows: list[list[str]]) -> str:
    """Rows as aligned columns, the first row a heading."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
