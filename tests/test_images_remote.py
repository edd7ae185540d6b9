"""Images in an object store: a real S3 server on this machine, which also drops connections, is slow and truncates answers."""

import logging
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("s3fs", reason="pip install s3fs 'moto[server]'")
pytest.importorskip("moto.server", reason="pip install s3fs 'moto[server]'")

import fsspec
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from fkd_ssl import fetching
from fkd_ssl.errors import ImageAccessError, RequestError
from fkd_ssl.fetching import fetched_folder
from fkd_ssl.images import open_images, scan
from tests.test_images_shards import contents, table, write_tar

Answer = Callable[..., Any]
BUCKET = "pictures"


class Server:
    """moto's S3 server. Tests choose how it answers a GET of an object."""

    def __init__(self) -> None:
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Silent)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.harms: list[str] = []  # what happens to the next reads of an object, in turn
        self.reads: list[str] = []  # paths and ranges
        self.suffixes: tuple[str, ...] = (".tar", ".parquet")  # of the objects that `harms` is about
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()

    def _answer(self, environ: dict[str, Any], start: Answer) -> Any:
        is_read = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(self.suffixes)
        if not is_read:
            return self._s3(environ, start)
        self.reads.append(f"{environ['PATH_INFO']} {environ.get('HTTP_RANGE', '')}")
        harm = self.harms.pop(0) if self.harms else ""
        if harm == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if harm == "slow":
            time.sleep(0.3)
        if harm == "truncate":
            found: dict[str, Any] = {}

            def note(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
                found.update(status=status, headers=headers)

            body = b"".join(self._s3(environ, note))[:-50]
            kept = [(k, v) for k, v in found["headers"] if k.lower() != "content-length"]
            start(found["status"], [*kept, ("Content-Length", str(len(body)))])
            return [body]
        if harm == "refuse":
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"]
        if harm == "deny":
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        return self._s3(environ, start)


class Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = Server()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def environment(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.url,
        "AWS_MAX_ATTEMPTS": "1",  # of botocore's own, which waits longer between them
        "FKD_SSL_CACHE": str(tmp_path_factory.mktemp("cache")),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fetching, "PAUSE", 0.01)
    fetching._filesystem_of.cache_clear()


@pytest.fixture
def s3(environment: None) -> Any:
    return fsspec.filesystem("s3", skip_instance_cache=True)


@pytest.fixture
def three_tars(s3: Any, server: Server, image_folder: Path, tmp_path: Path) -> str:
    """Uploads three tars with the images of a folder in their order, and returns their pattern."""
    named = list(contents(scan(image_folder)).items())
    if not s3.exists(BUCKET):  # moto keeps it for all servers of this process
        s3.mkdir(BUCKET)
    for k in range(3):
        s3.put_file(str(write_tar(tmp_path / f"{k}.tar", dict(named[8 * k : 8 * k + 8]))), f"{BUCKET}/set/{k}.tar")
    server.harms.clear()
    server.reads.clear()
    return f"s3://{BUCKET}/set/{{0..2}}.tar"


def test_the_same_images_are_the_same_set(three_tars: str, image_folder: Path, s3: Any, server: Server, tmp_path: Path) -> None:
    folder = scan(image_folder)
    for spec in (three_tars, f"s3://{BUCKET}/set/*.tar"):
        source = open_images(spec)
        assert (source.names, source.classes, source.digest()) == (folder.names, folder.classes, folder.digest())
    assert len(server.reads) == 3  # each tar was fetched once
    pq.write_table(table(folder, range(24)), tmp_path / "a.parquet", row_group_size=5)
    s3.put_file(str(tmp_path / "a.parquet"), f"{BUCKET}/a.parquet")
    assert open_images(f"s3://{BUCKET}/a.parquet#image=image").digest() == folder.digest()


def test_a_tar_that_is_fetched_and_indexed_is_not_fetched_again(three_tars: str, server: Server) -> None:
    open_images(three_tars)
    server.reads.clear()
    contents(open_images(three_tars))
    assert server.reads == []
    for path in fetched_folder().iterdir():
        path.unlink()
    source = open_images(three_tars)
    assert server.reads == []  # the positions are kept
    source.read(9)
    assert [read.split()[0] for read in server.reads] == [f"/{BUCKET}/set/1.tar"]


@pytest.mark.parametrize("harm", ["drop", "slow", "truncate"])
def test_a_request_that_fails_is_repeated(three_tars: str, server: Server, image_folder: Path, harm: str) -> None:
    server.harms += [harm] * 3
    assert open_images(three_tars).digest() == scan(image_folder).digest()
    assert server.harms == []


def test_a_request_that_fails_always_names_the_file(three_tars: str, server: Server) -> None:
    server.harms += ["truncate"] * 100
    with pytest.raises(ImageAccessError, match=rf"s3://{BUCKET}/set/0\.tar: cannot be fetched after 5 attempts: "):
        open_images(three_tars)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"s3://{BUCKET}/set/9.tar", r"set/9\.tar: not found; check the URL, and the credentials in the environment"),
        ("s3://no-such-bucket/a.tar", r"s3://no-such-bucket/a\.tar: not found"),
        (f"s3://{BUCKET}/other/*.tar", "matches no file"),
        (f"s3://{BUCKET}/set", "a URL must name tars or Parquet files"),
        ("nonsense://a/b.tar", "nonsense://: Protocol not known"),
        ("https://me:secret@server/a", r"^https://server/a: a URL with credentials"),
        ("s3://me:very/secret@server/a.tar", r"^s3://\.\.\.: a URL with credentials"),
        ("https://[server/a.tar", r"^https://\[server/a\.tar: not a valid URL"),
        ("https://me:secret@server/a.tar", r"^https://server/a\.tar: a URL with credentials"),
        ("https://server/a.tar?X-Amz-Signature=secret", r"^https://server/a\.tar: a URL with credentials"),
    ],
)
def test_a_wrong_url_is_named(three_tars: str, spec: str, message: str) -> None:
    with pytest.raises((RequestError, ImageAccessError), match=message) as caught:
        open_images(spec)
    assert "secret" not in str(caught.value)


