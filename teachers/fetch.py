"""Published checkpoints in a cache folder: found there, or downloaded, continued where a download broke, and checked."""

import errno
import hashlib
import json
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from fkd_ssl import locks
from fkd_ssl.errors import CheckpointError, FkdError, RequestError
from fkd_ssl.teachers.presets import Preset

CACHE_VARIABLE = "FKD_SSL_CACHE"
_TRIES = 5  # in a row without one new byte
_PIECE = 2**20
_TIMEOUT = 60  # seconds without a byte
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # errors of the disk's that name no file

Progress = Callable[[int, int | None], None]
"""Bytes here and bytes in all, where the server says how many."""


def cache_folder(given: str | Path | None = None) -> Path:
    """Where checkpoints are kept: `given`, else the environment's FKD_SSL_CACHE, else `fkd_ssl` in the user's cache."""
    chosen = given or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fkd_ssl"


def find(preset: Preset, cache: str | Path | None = None) -> Path | None:
    """The preset's file in the cache folder, None if it is not there."""
    path = cache_folder(cache) / preset.file
    return path if path.is_file() else None


def part_of(preset: Preset, cache: str | Path | None = None) -> Path:
    """Where the start of the preset's file lies while its download is not finished."""
    return cache_folder(cache) / f"{preset.file}.part"


def by_hand(preset: Preset, cache: str | Path | None = None) -> str:
    """What to do without a network, in words."""
    return (
        f"download {preset.url} (licence: {preset.licence}) by any other way and put it at "
        f"{cache_folder(cache) / preset.file}, or pass it as --checkpoint"
    )


def fetch(
    preset: Preset,
    *,
    cache: str | Path | None = None,
    progress: Progress = lambda here, total: None,
    check: Callable[[Path], None] = lambda path: None,
    pause: float = 1.0,
) -> Path:
    """The preset's checkpoint in the cache folder, downloaded if it is not there.

    A broken download is continued (HTTP Range), now and by the next call; where the server ignores Range, or its file has
    changed since, it starts anew. The file gets its name only when it is whole: of the size that the server and the preset
    say, with the md5 that its authors give, and accepted by `check`.

    Args:
        preset: One of `PRESETS`.
        cache: The cache folder; see `cache_folder`.
        progress: Called as bytes come.
        check: Raises CheckpointError on a file that is no such checkpoint; it is given the unpublished file.
        pause: Seconds before a broken connection is tried again, doubled each time.

    Raises:
        RequestError: Another process downloads it now.
        CheckpointError: What came is another file; it is deleted.
        FkdError: No connection, an error of the server's, or a disk that is too small; what came so far is kept.
    """
    folder = cache_folder(cache)
    target, part = folder / preset.file, part_of(preset, cache)
    folder.mkdir(parents=True, exist_ok=True)
    with locks.locked(folder / f"{preset.file}.lock") as ours:
        if not ours:
            raise RequestError(f"{target}: another process is downloading it now")
        if target.is_file():  # a user's own or an earlier call's: never replaced
            try:
                check_file(target, preset)
                check(target)
            except CheckpointError as error:
                raise CheckpointError(f"{error}; delete it and fetch it again") from error
            return target
        _download(preset, part, by_hand(preset, cache), progress, pause)
        try:
            check_file(part, preset)
            check(part)
        except CheckpointError:
            _discard(part)
            raise
        with part.open("rb") as file:
            os.fsync(file.fileno())
        try:
            os.link(part, target)
        except FileExistsError:  # put there by hand meanwhile: it stays
            check(target)
        except OSError:  # a file system without hard links
            part.rename(target)
        _discard(part)
    return target


def check_file(path: Path, preset: Preset) -> None:
    """Raises CheckpointError where the size or the md5 of a file is not the preset's, as far as they are known."""
    if preset.size is not None and path.stat().st_size != preset.size:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, {preset.file} has {preset.size:,}: another file")
    if preset.md5 is not None:
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if not md5.startswith(preset.md5):
            raise CheckpointError(
                f"{path}: its md5 begins with {md5[: len(preset.md5)]}, that of {preset.file} with {preset.md5}: another file, "
                "or a damaged one"
            )


