"""A store at a URL: its list of files, and a local copy of its small files. The arrays of shards are fetched on demand."""

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fkd_ssl import fetching, files, locks
from fkd_ssl.errors import FetchError, FkdError, NotFoundError, StoreError
from fkd_ssl.fetching import RemoteFile
from fkd_ssl.progress import bar_disabled
from fkd_ssl.store.listing import PUBLISHED
from fkd_ssl.store.manifest import CROPS, TARGETS
from fkd_ssl.text import plural

INDEX = PUBLISHED[0]
_TITLE = "fkd_ssl files 1"
_MAX_INDEX = 2**26
_FETCHERS = 16  # threads that fetch small files
_PART = "[A-Za-z0-9][A-Za-z0-9._-]{0,119}"
_LINE = re.compile(rf"([0-9a-f]{{64}}) (0|[1-9]\d{{0,14}}) ({_PART}(?:/{_PART}){{0,3}})")
_ARRAY = re.compile(rf"{CROPS}/\d+\.npy|{TARGETS}/[^/]+/codes-\d+\.npy")
OF_STORE = re.compile(
    rf"manifest\.json|images(-\d{{5}})?\.(txt|npy|json)|{CROPS}/\d{{5,}}\.(npy|json)|"
    rf"{TARGETS}/[^/]+/(meta\.json|[^/]+\.npy|codes-\d{{5,}}\.json)"
)
"""Files that a store has. Other files that a server lists are not fetched."""
_SHOWN = 2**24  # bytes from which a bar is shown


@dataclass(frozen=True)
class FileList:
    """The files of a published store: size in bytes and sha256, by path. It is published last, as files.txt."""

    files: dict[str, tuple[int, str]]

    @property
    def total(self) -> int:
        """Total size of the files."""
        return sum(size for size, _ in self.files.values())

    def encode(self) -> bytes:
        """Returns the bytes of files.txt: a line with number and total bytes, then a line for each file, sorted by path."""
        lines = [f"{digest} {size} {path}" for path, (size, digest) in sorted(self.files.items())]
        return "\n".join([f"{_TITLE} {len(lines)} {self.total}", *lines, ""]).encode()

    @classmethod
    def decode(cls, data: bytes, where: str) -> "FileList":
        """Parses a files.txt. Raises StoreError, naming `where`, if it is not a valid one."""
        if len(data) > _MAX_INDEX:
            raise StoreError(f"{where}: more than {_MAX_INDEX:,} bytes; expected a list of a store's files")
        first, *lines, last = data.decode("ascii", "replace").split("\n") if b"\n" in data else ("", "?")
        found = {}
        for line in lines:
            if (match := _LINE.fullmatch(line)) is None:
                raise StoreError(f"{where}: its line {line[:200]!r} is invalid; the file is damaged")
            found[match[3]] = (int(match[2]), match[1])
        folders = {path[:k] for path in found for k, letter in enumerate(path) if letter == "/"}
        made = cls(found)
        if reserved := {INDEX, fetching.LENGTH} & {path.partition("/")[0] for path in found}:
            raise StoreError(f"{where}: lists {reserved.pop()!r}, which is not a file of a store; the file is damaged")
        if last or first != f"{_TITLE} {len(lines)} {made.total}" or len(found) != len(lines) or folders & found.keys():
            raise StoreError(f"{where}: not a list of a store's files, or damaged, or newer than this version of fkd_ssl")
        return made


