"""Files of many images, on a local disk or in an object store. The latter are fetched into the cache folder."""

import glob
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from fkd_ssl import fetching
from fkd_ssl.errors import RequestError
from fkd_ssl.fetching import RemoteFile
from fkd_ssl.images.decoding import open_file
from fkd_ssl.images.patterns import expand, stamp_of
from fkd_ssl.prefetcher import Prefetcher
from fkd_ssl.text import is_url

_LISTERS = 16  # threads that ask for sizes


class Shard(Protocol):
    """A file of many images."""

    @property
    def name(self) -> str:
        """Path or URL, for messages."""

    def stamp(self) -> tuple[str, float]:
        """Returns a value that changes when the file changes, and the time of the last change."""

    def open(self) -> BinaryIO:
        """Opens the file, after it is fetched. Raises ImageAccessError if it cannot be read or fetched."""

    def path(self) -> Path:
        """Returns the local file. Raises as `open` does."""


@dataclass(frozen=True)
class LocalShard:
    """A file on a local disk."""

    file: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.file)

    def stamp(self) -> tuple[str, float]:
        """Returns device, inode, size and times of the file. Raises ImageAccessError if it is missing."""
        return stamp_of(self.file)

    def open(self) -> BinaryIO:
        """Opens the file. Raises ImageAccessError if it cannot be read."""
        return open_file(self.file)

    def path(self) -> Path:
        """Returns the file. Raises as `open` does."""
        self.open().close()  # pyarrow would wait for the writer of a pipe
        return self.file


def open_shards(pattern: str) -> list[Shard]:
    """Returns the files that a pattern names, in order: paths or URLs with braces (`{000..146}`, `{a,b}`) and `*`.

    Raises:
        RequestError: A file is missing, or none matches; a URL has credentials; the library for a kind of URL is missing.
        ImageAccessError: The server does not answer, or refuses access.
    """
    if is_url(pattern):
        fetching.check_url(pattern)
        names = expand(pattern)
        with ThreadPoolExecutor(_LISTERS) as pool:
            return [shard for shards in pool.map(fetching.list_remote, names) for shard in shards]
    if os.path.exists(pattern):  # noqa: PTH110  (False for a pattern that is too long for a name)
        return [LocalShard(Path(pattern))]
    found: list[Shard] = []
    for name in expand(pattern):
        paths = sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207  (keeps the pattern's spelling)
        if not paths or not all(map(os.path.isfile, paths)):
            raise RequestError(f"{name}: no such file" if paths else f"{name}: matches no file")
        found += [LocalShard(Path(path)) for path in paths]
    return found


def prefetcher_of(shards: Sequence[Shard]) -> tuple[Prefetcher, int]:
    """Returns what fetches the remote ones of these files ahead, and how many of them a training mixes by default."""
    mixed = fetching.MIXED if any(isinstance(shard, RemoteFile) for shard in shards) else 0
    return Prefetcher(partial(_remote_files, shards)), mixed


def _remote_files(shards: Sequence[Shard], number: int) -> list[RemoteFile]:
    shard = shards[number]
    return [shard] if isinstance(shard, RemoteFile) else []
