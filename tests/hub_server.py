"""A Hugging Face Hub on the loopback address: data set repositories with tokens, commits, Git LFS and signed links."""

import base64
import binascii
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml

from fkd_ssl import fetching

NAME = "me/targets"
URL = f"hf://datasets/{NAME}"
TOKEN, READER = "hf_very-secret", "hf_secret-reader"
SIGNATURE = "signed-by-the-store"  # in the query of links to the storage, as X-Amz-Signature
_LFS = (".npy", ".tar", ".parquet", ".bin")  # as in the .gitattributes of a new data set
_LFS_BYTES = 10 * 2**20  # larger files are always in LFS


@dataclass
class Repository:
    """A data set with one branch, `main`."""

    private: bool = False
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """Mode ("regular" or "lfs") and content, by path."""
    commits: list[str] = field(default_factory=list)
    """Summaries."""

    @property
    def sha(self) -> str:
        """The latest commit."""
        return hashlib.sha1(repr(self.commits).encode(), usedforsecurity=False).hexdigest()


class Refused(Exception):  # noqa: N818
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class HubServer:
    """Answers as huggingface.co does, for what huggingface_hub asks.

    Attributes:
        url: Of the Hub.
        tokens: "write" or "read", by token.
        repositories: By name.
        requests: Method and path of each request, in the order of arrival.
        harms: Called with method and path of each request; what it raises is the answer.
        loses: Whether the connection is lost after a request is done, before its answer; called with method and path.
        page: Entries of a page of a listing.
        part: Bytes from which an upload is in parts of this size.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, str] = {}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.read: list[tuple[str, str]] = []  # path and range of each file that was sent
        self.harms: Callable[[str, str], None] = lambda method, path: None
        self.loses: Callable[[str, str], bool] = lambda method, path: False
        self.page, self.part = 1000, 2**30
        self._lock = threading.RLock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                with contextlib.suppress(ConnectionError):
                    outer._handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        port = self._server.server_port
        self.url = f"http://127.0.0.1:{port}"
        self._storage = f"http://localhost:{port}/storage"  # another host, to which no token may be sent
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()

    def files(self, name: str) -> dict[str, bytes]:
        """The contents of a repository."""
        return {path: content for path, (_, content) in self.repositories[name].files.items()}

    def uploads(self) -> list[str]:
        """The storage's paths that were uploaded to, in order."""
        return [path for method, path in self.requests if method == "PUT"]

    # requests

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        with self._lock:
            self.requests.append((request.command, unquote(parts.path)))
        headers: dict[str, str] = {}
        try:
            self.harms(request.command, unquote(parts.path))
            with self._lock:
                status, answer = self._answer(request, parts.path, query, body, headers)
            if self.loses(request.command, unquote(parts.path)):
                raise ConnectionResetError
        except ConnectionError:
            request.close_connection = True
            request.connection.close()
            return
        except Refused as error:
            headers |= {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            status, answer = error.status, {"error": error.message}
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if not isinstance(answer, bytes):
            headers["Content-Type"] = "application/json; charset=utf-8"
        request.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    def _answer(
        self, request: BaseHTTPRequestHandler, path: str, query: dict[str, str], body: bytes, headers: dict[str, str]
    ) -> tuple[int, Any]:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/storage/"):
            if token or query.get("X-Amz-Signature") != SIGNATURE:
                raise Refused(400, "Only one auth mechanism allowed" if token else "The signature does not match")
            return self._storage_answer(request, path, query, body, headers)
        if token and token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        if (match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+)(?:/(.*))?)?)?", path)) is not None:
            name, what, revision, rest = match.groups()
            repository = self._repository(name, token, writes=what in ("preupload", "commit"))
            if revision not in (None, "main"):
                raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            if what in (None, "revision"):
                return 200, {"id": name, "sha": repository.sha, "private": repository.private, "tags": []}
            if what == "tree":
                return self._tree(request, repository, unquote(rest or ""), query, headers)
            if what == "paths-info":
                asked = parse_qs(body.decode()).get("paths", [])
                return 200, [one for one in _entries(repository, "", recursive=True) if one["path"] in asked]
            if what == "preupload":
                return 200, {"files": [_mode(repository, file) for file in json.loads(body)["files"]]}
            if what == "commit":
                return self._commit(name, repository, [json.loads(line) for line in body.splitlines()])
        if (match := re.fullmatch(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)) is not None:
            self._repository(match[1], token, writes=True)
            return 200, {"transfer": "basic", "objects": [self._upload(one) for one in json.loads(body)["objects"]]}
        if (match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)) is not None:
            return self._resolve(request, self._repository(match[1], token), unquote(match[3]), headers)
        if re.match("/api/(models|datasets|spaces)/", path):
            raise Refused(404, "Repository not found", "RepoNotFound")
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    def _repository(self, name: str, token: str, *, writes: bool = False) -> Repository:
        found = self.repositories.get(name)
        if not token and (writes or found is None or found.private):
            raise Refused(401, "Invalid username or password.")  # whether it exists is not said
        if found is None:
            raise Refused(404, "Repository not found", "RepoNotFound")
        if writes and self.tokens[token] != "write":
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return found

    def _validate(self, asked: dict[str, str]) -> tuple[int, Any]:
        match = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        try:
            found = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return 400, {"error": "Invalid metadata", "errors": [{"message": str(error)}], "warnings": []}
        warnings = [] if isinstance(found, dict) else [{"message": "empty or missing yaml metadata in repo card"}]
        return 200, {"errors": [], "warnings": warnings}

    # files

    def _tree(
        self,
        request: BaseHTTPRequestHandler,
        repository: Repository,
        path: str,
        query: dict[str, str],
        headers: dict[str, str],
    ) -> tuple[int, Any]:
        found = _entries(repository, path, recursive=query.get("recursive", "").lower() == "true")
        if not found and path:
            raise Refused(404, f"{path} does not exist on main", "EntryNotFound")
        start = int(query.get("cursor", "0"))
        if start + self.page < len(found):
            kept = "&".join(f"{key}={value}" for key, value in query.items() if key != "cursor")
            at = f"{self.url}{urlsplit(request.path).path}?{kept}&cursor={start + self.page}"
            headers["Link"] = f'<{at}>; rel="next"'
        return 200, found[start : start + self.page]

    def _resolve(
        self, request: BaseHTTPRequestHandler, repository: Repository, path: str, headers: dict[str, str]
    ) -> tuple[int, Any]:
        if path not in repository.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        mode, content = repository.files[path]
        headers |= {"X-Repo-Commit": repository.sha, "Accept-Ranges": "bytes"}
        if mode == "lfs":
            oid = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{oid}"'}
            headers["Location"] = f"{self._storage}/{oid}?name={quote(path)}&X-Amz-Signature={SIGNATURE}"
            return 302, b""
        headers["ETag"] = f'"{_blob(content)}"'
        return self._span(request, path, content, headers)

    def _span(self, request: BaseHTTPRequestHandler, path: str, content: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        span = request.headers.get("Range", "")
        if request.command == "GET":
            self.read.append((path, span))
        if (match := re.fullmatch(r"bytes=(\d+)-(\d*)", span)) is None:
            return 200, content
        first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        if first >= len(content):
            raise Refused(416, "Range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, content[first : last + 1]

    # uploads

    def _upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What to do to upload an LFS object: nothing, if it is there."""
        oid, size = asked["oid"], asked["size"]
        if oid in self.objects:
            return {"oid": oid, "size": size}
        link = f"{self._storage}/{oid}?X-Amz-Signature={SIGNATURE}"
        if size < self.part:
            return {"oid": oid, "size": size, "actions": {"upload": {"href": link}}}
        links = {str(k + 1): f"{link}&part={k + 1}" for k in range(-(-size // self.part))}
        header = {"chunk_size": str(self.part), **links}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{link}&complete=1", "header": header}}}

    def _storage_answer(
        self, request: BaseHTTPRequestHandler, path: str, query: dict[str, str], body: bytes, headers: dict[str, str]
    ) -> tuple[int, Any]:
        oid = path.removeprefix("/storage/")
        if request.command in ("GET", "HEAD"):
            if oid not in self.objects:
                raise Refused(404, "NoSuchKey")
            return self._span(request, query.get("name", oid), self.objects[oid], headers)
        if "part" in query:
            self.parts[oid, int(query["part"])] = body
            headers["ETag"] = f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'
            return 200, b""
        if "complete" in query:
            given = json.loads(body)["parts"]
            pieces = [self.parts.pop((oid, one["partNumber"])) for one in given]
            tags = [f'"{hashlib.md5(piece, usedforsecurity=False).hexdigest()}"' for piece in pieces]
            if tags != [one["etag"] for one in given]:
                raise Refused(400, "InvalidPart")
            body = b"".join(pieces)
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "BadDigest")
        self.objects[oid] = body
        return 200, b""

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        header, *operations = lines
        assert header["key"] == "header"
        files = dict(repository.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                try:
                    files[path] = ("regular", base64.b64decode(value["content"], validate=True))
                except binascii.Error as error:
                    raise Refused(400, str(error)) from error
            elif key == "lfsFile":
                if value["oid"] not in self.objects or len(self.objects[value["oid"]]) != value["size"]:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = ("lfs", self.objects[value["oid"]])
            elif key == "deletedFile":
                if path not in files:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[path]
            else:
                raise Refused(400, f"unknown operation {key}")
        repository.files = files
        repository.commits.append(header["value"]["summary"])
        return 200, {"success": True, "commitOid": repository.sha, "commitUrl": f"{self.url}/datasets/{name}/commit/main"}


def _blob(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _mode(repository: Repository, file: dict[str, Any]) -> dict[str, Any]:
    path = file["path"]
    assert len(base64.b64decode(file["sample"])) == min(file["size"], 512)
    mode = "lfs" if path.endswith(_LFS) or file["size"] > _LFS_BYTES else "regular"
    answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
    if path in repository.files:
        there, content = repository.files[path]
        answer["oid"] = hashlib.sha256(content).hexdigest() if there == "lfs" else _blob(content)
    return answer


def _entries(repository: Repository, under: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders of a folder, as the Hub lists them."""
    found: dict[str, dict[str, Any]] = {}
    prefix = f"{under}/" if under else ""
    for path, (mode, content) in repository.files.items():
        if not path.startswith(prefix):
            continue
        steps = path[len(prefix) :].split("/")
        for depth in range(1, len(steps) if recursive else min(2, len(steps))):
            folder = prefix + "/".join(steps[:depth])
            found[folder] = {"type": "directory", "oid": _blob(folder.encode()), "size": 0, "path": folder}
        if recursive or len(steps) == 1:
            found[path] = {"type": "file", "oid": _blob(content), "size": len(content), "path": path}
            if mode == "lfs":
                about = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
                found[path] |= {"oid": _blob(about["oid"].encode()), "lfs": about}
    return [found[path] for path in sorted(found)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub with one data set, private and empty. It stores large files by Git LFS; no test server for Xet exists."""
    pytest.importorskip("huggingface_hub", reason="pip install 'fkd_ssl[remote]'")
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, close_session

    hub, folder = HubServer(), tmp_path_factory.mktemp("hub")
    hub.tokens = {TOKEN: "write", READER: "read"}
    hub.repositories[NAME] = Repository(private=True)
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(folder / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    pattern = _http.REPO_API_REGEX.pattern.replace("https:", "https?:")
    monkeypatch.setattr(_http, "REPO_API_REGEX", re.compile(pattern, re.VERBOSE))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("FKD_SSL_CACHE", str(folder / "cache"))
    monkeypatch.setattr(fetching, "PAUSE", 0.001)
    fetching._filesystem_of.cache_clear()
    close_session()
    yield hub
    fetching._filesystem_of.cache_clear()
    close_session()
    hub.stop()
