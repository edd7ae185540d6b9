"""Downloads from a real HTTP server on 127.0.0.1, which cuts connections, ignores Range, changes its file, or lies."""

import hashlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fkd_ssl import files
from fkd_ssl.errors import CheckpointError, FkdError, RequestError
from fkd_ssl.teachers import PRESETS, Preset, fetch

CONTENT = bytes(range(256)) * 12_000  # 3 MB: several pieces


class Server:
    """Serves one file at /model.pth.tar and records each request; tests set its next behaviour."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.ranges = True
        self.length = True
        self.kind = "application/octet-stream"
        self.cuts: list[int] = []
        """Bytes after which the next connections are cut."""
        self.status = 200
        self.chunk_pause = 0.0
        self.shift = 0
        self.says_range = True
        self.says_length: str | None = None
        self.seen: list[str | None] = []
        """The Range of each request."""
        self.sent = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/model.pth.tar"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.seen.append(asked)
        if self.status != 200:
            handler.send_error(self.status)
            return
        start = 0
        same = handler.headers.get("If-Range") in (None, self.etag)
        if asked and self.ranges and same:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.content):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(self.content)}")
                handler.end_headers()
                return
            handler.send_response(206)
            span = f"bytes {start + self.shift}-{len(self.content) - 1}/{len(self.content)}"
            handler.send_header("Content-Range", span if self.says_range else "bytes")
        else:
            handler.send_response(200)
        if self.etag:
            handler.send_header("ETag", self.etag)
        handler.send_header("Content-Type", self.kind)
        if self.length:
            handler.send_header("Content-Length", self.says_length or str(len(self.content) - start))
        handler.end_headers()
        body = self.content[start:]
        if self.cuts:
            body = body[: self.cuts.pop(0)]
        for first in range(0, len(body), 100_000):
            try:
                handler.wfile.write(body[first : first + 100_000])
            except OSError:
                return
            self.sent += len(body[first : first + 100_000])
            time.sleep(self.chunk_pause)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def preset(server: Server) -> Preset:
    return replace(
        PRESETS["mocov2_r50_800ep"],
        url=server.url,
        size=len(CONTENT),
        md5=hashlib.md5(CONTENT).hexdigest()[:8],  # noqa: S324
    )


def part_of(cache: Path, etag: str = '"one"') -> Path:
    return cache / f"model.pth.tar.{hashlib.sha256(etag.encode()).hexdigest()[:8]}.part"


def get(preset: Preset, cache: Path, **options: Any) -> Path:
    return fetch.fetch(preset, cache=cache, pause=0.001, **options)


def test_a_file_is_downloaded_whole_and_once(server: Server, preset: Preset, tmp_path: Path) -> None:
    progress: list[tuple[int, int | None]] = []
    checked: list[Path] = []
    path = get(preset, tmp_path / "new" / "cache", progress=lambda *at: progress.append(at), check=checked.append)
    assert path == tmp_path / "new" / "cache" / "model.pth.tar"
    assert path.read_bytes() == CONTENT
    assert progress[-1] == (len(CONTENT), len(CONTENT))
    assert checked == [part_of(path.parent)]  # before it has its name
    assert get(preset, path.parent, check=checked.append) == path
    assert checked[-1] == path
    assert server.seen == [None]
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.pth.tar"]


def test_cut_connections_are_continued(server: Server, preset: Preset, tmp_path: Path) -> None:
    server.cuts = [1_000_000, 0, 500_000]
    assert get(preset, tmp_path).read_bytes() == CONTENT
    assert [asked for asked in server.seen if asked] == ["bytes=1000000-", "bytes=1500000-"]


def test_a_later_call_continues_what_an_earlier_one_left(server: Server, preset: Preset, tmp_path: Path) -> None:
    server.cuts = [1_000_000, *[0] * 8]
    said = (
        r"cannot be downloaded: the connection broke; 1,000,000 bytes are kept and the same command continues\. Without a "
        rf"network: download {server.url} \(licence: .*\) .* put it at {tmp_path}/model\.pth\.tar, or pass it as --checkpoint"
    )
    with pytest.raises(FkdError, match=said):
        get(preset, tmp_path)
    assert not fetch.find(preset, tmp_path)
    assert [path.stat().st_size for path in fetch.parts(preset, tmp_path)] == [1_000_000]
    server.cuts = []
    assert get(preset, tmp_path).read_bytes() == CONTENT
    assert server.seen[-1] == "bytes=1000000-"


@pytest.mark.parametrize(("etag", "ranges"), [(None, True), ('W/"weak"', True), ('"one"', False)])
def test_a_server_that_cannot_continue_starts_anew(
    server: Server, preset: Preset, tmp_path: Path, etag: str | None, ranges: bool
) -> None:
    server.etag, server.ranges = etag, ranges
    server.cuts = [1_000_000]
    assert get(preset, tmp_path).read_bytes() == CONTENT


def test_a_file_that_has_changed_meanwhile_comes_from_its_start(server: Server, preset: Preset, tmp_path: Path) -> None:
    server.content, server.etag = b"old" * 1_000_000, '"old"'
    server.cuts = [1_000_000, *[0] * 8]
    with pytest.raises(FkdError, match=r"the connection broke"):
        get(replace(preset, size=None), tmp_path)
    server.content, server.etag, server.cuts = CONTENT, '"new"', []
    assert get(preset, tmp_path).read_bytes() == CONTENT
    assert not fetch.parts(preset, tmp_path)


def test_a_whole_part_of_a_killed_process_is_taken(server: Server, preset: Preset, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(CONTENT)
    assert get(preset, tmp_path).read_bytes() == CONTENT
    assert server.seen == [None]


@pytest.mark.parametrize(("shift", "says", "span"), [(7, True, r"bytes 1000007-\S+"), (0, False, "bytes")])
def test_a_part_of_another_place_is_not_appended(
    server: Server, preset: Preset, tmp_path: Path, shift: int, says: bool, span: str
) -> None:
    server.cuts, server.shift, server.says_range = [1_000_000], shift, says
    with pytest.raises(FkdError, match=rf"the server sent {span} instead of bytes 1000000-"):
        get(preset, tmp_path)
    assert part_of(tmp_path).read_bytes() == CONTENT[:1_000_000]


def test_a_web_page_is_not_taken_for_the_file(server: Server, preset: Preset, tmp_path: Path) -> None:
    part_of(tmp_path).write_bytes(CONTENT[:1000])
    server.kind, server.content = "text/html", b"<p>please log in"
    with pytest.raises(FkdError, match="received a web page instead of the file"):
        get(preset, tmp_path)
    assert part_of(tmp_path).read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("length", ["abc", "-1", "\u00b2", "9" * 5000])
def test_a_length_that_is_not_a_number_is_as_none(server: Server, preset: Preset, tmp_path: Path, length: str) -> None:
    server.says_length = length
    assert get(preset, tmp_path).read_bytes() == CONTENT


def test_a_server_that_sends_a_byte_an_answer_is_given_up(server: Server, preset: Preset, tmp_path: Path) -> None:
    server.cuts = [1] * 1000
    with pytest.raises(FkdError, match=r"the connection broke; \d bytes are kept"):
        get(preset, tmp_path)
    assert len(server.seen) < 12


def test_a_server_that_dribbles_is_given_up(
    server: Server, preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_TIMEOUT", 0.2)
    monkeypatch.setattr(fetch, "_MIN_SPEED", 2**30)
    server.chunk_pause = 0.05
    with pytest.raises(FkdError, match=r"under 1,073,741,824 bytes a second"):
        get(preset, tmp_path)


def test_a_server_without_an_end_is_given_up(
    server: Server, preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_MAX_BYTES", 2_000_000)
    server.length = False
    with pytest.raises(CheckpointError, match=r"the server sends more than 2,000,000 bytes"):
        get(replace(preset, size=None), tmp_path)
    assert not fetch.parts(preset, tmp_path)


def test_an_answer_that_is_not_http_gives_one_line(preset: Preset, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"220 hello\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/model.pth.tar"
        with pytest.raises(FkdError, match=r"cannot be downloaded: .*Without a network") as caught:
            get(replace(preset, url=url), tmp_path)
        assert "\n" not in str(caught.value)


def test_a_server_that_ignores_range_and_always_breaks_is_given_up(server: Server, preset: Preset, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [1_000_000] * 50
    with pytest.raises(FkdError, match=r"the connection broke"):
        get(preset, tmp_path)
    assert len(server.seen) < 10


def test_a_length_that_the_server_does_not_say(server: Server, preset: Preset, tmp_path: Path) -> None:
    server.length = False
    assert get(preset, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("length", [True, False])
def test_a_wrong_size_is_refused(server: Server, preset: Preset, tmp_path: Path, length: bool) -> None:
    server.length = length
    with pytest.raises(CheckpointError, match=r"(3,072,000 bytes, expected 5|sends more than 5 bytes): another file"):
        get(replace(preset, size=5, md5=None), tmp_path)
    assert fetch.find(preset, tmp_path) is None
    assert not part_of(tmp_path).exists()


def test_a_wrong_digest_is_refused_and_deleted(server: Server, preset: Preset, tmp_path: Path) -> None:
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(CheckpointError, match=rf"its md5 begins with [0-9a-f]{{8}}, that of model.pth.tar with {preset.md5}"):
        get(preset, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == []
    server.content = CONTENT
    assert get(preset, tmp_path).read_bytes() == CONTENT


def test_what_the_check_refuses_is_deleted(preset: Preset, tmp_path: Path) -> None:
    def check(path: Path) -> None:
        raise CheckpointError("a web page")

    with pytest.raises(CheckpointError, match=r"a web page"):
        get(preset, tmp_path, check=check)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_users_own_file_is_checked_and_never_replaced(server: Server, preset: Preset, tmp_path: Path) -> None:
    (tmp_path / "model.pth.tar").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"4 bytes, model\.pth\.tar has 3,072,000: another file; delete it and fetch"):
        get(preset, tmp_path)
    assert (tmp_path / "model.pth.tar").read_bytes() == b"mine"
    assert server.seen == []


def test_a_file_put_there_by_hand_meanwhile_stays(preset: Preset, tmp_path: Path) -> None:
    def check(path: Path) -> None:
        if path.suffix == ".part":
            (tmp_path / "model.pth.tar").write_bytes(b"mine")

    assert get(preset, tmp_path, check=check).read_bytes() == b"mine"
    assert not part_of(tmp_path).exists()


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (500, 5), (503, 5)])
def test_errors_of_the_server_are_told(server: Server, preset: Preset, tmp_path: Path, status: int, requests: int) -> None:
    server.status = status
    with pytest.raises(FkdError, match=rf"the server answers {status} .*download {server.url}.* put it at {tmp_path}/model"):
        get(preset, tmp_path)
    assert len(server.seen) == requests


def test_no_network(preset: Preset, tmp_path: Path) -> None:
    closed = replace(preset, url="http://127.0.0.1:1/model.pth.tar")
    with pytest.raises(FkdError, match=r"refused\. Without a network: download http.* put it at .*/model\.pth\.tar"):
        get(closed, tmp_path)
    started = time.perf_counter()
    nowhere = replace(preset, url="http://no-such-host.invalid/model.pth.tar")
    with pytest.raises(FkdError, match=r"cannot be downloaded: .*Without a network"):
        fetch.fetch(nowhere, cache=tmp_path, pause=60)  # an unknown host is not tried again
    assert time.perf_counter() - started < 50


def test_https_is_not_left(preset: Preset, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fetch.urllib.request.urlopen

    def redirected(request: Any, timeout: float) -> Any:
        return real(server.url, timeout=timeout)

    monkeypatch.setattr(fetch.urllib.request, "urlopen", redirected)
    with pytest.raises(FkdError, match=r"redirects to http://127.*, which is not https"):
        get(replace(preset, url="https://127.0.0.1/model.pth.tar"), tmp_path)


def test_a_full_disk_is_told_before(preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FkdError, match=r"3,072,000 more bytes, and the disk has 1,000 free"):
        get(preset, tmp_path)


def test_a_killed_process_is_continued_and_two_do_not_mix(server: Server, preset: Preset, tmp_path: Path) -> None:
    server.chunk_pause = 0.05
    code = (
        "import sys, dataclasses; from fkd_ssl.teachers import fetch; from fkd_ssl.teachers.presets import PRESETS\n"
        "preset = dataclasses.replace(PRESETS['mocov2_r50_800ep'], url=sys.argv[1], md5=None)\n"
        "fetch.fetch(preset, cache=sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path)])
    part = part_of(tmp_path)
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 300_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(RequestError, match=r"another process is downloading it now"):
        get(preset, tmp_path)
    process.kill()
    process.wait()
    size = part.stat().st_size
    assert 300_000 < size < len(CONTENT)
    server.chunk_pause = 0
    assert get(preset, tmp_path).read_bytes() == CONTENT
    assert server.seen == [None, None, f"bytes={size}-"]


def test_where_the_cache_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FKD_SSL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "fkd_ssl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert files.cache_folder() == tmp_path / "x" / "fkd_ssl"
    monkeypatch.setenv("FKD_SSL_CACHE", "~/mine")
    assert files.cache_folder() == tmp_path / "mine"
    assert files.cache_folder("given") == Path("given")
