"""What sources of several files share: patterns such as `train-{0000..0146}.tar`, the order of names, classes from text."""

import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fkd_ssl.arrays import Int64Array
from fkd_ssl.errors import RequestError
from fkd_ssl.images.decoding import inaccessible

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MAX_FILES = 10**6
_MAX_NUMBER = 10**6  # largest class that is a number


def expand(pattern: str) -> list[str]:
    """Expands the braces of a pattern: `{008..123}` gives these numbers with leading zeros, and `{a,b}` gives a and b.

    Raises:
        RequestError: The pattern gives no name, or more than a million.
    """
    alternatives: list[list[str]] = []
    count = 1
    for k, part in enumerate(_BRACES.split(pattern)):
        values = [part]
        if k % 2:
            if span := _RANGE.fullmatch(part):
                first, last = int(span[1]), int(span[2])
                if last - first >= _MAX_FILES:
                    raise RequestError(f"{pattern}: names more than {_MAX_FILES:,} files")
                values = [f"{n:0{len(span[1])}d}" for n in range(first, last + 1)]
            else:
                values = part.split(",")
        count *= len(values)
        if not 0 < count <= _MAX_FILES:
            raise RequestError(f"{pattern}: names {'no files' if not count else f'more than {_MAX_FILES:,} files'}")
        alternatives.append(values)
    return ["".join(parts) for parts in itertools.product(*alternatives)]


def stamp_of(path: str | Path) -> tuple[str, float]:
    """Returns device, inode, size and times of a file, and the time of its last change. Raises ImageAccessError."""
    try:
        stat = os.stat(path)  # noqa: PTH116  (of a million files)
    except OSError as error:
        raise inaccessible(path, error) from error
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}", stat.st_ctime


def folder_of(lines: bytes) -> list[bytes]:
    """Returns the first folder of each name, which is its class; empty if it is in no folder."""
    count, folder = lines.count(b"\n"), lines[: lines.find(b"/") + 1]
    if not folder:
        return [b""] * count
    if lines.count(b"\n" + folder) == count - 1:  # most tars have one class, and this is fast
        return [folder[:-1]] * count
    return [line.partition(b"/")[0] if b"/" in line else b"" for line in lines.split(b"\n")[:-1]]


class _Numbers(dict[bytes, int]):
    """Numbers texts in the order of their first occurrence."""

    def __missing__(self, text: bytes) -> int:
        return self.setdefault(text, len(self))


def classes_of(texts: Iterable[Iterable[bytes]], names: list[str] | None = None) -> tuple[Int64Array, list[str]]:
    """Returns the label of each image [N] and the classes, from the name or number of each image's class, in several parts.

    An empty text gives the label -1. If all classes are numbers, these numbers are the labels, even if some classes have no
    images. Otherwise a label is the index of the class in alphabetical order, or in `names` if given.
    """
    numbers = _Numbers()
    codes = [np.fromiter(map(numbers.__getitem__, part), dtype=np.int32) for part in texts]
    distinct = [text.decode() for text in numbers]
    known = list(dict.fromkeys(names)) if names else sorted(text for text in distinct if text)
    if not names and known and all(text.isascii() and text.isdecimal() and text == str(int(text)) for text in known):
        highest = max(map(int, known))
        if highest <= _MAX_NUMBER:
            known = [str(number) for number in range(highest + 1)]
    index = {name: k for k, name in enumerate(known)}
    labels = np.array([index.get(text, -1) for text in distinct], dtype=np.int64)
    return labels[np.concatenate(codes)] if codes else labels, known