def test_an_expired_token_is_named_and_not_shown(three_tars: str, server: Server) -> None:
    server.harms += ["refuse"] * 100
    with pytest.raises(ImageAccessError, match=r"set/0\.tar: The provided token has expired") as caught:
        open_images(three_tars)
    assert "secret" not in str(caught.value)


def test_no_permission_is_named_at_once(three_tars: str, server: Server) -> None:
    server.harms += ["deny"] * 100
    with pytest.raises(ImageAccessError, match=r"set/0\.tar: .*(denied|Denied|Forbidden).*credentials in the environment"):
        open_images(three_tars)
    assert len(server.reads) == 1


def test_an_interrupted_fetch_continues(
    three_tars: str, server: Server, monkeypatch: pytest.MonkeyPatch, image_folder: Path
) -> None:
    monkeypatch.setattr(fetching, "PIECE", 10_000)
    monkeypatch.setattr(fetching, "TRIES", 1)
    server.harms += ["", "", "truncate"]
    with pytest.raises(ImageAccessError, match="after 1 attempts"):
        open_images(three_tars)
    server.reads.clear()
    assert open_images(three_tars).digest() == scan(image_folder).digest()
    assert server.reads[0].endswith(" bytes=20000-29999")


def test_a_file_that_changes_on_the_server(three_tars: str, s3: Any, image_folder: Path, tmp_path: Path) -> None:
    source = open_images(three_tars)
    other = write_tar(tmp_path / "other.tar", dict(list(contents(scan(image_folder)).items())[:2]))
    s3.put_file(str(other), f"{BUCKET}/set/0.tar")
    assert len(source.read(0)) > 100  # what was fetched stays as it was
    assert len(open_images(three_tars)) == 18  # a new command sees the new file
    for path in fetched_folder().iterdir():
        path.unlink()
    with pytest.raises(ImageAccessError, match=r"set/0\.tar: (the file changed since it was listed|cannot be fetched)"):
        source.read(0)


