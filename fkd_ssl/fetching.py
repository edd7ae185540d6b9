"""Files in object stores and on web servers, fetched into a bounded cache folder that processes share."""

import glob
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qsl, urlsplit

from fkd_ssl import files, locks
from fkd_ssl.errors import FetchError, RequestError
from fkd_ssl.text import first_line, format_bytes, is_url, redacted
from fkd_ssl.web import Web

CACHE_BYTES = "FKD_SSL_CACHE_BYTES"
"""Environment variable: maximum bytes of fetched files in the cache folder."""
FETCHED = "FKD_SSL_FETCHED"
"""Environment variable: folder of fetched files, so that machines can share the rest of the cache folder."""
MIXED = 16
"""Number of remote files whose images a training mixes by default."""
LENGTH = "bytes"
"""Name of the file with the bytes of a folder in `fetched_folder`. It is written last, and read by `evict`."""
_DEFAULT_BYTES = 100 * 10**9
PIECE = 2**23  # bytes of a request
TRIES, PAUSE = 5, 0.5  # attempts of a request; seconds before the second, doubled before each further one
_ABANDONED = 3600  # seconds since the last write, after which a partly fetched file is removed
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "Last-Modified", "mtime", "created")
T = TypeVar("T")
_SECRET = re.compile("sig|token|key|secret|password|credential", re.IGNORECASE)


@dataclass(frozen=True)
class RemoteFile:
    """A file in an object store or on a web server, which is fetched as a whole when it is first read.

    Fetched files are kept in the cache folder up to $FKD_SSL_CACHE_BYTES bytes (default: 100 GB); those that were not read for
    the longest time are removed first. Processes share them. An interrupted fetch continues where it stopped.

    Attributes:
        url: A URL that fsspec can open.
        size: Bytes of the file when it was listed.
        version: What changes when the file changes: ETag, time or checksum.
        sha256: The expected digest of the file. If empty, the file is listed again after it is fetched.
    """

    url: str
    size: int
    version: str = ""
    sha256: str = ""

    @property
    def name(self) -> str:
        """The URL."""
        return self.url

    def stamp(self) -> tuple[str, float]:
        """Returns URL, size and version."""
        return f"{self.url} {self.size} {self.version}", 0.0

    @cached_property
    def _kept(self) -> Path:
        return fetched_folder() / (self.sha256 or files.sha256(self.stamp()[0].encode()))

    @property
    def is_fetched(self) -> bool:
        """Whether the file is in the cache folder."""
        return self._kept.exists()

    def read_at(self) -> int | None:
        """Returns the time when the file was fetched or last opened, in ns; None if it is not in the cache folder."""
        with suppress(OSError):
            return self._kept.stat().st_mtime_ns
        return None

    def open(self) -> BinaryIO:
        """Opens the fetched file.

        Raises:
            FetchError: It cannot be fetched, has changed since it was listed, or the cache folder cannot keep it.
        """
        with keeping(self.url, self._kept.parent):
            while True:
                with suppress(FileNotFoundError):  # not fetched yet, or removed by another process just now
                    os.utime(self._kept)  # for `evict`
                    return self._kept.open("rb")
                self.fetch()

    def fetch(self) -> int | None:
        """Fetches the file unless it is in the cache folder. Returns its `read_at`; None if it was there. Raises as `open`."""
        with keeping(self.url, self._kept.parent):
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            with locks.locked(self._kept.with_name(f"{self._kept.name}.lock"), seconds=float("inf")):
                if self._kept.exists():
                    return None
                evict(self.size, self.url)
                download(self.url, self.size, self.sha256 or None, self._kept, is_same=lambda: list_remote(self.url) == [self])
                return self.read_at()

    def path(self) -> Path:
        """Returns the fetched file, which `evict` may remove. Raises as `open` does."""
        self.open().close()
        return self._kept


def download(url: str, size: int, sha256: str | None, path: Path, *, is_same: Callable[[], bool] = bool) -> None:
    """Fetches a file, which appears as `path` when it is complete and checked. A further call continues an interrupted one.

    Args:
        url: The file.
        size: Its bytes.
        sha256: Its digest, if known.
        path: The local file. No other process may fetch it.
        is_same: Without a digest, returns whether the file is still the same.

    Raises:
        FetchError: The file cannot be fetched, or has changed.
        OSError: The disk is full or fails.
    """
    part = path.with_name(f".{path.name}.part")
    for again in (True, False):
        with part.open("ab") as file:
            if file.tell() > size:
                file.truncate(0)
            resumes = file.tell() > 0
            while (start := file.tell()) < size:
                file.write(piece(url, start, min(start + PIECE, size)))
            file.flush()
            os.fsync(file.fileno())
        if is_same() if sha256 is None else files.sha256_file(part) == sha256:
            part.rename(path)
            return
        part.unlink()
        if not (again and resumes):  # the first part may be of another version
            break
    if sha256 is None:
        raise FetchError(f"{url}: the file changed since it was listed; run the command again")
    raise FetchError(f"{url}: its sha256 differs from the expected one: it is damaged, or changed since the store was opened")