def _download(preset: Preset, part: Path, advice: str, progress: Progress, pause: float) -> None:
    """Makes `part` whole, over as many connections as it takes while each brings something."""
    failures = most = 0
    while True:
        most = max(most, _size(part))
        try:
            if _once(preset, part, progress):
                return
            problem = "the connection broke"
        except urllib.error.HTTPError as error:
            problem = f"the server answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                raise FkdError(f"{preset.url}: {problem}; {advice}") from error
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and (error.filename or error.errno in _DISK):
                raise
            reason = getattr(error, "reason", None) or error
            problem = str(reason) or type(error).__name__
            if isinstance(reason, socket.gaierror):  # no network, or no such server
                failures = _TRIES - 1
        here = _size(part)
        failures = 1 if here > most else failures + 1
        if failures == _TRIES:
            kept = f"; {here:,} bytes are kept and the same command continues" if here else ""
            raise FkdError(f"{preset.url}: cannot be downloaded: {problem}{kept}. Without a network: {advice}")
        time.sleep(pause * 2 ** (failures - 1))


def _once(preset: Preset, part: Path, progress: Progress) -> bool:
    """One connection; True when `part` is whole."""
    here = _size(part)
    known = _read_about(part)
    if here and known.get("url") != preset.url:  # nobody knows what it is
        _discard(part)
        here, known = 0, {}
    if here and here == known.get("total"):
        return True
    headers = {"Accept-Encoding": "identity", "User-Agent": "fkd_ssl"}
    if here:
        headers["Range"] = f"bytes={here}-"
        if known.get("validator"):
            headers["If-Range"] = str(known["validator"])  # a file that has changed comes whole, from its start
    request = urllib.request.Request(preset.url, headers=headers)  # noqa: S310 presets name http(s) alone
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code != 416:  # more is here than the server has
            raise
        _discard(part)
        return False
    with response:
        if preset.url.startswith("https:") and not response.url.startswith("https:"):
            raise FkdError(f"{preset.url}: the server leads to {response.url}, which is not https")
        start, total = _range(response, here)
        if response.headers.get_content_type() == "text/html":  # of a proxy, or of a network that wants a login first
            raise FkdError(
                f"{preset.url}: a web page came instead of the file; {here:,} bytes are kept; {by_hand(preset, part.parent)}"
            )
        if here and start == 0 and total is not None and total < here:
            raise FkdError(
                f"{preset.url}: the server has {total:,} bytes now and {here:,} are here: another file; delete {part} to begin "
                "anew"
            )
        if start not in (0, here):
            raise FkdError(
                f"{preset.url}: the server sends from byte {start}, {here} was asked for; {by_hand(preset, part.parent)}"
            )
        if start and known.get("total") not in (None, total):  # another file by now, and no validator told it
            _discard(part)
            return False
        if preset.size is not None and total not in (None, preset.size):
            raise CheckpointError(f"{preset.url}: the server has {total:,} bytes, expected {preset.size:,}: another file")
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - start > free:
            raise FkdError(f"{part.parent}: {total - start:,} bytes are to come and the disk has {free:,} free")
        with part.open("ab" if start else "wb") as file:
            _write_about(part, preset.url, response, total)
            while piece := response.read1(_PIECE):
                file.write(piece)
                start += len(piece)
                progress(start, total)
            file.flush()
            os.fsync(file.fileno())
    return start == total if total is not None else True


def _range(response: HTTPResponse, here: int) -> tuple[int, int | None]:
    """Where the body starts in the file, and the file's length: all of it where Range was ignored."""
    length = response.headers.get("Content-Length")
    if response.status == 206:
        kind, _, rest = response.headers.get("Content-Range", "").partition(" ")
        span, _, total = rest.partition("/")
        start = span.partition("-")[0]
        if kind == "bytes" and start.isdigit():
            return int(start), int(total) if total.isdigit() else (here + int(length) if length else None)
        return -1, None  # a part of no known place
    return 0, int(length) if length and length.isdigit() else None


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _about(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_about(part: Path) -> dict[str, str | int | None]:
    """What is known of the file that `part` is the start of; nothing where its notes are missing or torn."""
    try:
        about = json.loads(_about(part).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _write_about(part: Path, url: str, response: HTTPResponse, total: int | None) -> None:
    tag = response.headers.get("ETag")
    strong = tag if tag and not tag.startswith("W/") else None  # a weak one says nothing of bytes
    about = {"url": url, "validator": strong or response.headers.get("Last-Modified"), "total": total}
    temporary = part.with_name(f"{part.name}.json.tmp")
    temporary.write_text(json.dumps(about))
    temporary.replace(_about(part))


def _discard(part: Path) -> None:
    for path in (part, _about(part)):
        with suppress(FileNotFoundError):
            path.unlink()
