"""Files of many images, on a local disk or in an object store. The latter are fetched into the cache folder."""

import glob
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import parse_qsl, urlsplit

from fkd_ssl import files, locks
from fkd_ssl.errors import ImageAccessError, RequestError
from fkd_ssl.images.decoding import open_file
from fkd_ssl.images.patterns import expand, stamp_of
from fkd_ssl.text import first_line

CACHE_BYTES = "FKD_SSL_CACHE_BYTES"
"""Environment variable: maximum bytes of fetched files in the cache folder."""
_DEFAULT_BYTES = 100 * 10**9
_PIECE = 2**23  # bytes of a request
_TRIES, _PAUSE = 5, 0.5  # attempts of a request; seconds before the second, doubled before each further one
_ABANDONED = 3600  # seconds since the last write, after which a partly fetched file is removed
_LISTERS = 16  # threads that ask for sizes
_MIXED = 16  # files whose images a training mixes by default
_AHEAD = 2  # files that are fetched ahead at a time
_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")
_SECRET = re.compile("sig|token|key|secret|password|credential", re.IGNORECASE)


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


@dataclass(frozen=True)
class RemoteShard:
    """A file in an object store or on a web server, which is fetched as a whole when it is first read.

    Fetched files are kept in the cache folder up to $FKD_SSL_CACHE_BYTES bytes (default: 100 GB); those that were not read for
    the longest time are removed first. Processes share them. An interrupted fetch continues where it stopped.

    Attributes:
        url: A URL that fsspec can open.
        size: Bytes of the file when it was listed.
        version: What changes when the file changes: ETag, time or checksum.
    """

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """The URL."""
        return self.url

    def stamp(self) -> tuple[str, float]:
        """Returns URL, size and version."""
        return f"{self.url} {self.size} {self.version}", 0.0

    @cached_property
    def _kept(self) -> Path:
        return fetched_folder() / files.sha256(self.stamp()[0].encode())

    @property
    def is_fetched(self) -> bool:
        """Whether the file is in the cache folder."""
        return self._kept.exists()

    def open(self) -> BinaryIO:
        """Opens the fetched file.

        Raises:
            ImageAccessError: It cannot be fetched, has changed since it was listed, or the cache folder cannot keep it.
        """
        try:
            return self._open()
        except OSError as error:
            raise ImageAccessError(
                f"{self.url}: cannot be kept in {self._kept.parent}: {error.strerror or error}; make room there, or choose "
                f"another cache folder with {files.CACHE_VARIABLE}"
            ) from error

    def _open(self) -> BinaryIO:
        while True:
            with suppress(FileNotFoundError):  # not fetched yet, or removed by another process just now
                os.utime(self._kept)  # for `_evict`
                return self._kept.open("rb")
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            with locks.locked(self._kept.with_name(f"{self._kept.name}.lock"), seconds=float("inf")):
                if not self._kept.exists():
                    self._fetch(self._kept)

    def path(self) -> Path:
        """Returns the fetched file, which `_evict` may remove. Raises as `open` does."""
        self.open().close()
        return self._kept

    def _fetch(self, kept: Path) -> None:
        part = kept.with_name(f"{kept.name}.part")
        _evict(keep=self.size)
        with part.open("ab") as file:
            if file.tell() > self.size:
                file.truncate(0)
            while (start := file.tell()) < self.size:
                file.write(self._piece(start, min(start + _PIECE, self.size)))
            file.flush()
            os.fsync(file.fileno())
        if _list_remote(self.url) != [self]:
            part.unlink()
            raise ImageAccessError(f"{self.url}: the file changed since it was listed; run the command again")
        part.rename(kept)

    def _piece(self, start: int, end: int) -> bytes:
        """Fetches a range of bytes, with several attempts."""
        problem: object = None
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                data: bytes = _filesystem(self.url).cat_file(self.url, start=start, end=end)
            except (FileNotFoundError, PermissionError) as error:
                raise _inaccessible(self.url, error) from error
            except Exception as error:  # each library of an object store has its own errors
                problem = error
                continue
            if len(data) == end - start:
                return data
            problem = f"{len(data)} of {end - start} bytes received"
        raise ImageAccessError(f"{self.url}: cannot be fetched after {_TRIES} attempts: {first_line(problem)}")


def fetched_folder() -> Path:
    """Returns the folder of fetched files."""
    return files.cache_folder() / "fetched"


def _limit() -> float:
    """Returns the maximum bytes of fetched files."""
    text = os.environ.get(CACHE_BYTES, str(_DEFAULT_BYTES))
    with suppress(ValueError):
        if (limit := float(text)) >= 0:  # not for NaN
            return limit
    raise RequestError(f"{CACHE_BYTES}={text}: expected a number of bytes, such as 200e9, or inf")


