"""The names of images, stored as the lines of one text."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from fkd_ssl.arrays import Int64Array
from fkd_ssl.errors import RequestError

_PIECE = 2**18  # bytes
_LISTED = 10  # maximum number of names in a message


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
        self._ends = np.empty(self.lines.count(b"\n"), dtype=np.uint32)
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

    def positions(self, names: Iterable[str]) -> Int64Array:
        """Returns the index of each of `names` in this list, -1 if it is missing: int64 [len(names)]."""
        if isinstance(names, Names) and self == names:  # the common case, fast for a million names
            return np.arange(len(self), dtype=np.int64)
        where = {name: k for k, name in enumerate(self)}
        return np.array([where.get(name, -1) for name in names], dtype=np.int64)


def is_line(name: str) -> bool:
    """Whether a text file can store the name as one line: no control characters, line separators or lone surrogates."""
    return name.isprintable() or not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)


def refuse(spec: str | Path, names: Iterable[str], why: str) -> None:
    """Raises RequestError, which lists the first of the names, unless `names` is empty."""
    if wrong := sorted(names):
        some = "".join(f"\n  {name!r}" for name in wrong[:_LISTED])
        more = f"\n  and {len(wrong) - _LISTED:,} more" if len(wrong) > _LISTED else ""
        raise RequestError(f"{spec}: {len(wrong):,} names {why}; rename them:{some}{more}")
