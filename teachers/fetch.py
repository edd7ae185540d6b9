"""Published checkpoints in a cache folder: found there, or downloaded and checked."""

import hashlib
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from fkd_ssl import files, locks
from fkd_ssl.checkpoints import digest
from fkd_ssl.errors import CheckpointError, FkdError, RequestError
from fkd_ssl.teachers.presets import Preset

_TRIES = 5
_PIECE = 2**20
_TIMEOUT = 60  # seconds without a byte
_MAX_BYTES = 2**34  # where neither the preset nor the server says how many: the largest preset has 1.5 GB
_MIN_SPEED = 2**10  # bytes a second, in the mean of a connection's time after the first _TIMEOUT seconds

Progress = Callable[[int, int | None], None]
"""Bytes here and bytes in all, where the server says how many."""


def find(preset: Preset, cache: str | Path | None = None) -> Path | None:
    """The preset's file in the cache folder, None if it is not there."""
    path = files.cache_folder(cache) / preset.file
    return path if path.is_file() else None


def parts(preset: Preset, cache: str | Path | None = None) -> list[Path]:
    """Unfinished downloads of the preset's file; the name holds a digest of the server's ETag, so that no two files mix."""
    return sorted(files.cache_folder(cache).glob(f"{preset.file}.*.part"))


def by_hand(preset: Preset, cache: str | Path | None = None) -> str:
    """What to do without a network, in words."""
    return (
        f"download {preset.url} (licence: {preset.licence}) by any other way and put it at "
        f"{files.cache_folder(cache) / preset.file}, or pass it as --checkpoint"
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

    A broken download is continued, now and by the next call, where the server gives its file an ETag and takes ranges. The
    file gets its name only when it is whole: of the size that the server and the preset say, with the md5 that its authors
    give, and accepted by `check`.

    Args:
        preset: One of `PRESETS`.
        cache: The cache folder; see `cache_folder`.
        progress: Called as bytes come.
        check: Raises CheckpointError on a file that is not such a checkpoint; it is given the unpublished file.
        pause: Seconds before a broken connection is tried again, doubled each time.

    Raises:
        RequestError: Another process is downloading it.
        CheckpointError: The file that came is another one; it is deleted.
        FkdError: The connection failed, the server answered with an error or too slowly, or the disk is too small.
    """
    folder = files.cache_folder(cache)
    target = folder / preset.file
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
        part = _download(preset, folder, progress, pause)
        try:
            check_file(part, preset)
            check(part)
        except CheckpointError:
            part.unlink()
            raise
        try:
            os.link(part, target)
        except FileExistsError:  # put there by hand meanwhile: it stays
            check(target)
        except OSError:  # a file system without hard links
            part.rename(target)
        for other in parts(preset, cache):
            other.unlink()
    return target


def check_file(path: Path, preset: Preset) -> None:
    """Raises CheckpointError where the size or the md5 of a file is not the preset's, as far as they are known."""
    if preset.size is not None and path.stat().st_size != preset.size:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, {preset.file} has {preset.size:,}: another file")
    if preset.md5 is not None:
        md5 = digest(path, "md5")
        if not md5.startswith(preset.md5):
            raise CheckpointError(
                f"{path}: its md5 begins with {md5[: len(preset.md5)]}, that of {preset.file} with {preset.md5}: another file, "
                "or a damaged one"
            )


def _download(preset: Preset, folder: Path, progress: Progress, pause: float) -> Path:
    """The whole file under a temporary name, over at most _TRIES connections."""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            return _once(preset, folder, progress)
        except urllib.error.HTTPError as error:
            problem = f"the server answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a header that cannot be parsed
            if isinstance(error, OSError) and error.filename:
                raise
            reason = getattr(error, "reason", None) or error
            problem = " ".join(str(reason).split()) or type(error).__name__
            if isinstance(reason, socket.gaierror):  # no network, or no such server
                break
    here = sum(part.stat().st_size for part in parts(preset, folder))
    kept = f"; {here:,} bytes are kept and the same command continues" if here else ""
    raise FkdError(f"{preset.url}: cannot be downloaded: {problem}{kept}. Without a network: {by_hand(preset, folder)}")


def _once(preset: Preset, folder: Path, progress: Progress) -> Path:
    """One try: the whole file; raises OSError where the connection breaks before its end."""
    response = _open(preset, {})
    tag = response.headers.get("ETag", "")
    part = folder / f"{preset.file}.{hashlib.sha256(tag.encode()).hexdigest()[:8]}.part"
    start, total = 0, _number(response.headers.get("Content-Length"))
    here = part.stat().st_size if part.exists() else 0
    # a weak tag, W/"...", says nothing of bytes
    if tag.startswith('"') and here and total:
        response.close()
        if here == total:
            return part
        response = _open(preset, {"Range": f"bytes={here}-", "If-Range": tag})
        if response.status == 206:
            span = response.headers.get("Content-Range", "")
            if span != f"bytes {here}-{total - 1}/{total}":
                raise FkdError(f"{preset.url}: the server sends {span or 'an unnamed part'}, and bytes {here}- were asked for")
            start = here
    with response:
        if preset.size is not None and total not in (None, preset.size):
            raise CheckpointError(f"{preset.url}: the server has {total:,} bytes, expected {preset.size:,}: another file")
        limit = total or preset.size or _MAX_BYTES
        free = shutil.disk_usage(folder).free
        if total is not None and total - start > free:
            raise FkdError(f"{folder}: {total - start:,} bytes are to come and the disk has {free:,} free")
        began, first = time.monotonic(), start
        with part.open("ab" if start else "wb") as file:
            while piece := response.read1(_PIECE):
                with files.annotate_oserror(part):
                    file.write(piece)
                start += len(piece)
                progress(start, total)
                seconds = time.monotonic() - began
                if start > limit:
                    part.unlink()
                    raise CheckpointError(f"{preset.url}: the server sends more than {limit:,} bytes: another file")
                if seconds > _TIMEOUT and start - first < seconds * _MIN_SPEED:
                    raise TimeoutError(f"under {_MIN_SPEED:,} bytes a second")
            file.flush()
            os.fsync(file.fileno())
    if total is not None and start < total:
        raise ConnectionError("the connection broke")
    return part


def _open(preset: Preset, headers: dict[str, str]) -> HTTPResponse:
    """An answer with a file: over https where the preset says so, and not a proxy's page."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "fkd_ssl", **headers}
    request = urllib.request.Request(preset.url, headers=headers)  # noqa: S310 presets name http(s) alone
    response: HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    if preset.url.startswith("https:") and not response.url.startswith("https:"):
        raise FkdError(f"{preset.url}: the server leads to {response.url}, which is not https")
    if response.headers.get_content_type() == "text/html":
        raise FkdError(f"{preset.url}: a web page came instead of the file; the network may want a login first")
    return response


def _number(text: str | None) -> int | None:
    """A length in a header, None where there is none or it is not a number."""
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 20 else None
