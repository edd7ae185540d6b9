"""Reads files from web servers, in bounded memory and time. fsspec would keep an endless answer in memory."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_CONNECT, _SILENCE, _TOTAL = 10, 60, 600  # seconds to connect, without a byte, and for an answer
_CONNECTIONS = 32
_BLOCK = 2**16
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")
_HEADERS = {"Accept-Encoding": "identity"}  # sizes and positions are those of the file


class Web:
    """Has the functions of fsspec's file systems that this library needs, for `http://` and `https://`."""

    def info(self, url: str) -> dict[str, Any]:
        """Returns size and version of a file. Raises OSError if the server does not answer, or not with a file."""
        with _answer(url, "bytes=0-0") as answer:
            headers = answer.headers
            whole = headers.get("Content-Range", "").rpartition("/")[2] if answer.status_code == 206 else None
            size = headers.get("Content-Length") if whole is None else whole
        known = {key: headers[key] for key in ("ETag", "Last-Modified") if key in headers}
        return {"size": int(size) if size and size.isdecimal() else None, "type": "file", **known}

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        """Returns a range of bytes, or fewer at the end of the file. Raises OSError if the server does not answer."""
        with _answer(url, f"bytes={start}-{end - 1}") as answer:
            blocks, late = _blocks(answer), time.monotonic() + _TOTAL
            skip, length = start, 0  # for a server that sends the whole file
            if answer.status_code == 206:
                found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
                if found is None or int(found[1]) != start:
                    raise OSError("the server answered with another range of bytes")
                skip, length = 0, min(end, int(found[2])) - start
            data = bytearray()
            for block in blocks:
                data += block[skip:]
                skip = max(0, skip - len(block))
                if len(data) >= end - start:
                    break
                if time.monotonic() > late:
                    raise TimeoutError(f"the server needs more than {_TOTAL} seconds")
        if len(data) < length:
            raise EOFError(f"{len(data)} of {length} bytes received")
        return bytes(data[: end - start])


def _blocks(answer: Any) -> Iterator[bytes]:
    """Yields the body as it arrives."""
    read = getattr(answer.raw, "read1", answer.raw.read)
    while block := read(_BLOCK):
        yield block


@contextmanager
def _answer(url: str, span: str) -> Iterator[Any]:
    """Requests a range of a file; yields an answer whose body is read later."""
    import requests
    import urllib3

    try:
        with _session(os.getpid()).get(
            url, headers={**_HEADERS, "Range": span}, stream=True, timeout=(_CONNECT, _SILENCE)
        ) as answer:
            if url.startswith("https:") and any(not one.url.startswith("https:") for one in (*answer.history, answer)):
                raise PermissionError("the server redirects to a connection without encryption")
            if answer.status_code in (404, 410):
                raise FileNotFoundError(f"status {answer.status_code}")
            if answer.status_code in (401, 403, 407):
                raise PermissionError(f"status {answer.status_code}: {answer.reason}")
            if answer.status_code not in (200, 206):
                raise OSError(f"status {answer.status_code}: {answer.reason}")
            yield answer
    except urllib3.exceptions.HTTPError as error:
        raise OSError(f"the connection was lost: {error}") from error
    except (requests.ConnectionError, requests.Timeout) as error:
        reason = getattr(error.args[0] if error.args else None, "reason", error)
        raise ConnectionError(f"no connection: {reason}") from error
    except requests.RequestException as error:  # a wrong URL, too many redirects
        raise PermissionError(str(error)) from error


@cache
def _session(process: int) -> Any:
    """Returns the connections of a process, which a forked process must not share."""
    import requests

    session = requests.Session()
    session.max_redirects = 10
    for prefix in ("http://", "https://"):
        session.mount(prefix, requests.adapters.HTTPAdapter(pool_connections=8, pool_maxsize=_CONNECTIONS))
    return session
