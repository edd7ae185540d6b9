"""Stores at a URL: published, opened, copied; and servers that fail, or are hostile."""

import gc
import multiprocessing
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml

import fkd_ssl
from fkd_ssl import fetching, files
from fkd_ssl.commands import inspect
from fkd_ssl.errors import FetchError, NotFoundError, RequestError, StoreError
from fkd_ssl.fetching import fetched_folder
from fkd_ssl.images import scan
from fkd_ssl.store import Store, open_store, remote
from fkd_ssl.store.exchange import card, upload
from fkd_ssl.store.maintain.recode import recode
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.remote import FileList
from tests.store import made
from tests.web_server import WebServer, serving

pytest.importorskip("requests", reason="pip install 'fkd_ssl[remote]'")
Tree = Callable[[Path], dict[str, bytes]]
SPECS = ("SQ8", "hard", "OPQ4_8,PQ4x4")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetching, "PAUSE", 0.001)
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Six images x 3 crops in two shards, with three columns."""
    made.make(tmp_path / "store", SPECS)
    return open_store(tmp_path / "store")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "web").mkdir()
    with serving(tmp_path / "web") as server:
        yield server


@pytest.fixture
def published(store: Store, server: WebServer) -> str:
    """The URL of the store on the web server."""
    publish(store, str(server.root / "set"))
    return f"{server.url}/set"


def publish(store: Store, url: str, **options: Any) -> upload.Upload:
    return upload.publish(store, url, log=lambda line: None, **options)


def contents(store: Store) -> dict[str, Any]:
    """Everything in a store."""
    rows = store.rows.tolist()
    found = {"paths": list(store.paths), "rows": rows, "crops": [store.crops(row, slice(None)).tobytes() for row in rows]}
    for name in store.column_names:
        found[name] = [store.targets(name, row, slice(None)).tobytes() for row in rows]
        found[f"{name} info"] = store.column(name).info.to_json()
    return found


def clear_cache() -> None:
    for path in fetched_folder().iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("url", ["memory://some/where/set", "folder/set", "http"])
def test_a_published_store_is_the_same_store(
    store: Store, url: str, tmp_path: Path, server: WebServer, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    publish(store, str(server.root / "set") if url == "http" else url)
    url = f"{server.url}/set" if url == "http" else url
    opened = open_store(url)
    assert contents(opened) == contents(store)
    assert verify(opened).problems == []
    about, own = inspect.describe(url), inspect.describe(str(store.folder))
    assert {**about, "store": "", "bytes": 0} == {**own, "store": "", "bytes": 0}
    assert (about["store"], own["bytes"]) == (url, files.total_bytes(store.folder))
    if "://" in url:
        assert about["bytes"] == own["bytes"]
        assert str(opened).startswith(f"Store {url}: 6 images x 3 crops, ")


def test_a_second_call_sends_only_what_is_not_there(store: Store) -> None:
    memory = fsspec.filesystem("memory")
    first = publish(store, "memory://set")
    assert first.sent == len(first.files.files) == len([p for p in store.folder.rglob("*") if p.is_file()])
    assert first.sent_bytes == first.files.total == files.total_bytes(store.folder)
    before = {path: memory.info(path)["created"] for path in memory.find("/set")}
    assert publish(store, "memory://set").sent == 0
    assert {p for p, t in before.items() if memory.info(p)["created"] != t} == {"/set/README.md", "/set/files.txt"}
    memory.rm("/set/crops/00001.npy")
    memory.pipe_file("/set/images.npy", b"short")
    assert publish(store, "memory://set").sent == 3  # an array is sent with its sidecar
    assert contents(open_store("memory://set")) == contents(store)


def test_a_killed_call_continues_and_leaves_no_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, count = type(fsspec.filesystem("memory")), 0
    real = memory.put_file

    def put(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > 9:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "put_file", put)
        patch.setattr(upload, "_SENDERS", 1)
        with pytest.raises(KeyboardInterrupt):
            publish(store, "memory://set")
    with pytest.raises(NotFoundError, match=r"^memory://set: not a published store .*: run the same fkd-ssl publish again"):
        open_store("memory://set")
    done = publish(store, "memory://set")
    assert len(done.files.files) - 9 <= done.sent <= len(done.files.files) - 8
    assert contents(open_store("memory://set")) == contents(store)


def test_a_file_of_other_content_and_the_same_size_is_sent_again(store: Store) -> None:
    publish(store, "memory://set")
    memory = fsspec.filesystem("memory")
    memory.rm("/set/files.txt")
    for name in ("images.txt", "crops/00000.json"):
        data = memory.cat_file(f"/set/{name}")
        memory.pipe_file(f"/set/{name}", data[:9] + bytes([data[9] ^ 1]) + data[10:])
    assert publish(store, "memory://set").sent == 3
    assert verify(open_store("memory://set")).problems == []


def test_another_store_is_replaced_only_if_asked(store: Store, tmp_path: Path, new_teacher: Any) -> None:
    other = subset(store, tmp_path / "other", crops=2)
    publish(other, "memory://set")
    with pytest.raises(RequestError, match="memory://set: holds another store, or a changed one; --overwrite replaces it"):
        publish(store, "memory://set")
    assert contents(open_store("memory://set")) == contents(other)
    publish(store, "memory://set", overwrite=True)
    assert contents(open_store("memory://set")) == contents(store)
    fsspec.filesystem("memory").rm("/set/files.txt")
    with pytest.raises(RequestError, match="holds a part of another store"):
        publish(other, "memory://set")
    publish(subset(store, tmp_path / "one", column=["sq8"]), "memory://set", overwrite=True)
    assert open_store("memory://set").column_names == ["sq8"]


def test_a_killed_replacement_of_a_store_leaves_no_file_of_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = subset(store, tmp_path / "other", crops=2, column=["hard"])
    publish(store, str(tmp_path / "web"))
    (tmp_path / "web/images-00001.json").write_text("{}")  # an extension of the old store
    (tmp_path / "web/mine.txt").write_text("mine")

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(upload._Target, "send", stop)
        with pytest.raises(KeyboardInterrupt):
            publish(other, str(tmp_path / "web"), overwrite=True)
    publish(other, str(tmp_path / "web"), overwrite=True)
    assert (tmp_path / "web/mine.txt").read_text() == "mine"
    assert not (tmp_path / "web/images-00001.json").exists()
    assert sorted(path.name for path in (tmp_path / "web/targets").rglob("*.json")) == sorted(
        path.name for path in (tmp_path / "other/targets").rglob("*.json")
    )
    assert contents(open_store(tmp_path / "web")) == contents(other)


@pytest.mark.parametrize("url", ["memory://set?a=1", "file:///tmp/a#b", "s3://", "memory://"])
def test_a_store_is_not_published_where_it_cannot_be_opened(store: Store, url: str) -> None:
    for call in (lambda: publish(store, url), lambda: open_store(url)):
        with pytest.raises(RequestError, match="expected the URL of a folder"):
            call()


def test_strangers_words_are_only_words_in_the_card(store: Store) -> None:
    path = store.folder / "targets/hard/meta.json"
    values = files.read_json(path)
    evil = "\\<img src=x>\n---\nlicense: mit\n# title | \\[click\\](http://evil)"
    values["teacher"] |= {"name": evil, "licence": evil, "source": evil}
    path.unlink()
    files.write_json(path, values)
    text = card.text(Store(store.folder), "memory://hub/a b$(id)", FileList({}))
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "other"
    assert evil.replace("\n", "\\n") in yaml.safe_load(front)["license_details"]
    for sign in ("<img", "[click", "](http", "\n---\n", "\nlicense"):
        assert all(len(before) - len(before.rstrip("\\")) & 1 for before in body.split(sign)[:-1] if sign[0] != "\n")
        assert sign[0] != "\n" or sign not in body
    assert "fkd-ssl pull 'memory://hub/a b$(id)' --out 'a b$(id)'" in body


def test_a_column_is_added_to_a_published_store(store: Store, tmp_path: Path) -> None:
    publish(subset(store, tmp_path / "one", column=["sq8"]), "memory://set")
    before = open_store("memory://set")
    done = publish(store, "memory://set")
    assert {path.split("/")[1] for path in done.files.files if path.startswith("targets")} == {"sq8", "hard", "opq4_8-pq4x4"}
    assert done.sent == len([path for path in done.files.files if path.startswith(("targets/hard", "targets/opq"))])
    assert open_store("memory://set").column_names == store.column_names
    assert before.column_names == ["sq8"]
    assert verify(before).problems == []


def test_what_does_not_belong_to_the_store_is_kept(store: Store) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/set/thesis.tex", b"words")
    with pytest.raises(RequestError, match=r"holds thesis\.tex, which is not part of this store; choose another URL"):
        publish(store, "memory://set")
    memory.pipe_file("/hub/README.md", b"mine")
    memory.pipe_file("/hub/.gitattributes", b"mine")
    said: list[str] = []
    upload.publish(store, "memory://hub", log=said.append)
    assert any("hub/README.md was not written by fkd-ssl publish and is kept; --overwrite replaces it" in line for line in said)
    assert memory.cat_file("/hub/README.md") == memory.cat_file("/hub/.gitattributes") == b"mine"
    publish(store, "memory://hub", overwrite=True)
    assert memory.cat_file("/hub/README.md").startswith(b"---\nlicense: ")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "targets/hard/codes-00001.json").unlink(), "1 of 2 shards missing"),
        (lambda folder: (folder / "crops/00001.json").unlink(), "1 of 2 shards missing"),
        (lambda folder: shutil.rmtree(folder / "targets"), "has no targets yet; run fkd-ssl precompute"),
        (lambda folder: (folder / "targets/hard/meta.json").unlink(), "meta.json is missing"),
        (lambda folder: (folder / "targets/.work-new-sample").touch(), "the store is being written: wait for that command"),
        (lambda folder: (folder / "targets/sq8/.record.json").touch(), "the store is being written: wait for that command"),
        (lambda folder: (folder / "crops/00000.npy").write_bytes(b"x" * 560), r"crops/00000\.npy: no \.npy header"),
    ],
)
def test_only_a_whole_store_is_published(store: Store, harm: Any, message: str) -> None:
    harm(store.folder)
    with pytest.raises(StoreError, match=message):
        publish(open_store(store.folder), "memory://set")
    assert fsspec.filesystem("memory").find("/set") == []


def test_the_card_is_that_of_a_data_set(store: Store) -> None:
    publish(store, "memory://hub/mine")
    card = fsspec.filesystem("memory").cat_file("/hub/mine/README.md").decode()
    _, front, body = card.split("---\n", 2)
    about = yaml.safe_load(front)
    assert (about["license"], about["license_details"]) == ("other", "l")
    assert (about["pretty_name"], about["size_categories"]) == ("mine", ["n<1K"])
    for line in (
        "| images | 6, of which 5 could be read |",
        "| crops per image | 3 |",
        "| licence of its weights | l |",
        "| codec | SQ8, 36 bytes per crop with its record |",
        "| fidelity | cosine to the teacher's own targets 0.99000 mean, 0.90000 min |",
        f"| sha256 of the manifest | {store.manifest.digest} |",
        "fkd-ssl train --images IMAGES --store memory://hub/mine --column hard --out runs/student",
        "fkd-ssl pull memory://hub/mine --out mine",
    ):
        assert line in body.split("\n")


def test_the_checksums_can_be_checked_without_the_library(store: Store, tmp_path: Path) -> None:
    publish(store, str(tmp_path / "set"))
    card = (tmp_path / "set" / "README.md").read_text()
    line = next(line for line in card.split("\n") if line.startswith("tail"))
    assert str(tmp_path) not in card
    checked = subprocess.run(line, shell=True, cwd=tmp_path / "set", capture_output=True, text=True, check=True)  # noqa: S602
    assert checked.stdout.count(": OK\n") == len([p for p in store.folder.rglob("*") if p.is_file()])


def test_a_store_is_published_in_place_and_can_be_continued(store: Store, tmp_path: Path) -> None:
    """For a folder that another program sends, or a web server serves."""
    from fkd_ssl.store.write.creation import check_folder

    assert publish(store, str(store.folder)).sent == 0
    assert contents(open_store(f"file://{store.folder}")) == contents(store)
    check_folder(store.folder, {"crops", "targets"}, what="a store")  # precompute adds a column


def test_a_store_that_grew_is_an_update(
    tmp_path: Path, make_store: Any, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extensions have their own lists; nothing that was published before is sent again."""
    monkeypatch.setattr("fkd_ssl.store.manifest.ROWS_PER_SHARD", 5)
    images = scan(image_folder)
    make_store(tmp_path / "grown", images=images.subset(range(16)))
    before = publish(open_store(tmp_path / "grown"), "memory://set")
    old = open_store("memory://set")
    grown = make_store(tmp_path / "grown", images=images, extend=True)
    done = publish(grown, "memory://set")
    assert done.sent == len(done.files.files) - len(before.files.files)
    assert {"images-00001.txt", "images-00001.npy", "images-00001.json"} <= done.files.files.keys()
    opened = open_store("memory://set")
    assert (len(opened), len(old)) == (24, 16)
    assert contents(opened) == contents(grown)
    assert contents(old)["paths"] == list(images.names[:16])


