"""Where commands write: results to standard output, everything else to standard error.

Names, licences and paths may come from a stranger's store or checkpoint, so everything goes through `printable`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fkd_ssl.errors import ImageError
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


@contextmanager
def skipping(on_unreadable: str) -> Iterator[set[str] | None]:
    """What `--on_unreadable` means: a set that takes the error message of each damaged image for `skip`, None for `stop`.

    Says at the end how many there were.

    Raises:
        ImageError: An image is damaged, with the advice to skip it, or all are.
    """
    skipped: set[str] | None = set() if on_unreadable == "skip" else None
    try:
        yield skipped
    except ImageError as error:
        if skipped is None:
            raise ImageError(f"{error}; remove it or pass --on_unreadable skip") from error
        raise
    if skipped:
        say(f"warning: {len(skipped)} images cannot be read and were skipped, for instance {min(skipped)}")


def table(rows: list[list[str]]) -> str:
    """Rows as aligned columns, the first row a heading."""
    rows = [[printable(cell, one_line=True) for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
