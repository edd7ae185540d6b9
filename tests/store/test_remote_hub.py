"""A store and images on the Hugging Face Hub: through huggingface_hub, with a Hub on this machine."""

import hashlib
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

pytest.importorskip("huggingface_hub", reason="pip install 'fkd_ssl[remote]'")

from huggingface_hub import HfApi
from huggingface_hub.utils import _http

import fkd_ssl
from fkd_ssl import fetching
from fkd_ssl.errors import FetchError, ImageAccessError, NotFoundError, RequestError
from fkd_ssl.fetching import fetched_folder
from fkd_ssl.images import open_images, scan
from fkd_ssl.store import Store, open_store
from fkd_ssl.store.exchange import upload
from fkd_ssl.store.maintain.verify import verify
from tests.hub_server import NAME, READER, SIGNATURE, URL, HubServer, Refused, Repository, hub
from tests.store.test_remote import contents, made, publish
from tests.test_images_shards import contents as images_of
from tests.test_images_shards import table, write_tar

__all__ = ["hub"]  # a fixture


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made.make(tmp_path / "store", ("SQ8", "hard"))
    return open_store(tmp_path / "store")


def own(store: Store) -> dict[str, bytes]:
    return {path.relative_to(store.folder).as_posix(): path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("inside", ["", "/sets/one"])
def test_a_published_store_is_the_same_store(store: Store, hub: HubServer, inside: str, tmp_path: Path) -> None:
    hub.repositories[NAME].files["notes.txt"] = ("regular", b"mine")
    if not inside:
        del hub.repositories[NAME].files["notes.txt"]
        hub.repositories[NAME].files[".gitattributes"] = ("regular", b"*.npy filter=lfs")
    first = publish(store, URL + inside)
    assert first.sent == len(first.files.files) == len(own(store))
    there = hub.files(NAME)
    assert {path: there[f"{inside}/{path}".lstrip("/")] for path in own(store)} == own(store)
    assert len(hub.repositories[NAME].commits) == 3  # the manifest, the other files, and the list with the card
    assert contents(open_store(URL + inside)) == contents(store)  # in the same process, which has listed the folder before
    assert verify(open_store(URL + inside)).problems == []
    assert contents(fkd_ssl.pull(URL + inside, out=tmp_path / "copy").store) == contents(store)
    hub.requests.clear()
    assert publish(store, URL + inside).sent == 0
    assert hub.uploads() == []


def test_a_public_store_needs_no_token(store: Store, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, URL)
    hub.repositories[NAME].private = False
    monkeypatch.delenv("HF_TOKEN")
    assert contents(open_store(URL)) == contents(store)


def test_long_listings_and_large_files(store: Store, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings of several pages, uploads in parts, several commits, and downloads in pieces."""
    hub.page, hub.part = 3, 100
    monkeypatch.setattr(upload, "_COMMIT", 2)
    assert publish(store, URL).sent > 0
    assert any("part" in path or hub.parts == {} for path in hub.uploads())
    assert hub.files(NAME).items() >= own(store).items()
    monkeypatch.setattr(fetching, "PIECE", 100)
    hub.read.clear()
    assert contents(open_store(URL)) == contents(store)
    for path, data in own(store).items():
        spans = sorted(tuple(map(int, re.findall(r"\d+", span))) for read, span in hub.read if read == path)
        assert spans == [(k, min(k + 101, len(data)) - 1) for k in range(0, len(data), 100)]  # fsspec asks for one byte more
    assert publish(store, URL).sent == 0


def test_a_store_that_grew_in_a_running_process(store: Store, hub: HubServer, tmp_path: Path) -> None:
    publish(store, URL)
    assert open_store(URL).column_names == store.column_names
    made.make(tmp_path / "more", ("SQ8", "hard", "Flat"))
    more = open_store(tmp_path / "more")
    before = len(hub.uploads())
    done = publish(more, URL)
    assert done.sent == 5  # meta.json, two shards with sidecars
    assert len(hub.uploads()) == before + 2
    assert contents(open_store(URL)) == contents(more)
    with pytest.raises(RequestError, match="holds another store, or a changed one"):
        publish(store, URL)
    publish(store, URL, overwrite=True)
    assert hub.repositories[NAME].commits[-1] == "Add 2 files of a store of fkd_ssl"  # and removes five, in one commit
    assert hub.files(NAME).keys() == {*own(store), "README.md", "files.txt"}
    assert contents(open_store(URL)) == contents(store)


@pytest.mark.parametrize("at", ["upload", "second commit", "third commit", "last"])
def test_a_killed_upload_continues(store: Store, hub: HubServer, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    monkeypatch.setattr(upload, "_COMMIT", 4)
    seen: list[str] = []

    def stop(method: str, path: str) -> None:
        kind = "upload" if method == "PUT" else path.split("/")[-2]
        seen.append(kind)
        stops = {"upload": ("upload", 3), "second commit": ("commit", 2), "third commit": ("commit", 3), "last": ("api", 1)}
        if (kind, seen.count(kind)) == stops[at]:
            raise Refused(403, "Stop")

    hub.harms = stop
    with pytest.raises(FetchError, match="Stop; check the URL, and the credentials in the environment"):
        publish(store, URL)
    hub.harms = lambda method, path: None
    with pytest.raises(NotFoundError, match="run the same fkd-ssl publish again"):
        open_store(URL)
    done = publish(store, URL)
    assert done.sent == len(own(store)) - {"upload": 5, "second commit": 1, "third commit": 5, "last": len(own(store))}[at]
    assert hub.files(NAME).items() >= own(store).items()
    objects = [path for path in hub.uploads() if path.removeprefix("/storage/") in hub.objects]
    assert len(objects) - len(set(objects)) <= (1 if at == "upload" else 0)  # only the refused one is sent again
    assert contents(open_store(URL)) == contents(store)


def test_a_commit_whose_answer_is_lost(store: Store, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    hub.loses = lambda method, path: "/commit/" in path and not lost.append(path) and len(lost) % 2 == 1
    publish(store, URL)
    assert len(lost) == 6  # each commit was repeated
    assert hub.files(NAME).keys() == {*own(store), "README.md", "files.txt"}
    assert contents(open_store(URL)) == contents(store)


def test_a_server_that_fails_now_and_then(store: Store, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    count = 0

    def fail(method: str, path: str) -> None:
        nonlocal count
        count += 1
        if count % 3 == 0:
            raise Refused(503, "Try again") if count % 2 else ConnectionResetError

    hub.harms = fail
    publish(store, URL)
    assert contents(open_store(URL)) == contents(store)
    hub.harms = lambda method, path: None
    assert hub.files(NAME).items() >= own(store).items()


@pytest.mark.parametrize("token", ["", "hf_secret-and-wrong", READER])
def test_a_token_that_may_not_write(
    store: Store, hub: HubServer, token: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    caplog.set_level(logging.DEBUG)
    message = {"": "no such repository, or no access", READER: "you must use a write token"}.get(token, "Invalid credentials")
    with pytest.raises((FetchError, RequestError), match=message) as caught:
        publish(store, URL)
    assert len(hub.requests) < 10  # it does not try again
    assert hub.repositories[NAME].commits == []
    assert "secret" not in str(caught.value) + caplog.text


@pytest.mark.parametrize("token", ["", "hf_secret-and-wrong"])
def test_a_token_that_may_not_read(store: Store, hub: HubServer, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, URL)
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", token)
    kind, message = (FetchError, "Invalid credentials in Authorization header") if token else (NotFoundError, "not found")
    with pytest.raises(kind, match=f"{message}.*credentials in the environment") as caught:
        open_store(URL)
    assert len(hub.requests) < 10
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert contents(open_store(URL)) == contents(store)


@pytest.mark.parametrize("url", ["hf://datasets/me/other", "hf://datasets/me/targets@nowhere", "hf://datasets/alone", "hf://a"])
def test_a_repository_that_is_missing(store: Store, hub: HubServer, url: str) -> None:
    with pytest.raises(RequestError, match=f"^{url}: .*; log in with `hf auth login`, and create the repository first"):
        publish(store, url)
    with pytest.raises(NotFoundError, match=f"^{url}: not a published store"):
        open_store(url)
    hub.repositories["me/other"] = Repository()
    if url.endswith("other"):
        publish(store, url)  # in the same process
        assert contents(open_store(url)) == contents(store)


def test_a_signed_link_is_not_shown(store: Store, hub: HubServer) -> None:
    publish(store, URL)
    opened = open_store(URL)

    def refuse(method: str, path: str) -> None:
        if path.startswith("/storage/"):
            raise Refused(403, "Request has expired")

    hub.harms = refuse
    with pytest.raises(FetchError, match=r"crops/0000\d\.npy: Request has expired; check the URL") as caught:
        contents(opened)
    assert SIGNATURE not in str(caught.value)


def test_images_on_the_hub(hub: HubServer, image_folder: Path, tmp_path: Path, make_store: Any) -> None:
    folder = scan(image_folder)
    named = list(images_of(folder).items())
    api = HfApi()
    for k in range(3):
        write_tar(tmp_path / f"{k}.tar", dict(named[8 * k : 8 * k + 8]))
        api.upload_file(path_or_fileobj=tmp_path / f"{k}.tar", path_in_repo=f"set/{k}.tar", repo_id=NAME, repo_type="dataset")
    pq.write_table(table(folder, range(24)), tmp_path / "a.parquet", row_group_size=5)
    api.upload_file(path_or_fileobj=tmp_path / "a.parquet", path_in_repo="data/a.parquet", repo_id=NAME, repo_type="dataset")
    hub.read.clear()
    for spec in (f"{URL}/set/{{0..2}}.tar", f"{URL}/set/*.tar", f"{URL}/data/*.parquet", f"{URL}@main/data/a.parquet"):
        source = open_images(spec)
        assert (source.names, source.classes, source.digest()) == (folder.names, folder.classes, folder.digest())
    assert sorted(path for path, _ in hub.read) == ["data/a.parquet"] * 2 + ["set/0.tar", "set/1.tar", "set/2.tar"]
    make_store(tmp_path / "one", images=f"{URL}/set/*.tar")
    make_store(tmp_path / "other", images=image_folder)
    assert own(open_store(tmp_path / "one")) == own(open_store(tmp_path / "other"))


def test_an_image_file_that_changes_at_equal_size(hub: HubServer, image_folder: Path, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "0.tar", dict(list(images_of(scan(image_folder)).items())[:8]))
    data = tar.read_bytes()
    hub.repositories[NAME].files["0.tar"] = ("lfs", data)
    hub.objects[hashlib.sha256(data).hexdigest()] = data
    source = open_images(f"{URL}/0.tar")
    other = data[:700] + bytes([data[700] ^ 1]) + data[701:]
    hub.objects[hashlib.sha256(other).hexdigest()] = other
    hub.repositories[NAME].files["0.tar"] = ("lfs", other)
    shutil.rmtree(fetched_folder())
    with pytest.raises(ImageAccessError, match=r"0\.tar: the file changed since it was listed; run the command again"):
        source.read(0)
    assert open_images(f"{URL}/0.tar").read(0) != data
