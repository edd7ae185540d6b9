"""Finds published checkpoints in a cache folder, or downloads and checks them."""

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
_TIMEOUT = 60  # seconds without data
_MAX_BYTES = 2**34  # if neither the preset nor the server gives the size; the largest preset has 1.5 GB
_MIN_SPEED = 2**10  # mean bytes per second of a connection, checked after the first _TIMEOUT seconds

Progress = Callable[[int, int | None], None]
"""Called with the number of bytes received and the total; the total is None if the server does not give it."""


def find(preset: Preset, cache: str | Path | None = None) -> Path | None:
    """Returns the preset's file in the cache folder; None if it is missing."""
    path = files.cache_folder(cache) / preset.file
    return path if path.is_file() else None


def parts(preset: Preset, cache: str | Path | None = None) -> list[Path]:
    """Returns unfinished downloads of the preset's file. Their names have a digest of the ETag, so versions never mix."""
    return sorted(files.cache_folder(cache).glob(f"{preset.file}.*.part"))


def manual_download(preset: Preset, cache: str | Path | None = None) -> str:
    """Returns instructions for downloading the file by hand."""
    return (
        f"download {preset.url} (licence: {preset.licence}) on another machine and put it at "
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
    """Returns the path of the preset's checkpoint in the cache folder, after downloading it if it is missing.

    A broken download is continued, by this call or the next, if the server gives an ETag and supports ranges. The file gets its
    final name only if it has the size that the server and the preset give and the md5 that its authors give, and `check`
    accepts it.

    Args:
        preset: One of `PRESETS`.
        cache: The cache folder; see `cache_folder`.
        progress: Called while data arrives.
        check: Raises CheckpointError if a file is not such a checkpoint; called before the file gets its final name.
        pause: Seconds before a broken connection is tried again, doubled each time.

    Raises:
        RequestError: Another process is downloading it.
        CheckpointError: The downloaded file is not the preset's; it is deleted.
        FkdError: The connection failed, the server returned an error or was too slow, or the disk has too little space.
    """
    folder = files.cache_folder(cache)
    target = folder / preset.file
    folder.mkdir(parents=True, exist_ok=True)
    with locks.locked(folder / f"{preset.file}.lock") as ours:
        if not ours:
            raise RequestError(f"{target}: another process is downloading it now")
        if target.is_file():  # never replaces an existing file
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
        except FileExistsError:  # the file was put there meanwhile; keep it
            check(target)
        except OSError:  # a file system without hard links
            part.rename(target)
        for other in parts(preset, cache):
            other.unlink()
    return target


def check_file(path: Path, preset: Preset) -> None:
    """Raises CheckpointError if the size or md5 of a file differs from the preset's, if these are known."""
    if preset.size is not None and path.stat().st_size != preset.size:
        raise CheckpointError(f"{path}: has {path.stat().st_size:,} bytes, {preset.file} has {preset.size:,}: another file")
    if preset.md5 is not None:
        md5 = digest(path, "md5")
        if not md5.startswith(preset.md5):
            raise CheckpointError(
                f"{path}: its md5 begins with {md5[: len(preset.md5)]}, that of {preset.file} with {preset.md5}: another file, "
                "or a damaged one"
            )


def _download(preset: Preset, folder: Path, progress: Progress, pause: float) -> Path:
    """Downloads the complete file under a temporary name, with at most _TRIES connections."""
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
    raise FkdError(f"{preset.url}: cannot be downloaded: {problem}{kept}. Without a network: {manual_download(preset, folder)}")


def _once(preset: Preset, folder: Path, progress: Progress) -> Path:
    """Tries once to download the file; raises OSError if the connection breaks early."""
    response = _open(preset, {})
    tag = response.headers.get("ETag", "")
    part = folder / f"{preset.file}.{hashlib.sha256(tag.encode()).hexdigest()[:8]}.part"
    start, total = 0, _number(response.headers.get("Content-Length"))
    here = part.stat().st_size if part.exists() else 0
    # a weak tag, W/"...", does not identify the bytes
    if tag.startswith('"') and here and total:
        response.close()
        if here == total:
            return part
        response = _open(preset, {"Range": f"bytes={here}-", "If-Range": tag})
        if response.status == 206:
            span = response.headers.get("Content-Range", "")
            if span != f"bytes {here}-{total - 1}/{total}":
                raise FkdError(f"{preset.url}: the server sent {span or 'an unnamed part'} instead of bytes {here}-")
            start = here
    with response:
        if preset.size is not None and total not in (None, preset.size):
            raise CheckpointError(f"{preset.url}: the server has {total:,} bytes, expected {preset.size:,}: another file")
        limit = total or preset.size or _MAX_BYTES
        free = shutil.disk_usage(folder).free
        if total is not None and total - start > free:
            raise FkdError(f"{folder}: needs {total - start:,} more bytes, and the disk has {free:,} free")
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
    """Opens the preset's URL; refuses a redirection from https to http, and a page in place of a file."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "fkd_ssl", **headers}
    request = urllib.request.Request(preset.url, headers=headers)  # noqa: S310 all presets have http(s) URLs
    response: HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    if preset.url.startswith("https:") and not response.url.startswith("https:"):
        raise FkdError(f"{preset.url}: the server redirects to {response.url}, which is not https")
    if response.headers.get_content_type() == "text/html":
        raise FkdError(f"{preset.url}: received a web page instead of the file; the network may require a login")
    return response


def _number(text: str | None) -> int | None:
    """Parses the length in a header; None if it is missing or not a number."""
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 20 else None