@contextmanager
def keeping(url: str, folder: Path) -> Iterator[None]:
    """Reports an OSError of the cache folder as FetchError."""
    try:
        yield
    except OSError as error:
        raise FetchError(
            f"{url}: cannot be kept in {folder}: {error.strerror or error}; make room there, or choose another cache folder "
            f"with {FETCHED} or {files.CACHE_VARIABLE}"
        ) from error


def piece(url: str, start: int, end: int, *, whole: bool = True) -> bytes:
    """Fetches a range of bytes, with several attempts.

    Args:
        url: The file.
        start: First byte.
        end: Byte after the last one.
        whole: Whether the file must have all these bytes.

    Raises:
        FetchError: The file is missing, access is denied, or all attempts failed.
    """
    at = filesystem(url)

    def fetch() -> bytes:
        data: bytes = at.cat_file(url, start=start, end=end)
        if len(data) > end - start or (whole and len(data) < end - start):
            raise EOFError(f"{len(data)} of {end - start} bytes received")
        return data

    return attempt(url, fetch, "fetched")


def attempt(url: str, call: Callable[[], T], done: str) -> T:
    """Calls a function that reads or writes a file, again if it fails.

    Raises:
        FetchError: The file is missing, access is denied, or all attempts failed. The message says that it cannot be `done`.
    """
    problem: object = None
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE * 2 ** (number - 1))
        try:
            return call()
        except Exception as error:  # each library of an object store has its own errors
            if isinstance(error, (FileNotFoundError, PermissionError)) or _answered(error)[0] in (401, 403, 404):
                raise inaccessible(url, error) from error
            problem = error
    raise FetchError(f"{url}: cannot be {done} after {TRIES} attempts: {redacted(first_line(problem))}")


def _answered(error: BaseException) -> tuple[int | None, object]:
    """Returns the status of the HTTP response that an error, or a cause of it, is about, and its message."""
    cause: Any = error
    while cause is not None:
        if (status := getattr(getattr(cause, "response", None), "status_code", None)) is not None:
            return status, getattr(cause, "server_message", None) or cause
        cause = cause.__cause__
    return None, error


def fetched_folder() -> Path:
    """Returns the folder of fetched files: $FKD_SSL_FETCHED, by default in the cache folder."""
    given = os.environ.get(FETCHED)
    return Path(given).expanduser() if given else files.cache_folder() / "fetched"


def cache_limit() -> float:
    """Returns the maximum bytes of fetched files."""
    text = os.environ.get(CACHE_BYTES, str(_DEFAULT_BYTES))
    with suppress(ValueError):
        if (limit := float(text)) >= 0:  # not for NaN
            return limit
    raise RequestError(f"{CACHE_BYTES}={text}: expected a number of bytes, such as 200e9, or inf")


def evict(keep: int, url: str) -> None:
    """Removes the fetched files that were not read for the longest time, so that `keep` more bytes of `url` fit.

    Folders with a file `LENGTH` are removed as a whole, unless a process has locked that file.

    Raises:
        FetchError: `keep` is larger than the maximum.
    """
    limit = cache_limit()
    if keep > limit:
        raise FetchError(
            f"{url}: {format_bytes(keep)} must be fetched, and the cache may keep {format_bytes(limit)}; raise {CACHE_BYTES}"
        )
    found = []
    for path in fetched_folder().iterdir():
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):  # another process removed it
            if path.is_dir() and not (path / LENGTH).exists():
                _remove_abandoned(path)
            elif path.is_dir():
                found.append(((path / LENGTH).stat().st_mtime, int((path / LENGTH).read_text()), path))
            elif path.suffix != ".lock" and not (path.suffix == ".part" and path.stat().st_mtime > time.time() - _ABANDONED):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
    over = sum(size for _, size, _ in found) + keep - limit
    for _, size, path in sorted(found):
        if over <= 0:
            break
        if not path.is_dir():
            path.unlink(missing_ok=True)  # a process that has opened it can read on
            over -= size
        elif _remove_unused(path):
            over -= size


