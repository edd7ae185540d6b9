"""Where commands write: results to standard output, everything else to standard error.

Names, licences and paths may come from a stranger's store or checkpoint, so everything goes through `printable`.
"""

import json
import sys
from typing import Any

from fkd_ssl.text import printable

_muted = False


def mute() -> None:
    """From now on nothing is said or shown: of several processes of one command the first one speaks."""
    global _muted
    _muted = True


def say(message: str) -> None:
    """A line for the user, on standard error."""
    if not _muted:
        print(printable(message, encoding=sys.stderr.encoding), file=sys.stderr, flush=True)  # noqa: T201


def show(text: str) -> None:
    """The command's result, on standard output."""
    if not _muted:
        print(printable(text, encoding=sys.stdout.encoding), flush=True)  # noqa: T201


def show_json(value: dict[str, Any]) -> None:
    """The command's result as one JSON object on standard output."""
    show(json.dumps(value))


def table(rows: list[list[str]]) -> str:
    """Rows as aligned columns, the first row a heading."""
    rows = [[printable(cell, one_line=True) for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