class Remote:
    """A store at a URL, whose small files are in a folder of the cache.

    The folder is not removed from the cache as long as this object, or a copy of it in a forked process, exists.

    Attributes:
        url: The URL.
        folder: The folder, in the layout of a store without the arrays of shards.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self._arrays: dict[str, RemoteFile] = {}
        self._lock = os.open(folder / fetching.LENGTH, os.O_RDONLY | os.O_CLOEXEC)
        locks.share(self._lock)
        if not locks.is_named(self._lock, folder / fetching.LENGTH):
            raise FileNotFoundError(f"{folder}: another process removed it from the cache")
        os.utime(self._lock)  # for `evict`

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._lock)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Remote, (self.url, self.folder))

    @cached_property
    def list(self) -> FileList:
        """The store's files."""
        return FileList.decode(files.read_regular(self.folder / INDEX, _MAX_INDEX), f"{self.url}/{INDEX}")

    def array(self, path: Path, *, body: int, sha256: Callable[[], str]) -> RemoteFile:
        """Returns the array of a shard.

        Args:
            path: Its path if it were in `folder`.
            body: The bytes of its values.
            sha256: Returns the digest in its sidecar.

        Raises:
            FetchError: The list of files has no such array, or states another size or digest.
        """
        name = path.relative_to(self.folder).as_posix()
        if name not in self._arrays:
            (size, digest), expected = self.list.files.get(name, (0, "")), sha256()
            if not body < size <= body + files.MAX_HEADER + 10 or digest != expected:
                raise FetchError(
                    f"{self.url}/{name}: {INDEX} states {size} bytes, sha256 {digest or 'none'}; expected {body} and a header, "
                    f"sha256 {expected}: the store is damaged; publish it again"
                )
            self._arrays[name] = RemoteFile(f"{self.url}/{name}", size, sha256=digest)
        return self._arrays[name]


@contextmanager
def naming_url(remote: Remote | None) -> Iterator[None]:
    """Replaces the folder of the cache by the URL in the messages of errors."""
    try:
        yield
    except FkdError as error:
        if remote is not None:
            error.args = (str(error).replace(str(remote.folder), remote.url),)
        raise


def open_remote(url: str) -> Remote:
    """Opens a published store; fetches its small files if they are not in the cache.

    Raises:
        NotFoundError: There is no published store.
        RequestError: The URL has credentials or a query, or the library for its kind is not installed.
        FetchError: A file cannot be fetched, or differs from its checksum.
        StoreError: files.txt is damaged.
    """
    url = fetching.checked_folder(url)
    data = _read_index(url)
    index = FileList.decode(data, f"{url}/{INDEX}")
    slug = re.sub("[^A-Za-z0-9]+", "-", url)[-80:].strip("-")
    folder = fetching.fetched_folder() / f"{slug}-{files.sha256(url.encode() + data)[:16]}"
    with fetching.keeping(url, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locks.locked(folder.with_name(f"{folder.name}.lock"), seconds=float("inf")):
            while True:
                with suppress(FileNotFoundError):  # not complete, or removed by another process just now
                    return Remote(url, folder)
                _fetch_small(url, index, data, folder)


def _read_index(url: str) -> bytes:
    fetching.refreshed(url)
    try:
        return fetching.piece(f"{url}/{INDEX}", 0, _MAX_INDEX + 1, whole=False)
    except FetchError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        found = f"{INDEX} not found"
        with suppress(FetchError):
            fetching.piece(f"{url}/manifest.json", 0, 1)
            found = f"{INDEX} not found; it was not published completely: run the same fkd-ssl publish again"
        raise NotFoundError(
            f"{url}: not a published store ({found}); check the URL, and the credentials in the environment"
        ) from error


def _fetch_small(url: str, index: FileList, data: bytes, folder: Path) -> None:
    """Fetches all files but the arrays of shards; continues after a kill."""
    small = {path: file for path, file in index.files.items() if OF_STORE.fullmatch(path) and not _ARRAY.fullmatch(path)}
    for path, (size, _) in small.items():
        if path.endswith(".json") and size > files.MAX_JSON:
            raise StoreError(f"{url}/{path}: {size} bytes, and at most {files.MAX_JSON} are expected")
    total = len(data) + sum(size for size, _ in small.values())
    fetching.evict(total, url)
    desc, hidden = f"fetch {plural(len(small), 'file')}", bar_disabled(show=total > _SHOWN)
    bar = tqdm(total=total, desc=desc, unit="B", unit_scale=True, disable=hidden)

    def fetch(path: str) -> int:
        size, digest = small[path]
        local = folder / path
        local.parent.mkdir(parents=True, exist_ok=True)
        if not (local.exists() and local.stat().st_size == size and files.sha256_file(local) == digest):
            fetching.download(f"{url}/{path}", size, digest, local)
        return size

    folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / INDEX, data)
    with ThreadPoolExecutor(_FETCHERS) as pool, bar:
        try:
            for size in pool.map(fetch, small):
                bar.update(size)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    files.replace(folder / fetching.LENGTH, str(total).encode())