def _evict(keep: int) -> None:
    """Removes the fetched files that were not read for the longest time, so that `keep` more bytes fit."""
    found = []
    for path in fetched_folder().iterdir():
        with suppress(FileNotFoundError):  # another process removed it
            if path.suffix != ".lock" and not (path.suffix == ".part" and path.stat().st_mtime > time.time() - _ABANDONED):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    over = sum(size for _, size, _ in found) + keep - _limit()
    for _, size, path in sorted(found):
        if over <= 0:
            break
        path.unlink(missing_ok=True)  # a process that has opened it can read on
        over -= size


def open_shards(pattern: str) -> list[Shard]:
    """Returns the files that a pattern names, in order: paths or URLs with braces (`{000..146}`, `{a,b}`) and `*`.

    Raises:
        RequestError: A file is missing, or none matches; a URL has credentials; the library for a kind of URL is missing.
        ImageAccessError: The server does not answer, or refuses access.
    """
    if is_url(pattern):
        _check_url(pattern)
        names = expand(pattern)
        with ThreadPoolExecutor(_LISTERS) as pool:
            return [shard for shards in pool.map(_list_remote, names) for shard in shards]
    if os.path.exists(pattern):  # noqa: PTH110  (False for a pattern that is too long for a name)
        return [LocalShard(Path(pattern))]
    found: list[Shard] = []
    for name in expand(pattern):
        paths = sorted(glob.glob(name)) if glob.has_magic(name) else [name]  # noqa: PTH207  (keeps the pattern's spelling)
        if not paths or not all(map(os.path.isfile, paths)):
            raise RequestError(f"{name}: no such file" if paths else f"{name}: matches no file")
        found += [LocalShard(Path(path)) for path in paths]
    return found


def is_url(spec: str) -> bool:
    """Whether a spec is a URL, such as s3://bucket/train.tar."""
    return "://" in spec


def _check_url(url: str) -> None:
    """Raises RequestError if a URL has credentials: specs are written to configs and messages."""
    parts = urlsplit(url)
    if "@" in parts.netloc or any(_SECRET.search(key) for key, _ in parse_qsl(parts.query)):
        hidden = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise RequestError(
            f"{hidden}: a URL with credentials would be written to configs and logs; give them in the environment"
        )


def _list_remote(url: str) -> list[RemoteShard]:
    """Returns the files that a URL names."""
    filesystem = _filesystem(url)
    try:
        if glob.has_magic(url.partition("?")[0] if url.startswith("http") else url):
            listed = {filesystem.unstrip_protocol(path): about for path, about in filesystem.glob(url, detail=True).items()}
            if not listed:
                raise RequestError(f"{url}: matches no file")
        else:
            listed = {url: filesystem.info(url)}
    except RequestError:
        raise
    except Exception as error:  # each library of an object store has its own errors
        raise _inaccessible(url, error) from error
    return [_remote(name, about) for name, about in sorted(listed.items())]


def _remote(url: str, about: Mapping[str, Any]) -> RemoteShard:
    if about.get("type") == "directory" or about.get("size") is None:
        raise RequestError(f"{url}: not a file of a known size; name the files, for instance with *.tar")
    version = next((about[key] for key in _VERSIONS if about.get(key)), "")
    return RemoteShard(url, int(about["size"]), str(version))


def _filesystem(url: str) -> Any:
    return _filesystem_of(url.partition("://")[0], os.getpid())


@cache
def _filesystem_of(protocol: str, process: int) -> Any:
    """Makes fsspec's file system of a protocol, one in each process, since their event loops do not survive a fork."""
    import fsspec

    try:
        return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        raise RequestError(f"{protocol}://: {first_line(error)}") from error
    except ValueError as error:
        raise RequestError(f"{protocol}://: {first_line(error)}; see docs/sources.md") from error


def _inaccessible(url: str, error: Exception) -> ImageAccessError:
    reason = "not found" if isinstance(error, FileNotFoundError) else first_line(error)
    return ImageAccessError(f"{url}: {reason}; check the URL, and the credentials in the environment")


class Prefetcher:
    """Fetches remote files before they are read, in threads of this process.

    Attributes:
        mix: Number of files whose images a training mixes by default; 0 if all are local.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._fetching: set[int] = set()
        self.mix = _MIXED if any(isinstance(shard, RemoteShard) for shard in shards) else 0
        self._process = os.getpid()
        self._pool: ThreadPoolExecutor | None = None

    def expect(self, numbers: Iterable[int]) -> None:
        """Begins to fetch those of these files that are not fetched yet, in order."""
        if not self.mix:
            return
        if self._pool is None or self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(_AHEAD, thread_name_prefix="fetch"), os.getpid()
        for number in numbers:
            shard = self._shards[number]
            if number not in self._fetching and isinstance(shard, RemoteShard) and not shard.is_fetched:
                self._fetching.add(number)
                self._pool.submit(self._fetch, number)

    def _fetch(self, number: int) -> None:
        with suppress(Exception):  # raised again where the file is read
            self._shards[number].open().close()
        self._fetching.discard(number)
