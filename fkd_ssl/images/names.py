"""The names of images, stored as the lines of one text."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from fkd_ssl.arrays import Int64Array
from fkd_ssl.errors import RequestError

_PIECE = 2**18  # bytes
_ROWS = 2**14  # names that are padded at a time
_MAX_PADDED = 2**28  # bytes
_PLAIN = bytes(range(32, 127)) + b"\n"
_LISTED = 10  # maximum number of names in a message
_EMPTY_PARTS = (b"\n/", b"//", b"/\n", b"\n\n")
_DOTS = (b"\n./", b"\n../", b"\n.\n", b"\n..\n", b"/./", b"/../", b"/.\n", b"/..\n")


class Names(Sequence[str]):
    """A list of names. It stores them as bytes and decodes a name when it is read, so millions of names take little memory.

    Forked processes share the memory, since reading a name writes nothing. Reading a list of strings writes reference counts.

    Args:
        names: Names without newlines, or the bytes of their lines, each of which ends with a newline.

    Attributes:
        lines: The bytes of all lines.
    """

    def __init__(self, names: Iterable[str] | bytes) -> None:
        self.lines = names if isinstance(names, bytes) else "".join(f"{name}\n" for name in names).encode()
        self._ends = np.empty(self.lines.count(b"\n"), dtype=np.uint32 if len(self.lines) < 2**32 else np.uint64)
        values, found = np.frombuffer(self.lines, dtype=np.uint8), 0
        for first in range(0, len(self.lines), _PIECE):  # in pieces, so that no temporary array is larger than the lines
            here = np.flatnonzero(values[first : first + _PIECE] == ord("\n"))
            self._ends[found : found + len(here)] = here + first
            found += len(here)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        k = range(len(self))[index]
        start = int(self._ends[k - 1]) + 1 if k else 0
        return self.lines[start : int(self._ends[k])].decode()

    def __iter__(self) -> Iterator[str]:
        return (self[k] for k in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self.lines == other.lines
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # compared like a list, and so not hashable

    def order(self) -> tuple[Int64Array | None, Int64Array]:
        """Returns the order that sorts the names [N], None if they are sorted, and the indices of repeated names.

        The order is that of the code points. Of equal names, the first is not among the repeated ones.
        """
        parts = (self._padded(first, min(first + _ROWS + 1, len(self))) for first in range(0, len(self), _ROWS))
        if all((part[1:] > part[:-1]).all() for part in parts):
            return None, np.zeros(0, dtype=np.int64)
        values = self._padded(0, len(self))
        order = np.argsort(values, kind="stable")
        values = values[order]
        return order, order[1:][values[1:] == values[:-1]]

    def take(self, order: Int64Array) -> "Names":
        """Returns the names at these indices."""
        starts = np.concatenate([[0], self._ends[:-1].astype(np.int64) + 1])[order].tolist() if len(self) else []
        ends = (self._ends[order].astype(np.int64) + 1).tolist()
        return Names(b"".join(self.lines[start:end] for start, end in zip(starts, ends, strict=True)))

    def _padded(self, first: int, end: int) -> npt.NDArray[Any]:
        """Returns some names in UTF-8, whose order is that of the code points; of one size unless a name is very long."""
        start = int(self._ends[first - 1]) + 1 if first else 0
        lengths = np.diff(self._ends[first:end].astype(np.int64), prepend=start - 1) - 1
        width, size = int(lengths.max(initial=1)), int(self._ends[end - 1]) + 1 - start if end > first else 0
        if width * len(lengths) > max(_MAX_PADDED, 4 * size):
            return np.array(self.lines[start : start + size].split(b"\n")[:-1], dtype=object)
        values, lines = np.zeros((len(lengths), width), dtype=np.uint8), np.frombuffer(self.lines, dtype=np.uint8)
        for k in range(0, len(lengths), _ROWS):  # in pieces, so that the temporary arrays are small
            part = lengths[k : k + _ROWS]
            stop = start + int(part.sum()) + len(part)
            text = lines[start:stop]
            values[k : k + _ROWS][np.arange(width) < part[:, None]] = text[text != ord("\n")]
            start = stop
        return values.view(f"S{width}")[:, 0]

    def positions(self, names: Iterable[str]) -> Int64Array:
        """Returns the index of each of `names` in this list, -1 if it is missing: int64 [len(names)]."""
        if isinstance(names, Names) and self == names:  # the common case, fast for a million names
            return np.arange(len(self), dtype=np.int64)
        where = {name: k for k, name in enumerate(self)}
        return np.array([where.get(name, -1) for name in names], dtype=np.int64)


def has_bad_parts(lines: bytes) -> bool:
    """Whether one of the names, one per line, is empty or absolute, or has an empty part or one that is '.' or '..'.

    It searches for plain strings, since a regular expression takes 1.5 seconds for a million lines.
    """
    first = b"\n" + lines[:_PIECE]  # for the first line; not a copy of all
    texts = (first, lines)
    if any(part in text for part in _EMPTY_PARTS for text in texts):
        return True
    dotted = [text for text in texts if b"\n." in text or b"/." in text]
    return any(part in text for part in _DOTS for text in dotted)


def is_plain(lines: bytes) -> bool:
    """Whether all names consist of printable ASCII characters. Such names are valid lines and in Unicode's NFC form."""
    return not any(lines[k : k + _PIECE].translate(None, _PLAIN) for k in range(0, len(lines), _PIECE))


def is_line(name: str) -> bool:
    """Whether a text file can store the name as one line: no control characters, line separators or lone surrogates."""
    return name.isprintable() or not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)


def refuse(spec: str | Path, names: Iterable[str], why: str) -> None:
    """Raises RequestError, which lists the first of the names, unless `names` is empty."""
    if wrong := sorted(names):
        some = "".join(f"\n  {name!r}" for name in wrong[:_LISTED])
        more = f"\n  and {len(wrong) - _LISTED:,} more" if len(wrong) > _LISTED else ""
        raise RequestError(f"{spec}: {len(wrong):,} names {why}; rename them:{some}{more}")
