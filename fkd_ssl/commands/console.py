"""Output of the commands: results to standard output, everything else to standard error.

Lines that are not results go to the logger `fkd_ssl`. The command line prints them; in a library call they appear only if the
user configures logging.

Names, licences and paths may come from an untrusted store or checkpoint, so all text passes through `printable`.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fkd_ssl import processes
from fkd_ssl.errors import ImageError
from fkd_ssl.text import plural, printable

_logger = logging.getLogger("fkd_ssl")
_logger.addHandler(logging.NullHandler())  # without a handler, Python prints the warnings


def log(message: str) -> None:
    """Logs a line for the user; if a command runs in several processes, only in the first one."""
    if not processes.rank()[0]:
        _logger.log(logging.WARNING if message.startswith("warning:") else logging.INFO, "%s", message)


class _Printer(logging.Handler):
    """Prints the lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(record.getMessage(), encoding=sys.stderr.encoding), file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def printing() -> Iterator[None]:
    """Prints the lines of `log` while the block runs."""
    printer, level = _Printer(), _logger.level
    _logger.addHandler(printer)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False  # other libraries may print what reaches the root logger
    try:
        yield
    finally:
        _logger.removeHandler(printer)
        _logger.propagate = True
        _logger.setLevel(level)


def print_result(text: str) -> None:
    """Prints the command's result on standard output; if it runs in several processes, only in the first one."""
    if not processes.rank()[0]:
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
        log(f"warning: skipped {plural(len(skipped), 'unreadable image')}, for instance {min(skipped)}")


def table(rows: list[list[str]]) -> str:
    """Formats rows as aligned columns; the first row is the heading."""
    rows = [[printable(cell, one_line=True) for cell in row] for row in rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
