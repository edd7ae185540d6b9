"""A store in a bucket: a real S3 server on this machine, which also refuses, drops connections and truncates answers."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs", reason="pip install s3fs 'moto[server]'")
pytest.importorskip("moto.server", reason="pip install s3fs 'moto[server]'")

import fkd_ssl
from fkd_ssl import fetching
from fkd_ssl.errors import FetchError, FkdError, NotFoundError
from fkd_ssl.store import Store, open_store
from fkd_ssl.store.exchange import upload
from fkd_ssl.store.maintain.verify import verify
from tests.store.test_remote import contents, made, publish
from tests.test_images_remote import BUCKET, Server, environment, s3, server

__all__ = ["environment", "s3", "server"]  # fixtures
URL = f"s3://{BUCKET}/stores/set"


@pytest.fixture
def store(tmp_path: Path, server: Server, s3: Any) -> Store:
    made.make(tmp_path / "store", ("SQ8", "hard"))
    if not s3.exists(BUCKET):
        s3.mkdir(BUCKET)
    if s3.exists(f"{BUCKET}/stores"):
        s3.rm(f"{BUCKET}/stores", recursive=True)
    return open_store(tmp_path / "store")


def test_a_store_in_a_bucket_is_the_same_store(store: Store, server: Server, tmp_path: Path) -> None:
    first = publish(store, URL)
    assert first.sent == len(first.files.files)
    assert publish(store, URL).sent == 0
    opened = open_store(URL)
    assert contents(opened) == contents(store)
    assert verify(opened).problems == []
    assert contents(fkd_ssl.pull(URL, out=tmp_path / "copy").store) == contents(store)


@pytest.mark.parametrize("harm", ["drop", "slow", "truncate"])
def test_a_request_that_fails_is_repeated(store: Store, server: Server, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, URL)
    monkeypatch.setattr(server, "suffixes", (".npy", ".txt", ".json"))
    server.harms[:] = [harm] * 3
    assert contents(open_store(URL)) == contents(store)
    assert server.harms == []


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("s3://no-such-bucket/set", NotFoundError, "^s3://no-such-bucket/set: not a published store .*; check the URL"),
        (f"s3://{BUCKET}/nothing", NotFoundError, "nothing: not a published store"),
    ],
)
def test_a_wrong_url_is_named(store: Store, url: str, kind: type[FkdError], message: str) -> None:
    with pytest.raises(kind, match=message):
        open_store(url)


def test_no_bucket_is_made(store: Store) -> None:
    with pytest.raises(
        FetchError, match=r"s3://no-such-bucket/set/manifest\.json: not found; check the URL, and the credentials"
    ):
        publish(store, "s3://no-such-bucket/set")


def test_an_expired_token_is_named_and_not_shown(store: Store, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, URL)
    monkeypatch.setattr(server, "suffixes", (".txt",))
    server.harms[:] = ["refuse"] * 100
    with pytest.raises(FetchError, match=r"set/files\.txt: The provided token has expired") as caught:
        open_store(URL)
    server.harms.clear()
    assert "secret" not in str(caught.value)


def test_no_connection(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fetching._filesystem_of.cache_clear()
    with pytest.raises(FetchError, match=r"files\.txt: cannot be fetched after 5 attempts: Could not connect to the endpoint"):
        open_store(URL)


def test_a_killed_call_continues(store: Store, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    real, count = s3fs.S3FileSystem._put_file, 0

    async def put(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > 6:
            raise PermissionError("Access Denied")
        return await real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(upload, "_SENDERS", 1)
        patch.setattr(s3fs.S3FileSystem, "_put_file", put)
        with pytest.raises(FetchError, match=r"stores/set/.*: Access Denied; check the URL, and the credentials in the env"):
            publish(store, URL)
    fetching._filesystem_of.cache_clear()
    with pytest.raises(NotFoundError, match="run the same fkd-ssl publish again"):
        open_store(URL)
    done = publish(store, URL)
    assert len(done.files.files) - 6 <= done.sent < len(done.files.files)
    assert contents(open_store(URL)) == contents(store)