def test_a_result_is_a_store(store: Store) -> None:
    published = fkd_ssl.publish(store, url="memory://set")
    assert published.sent_bytes == files.total_bytes(store.folder)
    assert fkd_ssl.verify(published).problems == []
    assert fkd_ssl.pull(published, out=store.folder.parent / "copy").store.column_names == store.column_names


@pytest.mark.parametrize("part", [{}, {"crops": 2}, {"column": "hard"}, {"images": "some.txt"}])
def test_pull_copies_a_part(
    store: Store, published: str, tree: Tree, tmp_path: Path, part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = ["b/3.jpg", "c/6.jpg"]
    Path("some.txt").write_text("\n".join(paths))
    copied = fkd_ssl.pull(published, out="copy", **part)
    options = {"crops": part.get("crops"), "column": ["hard"] if "column" in part else None}
    expected = subset(store, "expected", **options, paths=paths if "images" in part else None)
    assert tree(Path("copy")) == tree(Path("expected"))
    assert contents(copied.store) == contents(expected)
    if not part:
        assert tree(Path("copy")) == tree(store.folder)
    assert fkd_ssl.pull(published, out="copy", **part).values == copied.values  # done


def test_pull_continues_and_checks(published: str, server: WebServer, store: Store, tmp_path: Path, tree: Tree) -> None:
    server.always["set/crops/00001.npy"] = "other"
    with pytest.raises(FetchError, match=r"set/crops/00001\.npy: its sha256 differs from the expected one"):
        subset(open_store(published), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    server.always.clear()
    server.requests.clear()
    subset(open_store(published), tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(store.folder)
    assert "set/crops/00000.npy" not in server.paths()


def test_only_the_arrays_that_are_read_are_fetched_and_once(published: str, server: WebServer) -> None:
    opened = open_store(published)
    assert not [path for path in server.paths() if "codes-0" in path and path.endswith(".npy")]
    server.requests.clear()
    for _ in range(2):
        opened.targets("hard", 5, slice(0, 2))
        opened.crops(4, slice(0, 1))
    assert server.paths() == ["set/targets/hard/codes-00001.npy", "set/crops/00001.npy"]
    server.requests.clear()
    again = open_store(published)
    again.targets("hard", 5, slice(0, 2))
    assert server.paths() == ["set/files.txt"]


def test_processes_share_what_is_fetched(published: str, server: WebServer, store: Store) -> None:
    server.latency = 0.05
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_read_all, [published] * 4)
    assert all(one == contents(store) for one in found)
    assert len(set(server.paths()) - {"set/files.txt"}) == len(server.paths()) - server.paths().count("set/files.txt")


def _read_all(url: str) -> dict[str, Any]:
    return contents(open_store(url))


def test_an_opened_store_can_be_sent_to_a_process(published: str, store: Store) -> None:
    opened = open_store(published)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(contents, (opened,)) == contents(store)


def test_the_cache_is_bounded_and_what_was_removed_is_fetched_again(
    published: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_store(published)
    small = int((opened.folder / fetching.LENGTH).read_text())
    limit = small + 700
    monkeypatch.setenv("FKD_SSL_CACHE_BYTES", str(limit))
    monkeypatch.setattr("fkd_ssl.store.shards.MAX_OPEN_FILES", 1)
    for _ in range(2):
        assert contents(opened) == contents(store)
        arrays = [path for path in fetched_folder().iterdir() if path.is_file() and path.suffix != ".lock"]
        assert 0 < sum(path.stat().st_size for path in arrays) <= 700
    assert opened.folder.is_dir()  # in use
    monkeypatch.setenv("FKD_SSL_CACHE_BYTES", "400")
    with pytest.raises(FetchError, match=r"crops/00000\.npy: 560 bytes must be fetched, and the cache may keep 400 bytes"):
        clear_arrays(), contents(open_store(store.folder)), contents(opened)


def clear_arrays() -> None:
    for path in fetched_folder().iterdir():
        if path.is_file():
            path.unlink()


def test_stores_that_are_not_in_use_leave_the_cache(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    urls = [f"memory://set{k}" for k in range(3)]
    for url in urls:
        publish(store, url)
    first, _ = open_store(urls[0]), open_store(urls[1])
    kept = int((first.folder / fetching.LENGTH).read_text())
    monkeypatch.setenv("FKD_SSL_CACHE_BYTES", str(int(2.5 * kept)))
    del _
    gc.collect()
    third = open_store(urls[2])
    assert {path.name for path in fetched_folder().iterdir() if path.is_dir()} == {first.folder.name, third.folder.name}
    assert contents(first)["paths"] == contents(third)["paths"]


def test_a_partly_fetched_store_is_completed(published: str, server: WebServer, store: Store) -> None:
    server.always["set/targets/sq8/.*"] = "404"
    with pytest.raises(FetchError, match="not found"):
        open_store(published)
    server.always.clear()
    server.requests.clear()
    assert contents(open_store(published)) == contents(store)
    assert "set/targets/hard/meta.json" not in server.paths()


# servers that fail


@pytest.mark.parametrize("harm", ["drop", "truncate", "cut", "500", "429", "whole"])
def test_a_request_that_fails_is_repeated(published: str, server: WebServer, store: Store, harm: str) -> None:
    for path in ("set/files.txt", "set/images.txt", "set/crops/00000.npy"):
        server.harms[path] = [harm] * 3
    assert contents(open_store(published)) == contents(store)


def test_a_server_without_ranges(published: str, server: WebServer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PIECE", 100)
    server.always[".*"] = "whole"
    assert contents(open_store(published)) == contents(store)


def test_an_interrupted_fetch_continues(
    published: str, server: WebServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_store(published)
    monkeypatch.setattr(fetching, "PIECE", 100)
    monkeypatch.setattr(fetching, "TRIES", 1)
    server.harms["set/crops/00000.npy"] = ["", "", "drop"]
    with pytest.raises(FetchError, match=r"crops/00000\.npy: cannot be fetched after 1 attempts"):
        opened.crops(0, slice(None))
    server.requests.clear()
    assert opened.crops(0, slice(None)).tobytes() == store.crops(0, slice(None)).tobytes()
    assert server.requests[0] == ("set/crops/00000.npy", "bytes=200-299")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("403", r"set/files\.txt: status 403: Forbidden; check the URL, and the credentials in the environment"),
        ("401", "status 401: Unauthorized"),
        ("503", "cannot be fetched after 5 attempts: status 503"),
        ("drop", "cannot be fetched after 5 attempts: no connection: "),
        ("redirect /set/files.txt", "Exceeded 10 redirects"),
        ("redirect ftp://other/files.txt", "No connection adapters were found"),
        ("redirect file:///etc/passwd", "No connection adapters were found"),
    ],
)
def test_a_server_that_refuses_is_named(published: str, server: WebServer, harm: str, message: str) -> None:
    server.always["set/files.txt"] = harm
    with pytest.raises(FetchError, match=message):
        open_store(published)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{server}/nothing", r"/nothing: not a published store \(files\.txt not found\); check the URL"),
        ("memory://nothing", r"^memory://nothing: not a published store \(files\.txt not found\)"),
        ("http://127.0.0.1:9/set", r"files\.txt: cannot be fetched after 5 attempts: no connection: .*refused"),
        ("nonsense://a/b", "nonsense://: Protocol not known"),
        ("https://[me:pass@bad/set", r"^https://bad/set: not a valid URL \(Invalid IPv6 URL\)"),
        ("s3://me:very/secret@bucket/set", r"^s3://\.\.\.: a URL with credentials"),
        ("https://me:very#secret@server/set", r"^https://\.\.\.: a URL with credentials"),
        ("https://me:very-secret@server/set", "^https://server/set: a URL with credentials"),
        ("https://server/set?X-Amz-Signature=very-secret", "^https://server/set: a URL with credentials"),
        ("https://server/set?version=very-secret", r"^https://server/set: expected the URL of a folder, without \? and #"),
    ],
)
def test_a_wrong_url_is_named(url: str, message: str, server: WebServer) -> None:
    with pytest.raises((RequestError, FetchError), match=message) as caught:
        open_store(url.format(server=server.url))
    assert "secret" not in str(caught.value)


def test_a_secret_in_a_redirect_is_not_shown(published: str, server: WebServer) -> None:
    server.always["set/files.txt"] = "redirect http://me:very-secret@127.0.0.1:9/x?X-Amz-Signature=very-secret"
    with pytest.raises(FetchError, match="no connection") as caught:
        open_store(published)
    assert "secret" not in str(caught.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fetching._filesystem_of.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "requests", None)
    with pytest.raises(RequestError, match=r"https://: .*requests.*; pip install 'fkd_ssl\[remote\]'"):
        open_store("https://server/set")
    fetching._filesystem_of.cache_clear()


def test_a_store_at_a_url_is_not_changed(published: str, store: Store) -> None:
    opened = open_store(published)
    with pytest.raises(RequestError, match="cannot be changed at its URL: copy it with fkd-ssl pull, and publish the copy"):
        recode(opened, "SQ4", column="sq8")
    with pytest.raises(RequestError, match="cannot be changed at its URL"):
        publish(opened, "memory://other")
    with pytest.raises(RequestError, match="a web server can be read, but not written"):
        publish(store, published)
    with pytest.raises(RequestError, match="--repair cannot change a store at a URL"):
        fkd_ssl.verify(published, repair=True)
    with pytest.raises(RequestError, match="--store: a URL; choose a local folder, and send a finished store with fkd-ssl pub"):
        fkd_ssl.precompute(images="x", store="s3://b/x", teacher="mocov2")


# hostile servers


def test_an_array_that_changes_after_the_store_was_opened(published: str, server: WebServer, store: Store) -> None:
    opened = open_store(published)
    path = server.root / "set/crops/00001.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert opened.crops(0, slice(None)).tobytes() == store.crops(0, slice(None)).tobytes()
    with pytest.raises(FetchError, match=r"00001\.npy: its sha256 differs from the expected one: it is damaged, or changed"):
        opened.crops(5, slice(None))
    path.write_bytes(good)
    assert contents(opened) == contents(store)


@pytest.mark.parametrize("path", ["files.txt", "crops/00000.json", "crops/00000.npy"])
def test_an_endless_answer_ends(published: str, server: WebServer, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_MAX_INDEX", 10**6)
    server.always[f"set/{path}"] = "endless"
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"more than 1,000,000 bytes|sha256 differs"):
        contents(open_store(published))
    assert time.monotonic() - began < 20


def test_a_slow_answer_ends(published: str, server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fkd_ssl.web._TOTAL", 0.0)
    monkeypatch.setattr("fkd_ssl.web._BLOCK", 10)
    with pytest.raises(FetchError, match=r"cannot be fetched after 5 attempts: the server needs more than 0\.0 seconds"):
        open_store(published)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{digest} 5 ../evil", "its line .* is invalid"),
        ("{digest} 5 /etc/evil", "its line .* is invalid"),
        ("{digest} 5 crops/../../evil", "its line .* is invalid"),
        ("{digest} 5 crops/.hidden", "its line .* is invalid"),
        ("{digest} 5 crops//a", "its line .* is invalid"),
        ("{digest} 5 a\\b", "its line .* is invalid"),
        ("{digest} 05 a", "its line .* is invalid"),
        ("{digest} -5 a", "its line .* is invalid"),
        ("{digest} 5 a b", "its line .* is invalid"),
        ("{digest} 99999999999999999999 a", "its line .* is invalid"),
        ("short 5 a", "its line .* is invalid"),
        ("{digest} 5 images.txt", "not a list of a store's files, or damaged"),  # twice
        ("{digest} 5 images.txt/a", "not a list of a store's files, or damaged"),  # a file and a folder
        ("{digest} 9999999 crops/99999.json", r"9999999 bytes, and at most \d+ are expected"),
        ("{digest} 999999999999999 targets/evil/a.npy", r"1000\.0 TB must be fetched, and the cache may keep 100\.0 GB"),
        ("{digest} 5 bytes", "lists 'bytes', which is not a file of a store"),
        ("{digest} 5 files.txt", "lists 'files.txt', which is not a file of a store"),
        ("{digest} 5 crops/99999.json", r"99999\.json: not found"),
    ],
)
def test_a_hostile_list_is_refused(published: str, server: WebServer, tmp_path: Path, line: str, message: str) -> None:
    path = server.root / "set" / "files.txt"
    text = path.read_text().rstrip("\n").split("\n")
    line = line.format(digest="0" * 64)
    size = line.split()[1]
    count, total = int(text[0].split()[3]), int(text[0].split()[4])
    text[0] = f"fkd_ssl files 1 {count + 1} {total + int(size)}"
    path.write_text("\n".join([*text, line, ""]))
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    with pytest.raises(StoreError, match=message):
        open_store(published)
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} == before