def test_the_cache_is_bounded(three_tars: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_images(three_tars)
    largest = max(path.stat().st_size for path in fetched_folder().iterdir())
    monkeypatch.setenv("FKD_SSL_CACHE_BYTES", str(2 * largest))
    server.reads.clear()
    for path in fetched_folder().iterdir():
        path.unlink()
    for image in (0, 8, 0, 16, 0):  # the tars 0 1 0 2 0: the third replaces 1, which was not read for the longest time
        source.read(image)
        time.sleep(0.02)
        assert sum(path.stat().st_size for path in fetched_folder().iterdir() if path.suffix != ".lock") <= 2 * largest
    assert [read.split()[0][-5] for read in server.reads] == ["0", "1", "2"]
    monkeypatch.setenv("FKD_SSL_CACHE_BYTES", "inf")
    source.read(8)
    for path in fetched_folder().iterdir():
        path.unlink()
    monkeypatch.setenv("FKD_SSL_CACHE_BYTES", "much")
    with pytest.raises(RequestError, match="FKD_SSL_CACHE_BYTES=much: expected a number of bytes"):
        source.read(8)


def test_a_cache_folder_that_cannot_be_written(
    three_tars: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ImageAccessError, match=r"set/0\.tar: cannot be kept in .*/file/fetched: .*; make room there"):
        open_images(three_tars)


def test_a_fetch_that_is_killed_is_continued_by_another_process(
    three_tars: str, server: Server, monkeypatch: pytest.MonkeyPatch, image_folder: Path
) -> None:
    source = open_images(three_tars)
    for path in fetched_folder().iterdir():
        path.unlink()
    monkeypatch.setattr(fetching, "PIECE", 5_000)
    server.harms += [""] * 3 + ["slow"] * 40
    first, second = (multiprocessing.get_context("fork").Process(target=source.read, args=(0,)) for _ in range(2))
    first.start()
    while not any(path.stat().st_size for path in fetched_folder().glob("*.part")):
        time.sleep(0.01)
    second.start()  # waits for the first
    first.kill()
    first.join()
    server.harms.clear()
    second.join()
    assert second.exitcode == 0
    assert contents(source) == contents(scan(image_folder))


def test_processes_share_what_is_fetched(three_tars: str, server: Server, image_folder: Path) -> None:
    source = open_images(three_tars)
    for path in fetched_folder().iterdir():
        path.unlink()
    server.reads.clear()
    server.harms += ["slow"] * 3
    with multiprocessing.get_context("fork").Pool(3) as pool:
        read = pool.map(source.read, range(24), chunksize=1)
    assert read == list(contents(scan(image_folder)).values())
    assert sorted({name.split()[0][-5] for name in server.reads}) == ["0", "1", "2"]
    assert len(server.reads) == 3


def test_files_are_fetched_ahead(three_tars: str, server: Server) -> None:
    source = open_images(three_tars)
    for path in fetched_folder().iterdir():
        path.unlink()
    server.reads.clear()
    source.expect([2, 1, 2])
    end = time.monotonic() + 20
    while len([p for p in fetched_folder().iterdir() if not p.suffix]) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert sorted(read.split()[0][-5] for read in server.reads) == ["1", "2"]
    source.read(8)
    assert len(server.reads) == 2
    source.expect([1, 2])
    assert len(server.reads) == 2


def test_a_store_of_a_bucket_has_the_bytes_of_the_folders(
    three_tars: str, server: Server, image_folder: Path, tmp_path: Path, make_store: Any
) -> None:
    for images, store in ((three_tars, "one"), (image_folder, "other")):
        make_store(tmp_path / store, images=images)
    assert len(server.reads) == 3
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert files
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in files)