def _remove_unused(folder: Path) -> bool:
    """Removes a fetched folder unless a process uses it; returns whether it is removed."""
    with suppress(FileNotFoundError), (folder / LENGTH).open("rb") as file:
        if not locks.try_lock(file.fileno()):
            return False
        trash = folder.with_name(f"{folder.name}-{secrets.token_hex(6)}")
        folder.rename(trash)  # another process can fetch it again while this one removes it
        shutil.rmtree(trash, ignore_errors=True)
    return True


def _remove_abandoned(folder: Path) -> None:
    """Removes a folder that a killed process has begun to fetch."""
    if folder.stat().st_mtime < time.time() - _ABANDONED:
        with locks.locked(folder.with_name(f"{folder.name}.lock")) as unused:
            if unused:
                shutil.rmtree(folder, ignore_errors=True)


def check_url(url: str) -> None:
    """Raises RequestError if a URL is invalid, or has credentials: specs are written to configs and messages."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise RequestError(f"{redacted(url)}: not a valid URL ({error})") from error
    port = parts.netloc.partition(":")[2]
    if "@" in url and "@" not in parts.netloc and port and not port.isdecimal():  # a password with '/', '?' or '#'
        raise RequestError(f"{parts.scheme}://...: a URL with credentials is not accepted; give them in the environment")
    if "@" in parts.netloc or any(_SECRET.search(key) for key, _ in parse_qsl(parts.query)):
        hidden = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise RequestError(
            f"{hidden}: a URL with credentials would be written to configs and logs; give them in the environment"
        )


def checked_folder(url: str) -> str:
    """Returns the URL of a folder without a final '/'. Raises RequestError as `check_url`, or if it cannot be a folder's."""
    check_url(url)
    if "?" in url or "#" in url:
        raise RequestError(f"{url.partition('?')[0]}: expected the URL of a folder, without ? and #")
    if not is_url(stripped := url.rstrip("/")):
        raise RequestError(f"{url}: expected the URL of a folder, such as s3://BUCKET/NAME")
    return stripped


def list_remote(url: str) -> list[RemoteFile]:
    """Returns the files that a URL names, which may have `*`.

    Raises:
        RequestError: The URL names no file.
        FetchError: The server does not answer, or refuses access.
    """
    at = refreshed(url)
    is_web = isinstance(at, Web)
    if glob.has_magic(url.partition("?")[0] if is_web else url):
        if is_web:
            raise RequestError(f"{url}: a web server does not list its files; name them, for instance with {{000..146}}")
        found = attempt(url, lambda: at.glob(url, detail=True), "listed")
        listed = {at.unstrip_protocol(path): info for path, info in found.items()}
        if not listed:
            raise RequestError(f"{url}: matches no file")
    else:
        listed = {url: attempt(url, lambda: at.info(url), "listed")}
    return [_remote(name, info) for name, info in sorted(listed.items())]


def _remote(url: str, info: Mapping[str, Any]) -> RemoteFile:
    if info.get("type") == "directory" or info.get("size") is None:
        raise RequestError(f"{url}: not a file of a known size; name the files, for instance with *.tar")
    version = next((info[key] for key in _VERSIONS if info.get(key)), "")
    return RemoteFile(url, int(info["size"]), str(version))


def filesystem(url: str) -> Any:
    """Returns the file system of fsspec for a URL. Raises RequestError if fsspec does not support it or lacks a library."""
    return _filesystem_of(url.partition("://")[0], os.getpid())


def refreshed(url: str) -> Any:
    """Returns the file system for a URL, without the listings that the one of the Hugging Face Hub keeps in any case."""
    at = filesystem(url)
    if url.startswith("hf://"):
        at.invalidate_cache()
        at = _filesystem_of.__wrapped__("hf", os.getpid())  # other threads may use `at`
    return at


@cache
def _filesystem_of(protocol: str, process: int) -> Any:
    """Makes the file system of a protocol, one in each process, since their event loops do not survive a fork."""
    import fsspec

    try:
        if protocol in ("http", "https"):
            import requests  # noqa: F401

            return Web()
        read_ahead = {"block_size": 1} if protocol == "hf" else {}  # otherwise each `piece` fetches 5 MB more
        return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, **read_ahead)
    except ImportError as error:
        extra = "; pip install 'fkd_ssl[remote]'" if protocol in ("http", "https", "s3", "s3a", "hf") else ""
        raise RequestError(f"{protocol}://: {first_line(error)}{extra}") from error
    except ValueError as error:
        raise RequestError(f"{protocol}://: {first_line(error)}; see docs/sources.md") from error


def inaccessible(url: str, error: Exception) -> FetchError:
    """Returns the error for a file that a server does not give."""
    status, message = _answered(error)
    reason = "not found" if isinstance(error, FileNotFoundError) or status == 404 else redacted(first_line(message))
    return FetchError(f"{url}: {reason}; check the URL, and the credentials in the environment")
