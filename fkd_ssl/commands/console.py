"""Output of the commands: results to standard output, everything else to standard error.

Names, licences and paths may come from an untrusted store or checkpoint, so all text passes through `printable`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fkd_ssl.errors import ImageError
from fkd_ssl.text import printable

_muted = False


def silence() -> None:
    """Silences this process; if a command runs in several processes, only the first one prints."""
    global _muted
    _muted = True


def log(message: str) -> None:
    """Prints a line for the user on standard error."""
    if not _muted:
        print(printable(message, encoding=sys.stderr.encoding), file=sys.stderr, flush=True)  # noqa: T201


def print_result(text: str) -> None:
    """Prints the command's result on standard output."""
    if not _muted:
        print(printable(text, encoding=sys.stdout.encoding), flush=True)  # noqa: T201


def print_json(value: dict[str, Any]) -> None:
    """Prints the command's result on standard output as one JSON object."""
    print_result(json.dumps(value))


@contextmanager
def skipping(on_unreadable: str) -> Iterator[set[str] | None]:
    """Implements `--on_unreadable`: yields a set that collects the error messages of damaged images (skip), or None (stop).

    Reports the number of damaged images at the end.

    Raises:
        ImageError: An image is damaged and `on_unreadable` is `stop`, or all images are damaged.
    """
    skipped: set[str] | None = set() if on_unreadable == "skip" else None
    try:
        yield skipped
    except ImageError as error:
        if skipped is None:
            raise ImageError(f"{error}; remove it or pass --on_unreadable skip") from error
        raise
    if skipped:
        log(f"warning: {len(skipped)} images cannot be read and were skipped, for instance {min(skipped)}")


def table(rows: list[list[str]]) -> str:
    """Formats rows as aligned columns; the first row is the heading."""
    rows = [[printable(cell, one_line=True) for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