def test_a_list_that_disagrees_with_a_sidecar_is_refused(published: str, server: WebServer) -> None:
    """An array of another store, or one that would need much memory, is not even fetched."""
    path = server.root / "set" / "files.txt"
    index = FileList.decode(path.read_bytes(), "")
    for about in ((560, "0" * 64), (10**12, index.files["crops/00000.npy"][1])):
        path.write_bytes(FileList({**index.files, "crops/00000.npy": about}).encode())
        opened = open_store(published)
        server.requests.clear()
        with pytest.raises(StoreError, match=r"crops/00000\.npy: files\.txt states .*the store is damaged; publish it again"):
            opened.crops(0, slice(None))
        assert server.requests == []


def test_a_truncated_list_is_refused(published: str, server: WebServer) -> None:
    path = server.root / "set" / "files.txt"
    data = path.read_bytes()
    for length in (0, 1, 20, len(data) // 2, len(data) - 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(StoreError, match=r"not a list of a store's files|is invalid|cannot be fetched"):
            open_store(published)


def test_the_names_of_a_large_store_take_bounded_memory() -> None:
    """A list of the maximum size: 70 million images in shards of 1,024."""
    import tracemalloc

    entry = "0" * 64 + " 9 crops/{:05d}.npy\n"
    count = remote._MAX_INDEX // len(entry.format(10**5)) - 1
    data = f"fkd_ssl files 1 {count} {9 * count}\n".encode() + b"".join(entry.format(k).encode() for k in range(count))
    assert len(data) < remote._MAX_INDEX
    tracemalloc.start()
    index = FileList.decode(data, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index.files) == count
    assert peak < 12 * len(data)


def test_a_train_reads_ahead(published: str, server: WebServer, store: Store) -> None:
    from fkd_ssl.data import StoredCrops
    from fkd_ssl.images import ImageSource

    class Pictures(ImageSource):
        def read(self, index: int) -> bytes:
            return self.names[index].encode()

    pictures = Pictures("x", made.PATHS, np.zeros(6), ["a"])
    data = StoredCrops(open_store(published), pictures, column="hard", crops_per_image=1)
    assert (data.mix_groups, data.groups.tolist()) == (16, [0, 0, 0, 0, 1])
    server.requests.clear()
    data.expect([4, 0])
    end = time.monotonic() + 20
    wanted = {f"set/{name}-0000{k}.npy".replace("crops-", "crops/") for name in ("crops", "targets/hard/codes") for k in (0, 1)}
    while set(server.paths()) != wanted and time.monotonic() < end:
        time.sleep(0.01)
    assert set(server.paths()) == wanted
    local = StoredCrops(store, pictures, column="hard", crops_per_image=1)
    assert (local.mix_groups, local.groups.tolist()) == (0, [0] * 5)


def test_an_error_names_the_url_and_not_the_cache(store: Store, tmp_path: Path) -> None:
    """A store that was damaged before it was published, with a list of files that matches."""
    publish(store, "memory://set")
    memory = fsspec.filesystem("memory")

    def damage(path: str) -> None:
        listed = FileList.decode(memory.cat_file("/set/files.txt"), "")
        data = memory.cat_file(f"/set/{path}").replace(b'"sha256":"', b'"sha256":"0', 1)
        memory.pipe_file(f"/set/{path}", data)
        changed = {**listed.files, path: (len(data), files.sha256(data))}
        memory.pipe_file("/set/files.txt", FileList(changed).encode())

    with pytest.raises(RequestError, match=r"^memory://set: no targets of 'other'"):
        subset(open_store("memory://set"), tmp_path / "part", column=["other"])
    for path in ("crops/00001.json", "manifest.json"):
        damage(path)
        with pytest.raises(StoreError, match=f"memory://set/{path}: ") as caught:
            subset(open_store("memory://set"), tmp_path / "part")
        assert str(fetched_folder()) not in str(caught.value)
