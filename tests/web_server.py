"""A web server on the loopback address that serves a folder, also badly."""

import contextlib
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class WebServer:
    """Serves `root`. Tests choose what happens to the next requests of a path, or to all of them.

    Attributes:
        url: Of the root.
        root: The folder.
        harms: What happens to the next requests of a path, in turn; "" serves it.
        always: What happens to all requests of paths that match a regular expression.
        requests: Paths and ranges, in the order of arrival.
        latency: Seconds before each answer.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.harms: dict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.latency = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    outer.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that is killed
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def paths(self) -> list[str]:
        """The requested paths."""
        return [path for path, _ in self.requests]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.lstrip("/")
        span = request.headers.get("Range", "")
        self.requests.append((path, span))
        time.sleep(self.latency)
        harm = self.harms[path].pop(0) if self.harms[path] else ""
        harm = harm or next((harm for pattern, harm in self.always.items() if re.fullmatch(pattern, path)), "")
        if harm.isdecimal():
            self._send(request, int(harm), b"no")
        elif harm.startswith("redirect "):
            request.send_response(302)
            request.send_header("Location", harm.removeprefix("redirect "))
            request.send_header("Content-Length", "0")
            request.end_headers()
        elif harm == "drop":
            request.close_connection = True
            request.connection.close()
        elif harm == "endless":
            request.send_response(200)
            request.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    request.wfile.write(b"x" * 2**16)
        elif not (file := self.root / path).is_file():
            self._send(request, 404, b"missing")
        else:
            self._serve(request, file.read_bytes(), span, harm)

    def _serve(self, request: BaseHTTPRequestHandler, data: bytes, span: str, harm: str) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", span)
        if harm == "other":
            data = bytes(byte ^ 1 for byte in data)
        if match is None or harm == "whole":
            self._send(request, 200, data)
            return
        first, last = int(match[1]), int(match[2])
        part = data[first : last + 1]
        about = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}
        if harm == "truncate":
            about["Connection"] = "close"
            self._send(request, 206, part[:-1], about)
        elif harm == "cut":  # less than the stated length
            self._send(request, 206, part[: len(part) // 2], {**about, "Content-Length": str(len(part))})
            request.close_connection = True
        else:
            self._send(request, 206, part, about)

    def _send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, about: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(about or {})}.items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(body)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def serving(root: Path) -> Iterator[WebServer]:
    """Starts a server and stops it at the end of the block."""
    server = WebServer(root)
    try:
        yield server
    finally:
        server.stop()
