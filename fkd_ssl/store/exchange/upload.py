"""Writes a store to a URL, from which `open_store` reads it. The last file completes it; an interrupted call continues."""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fkd_ssl import fetching, files
from fkd_ssl.errors import FetchError, RequestError, StoreError
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.exchange import card
from fkd_ssl.store.listing import MANIFEST, PUBLISHED
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.reader import Store
from fkd_ssl.store.remote import INDEX, OF_STORE, FileList
from fkd_ssl.text import format_bytes, is_url, plural

README = PUBLISHED[1]
_SENDERS = 8  # threads
_COMMIT = 50  # groups of files in a commit: the Hugging Face Hub recommends 100 files, and limits commits per hour
_RUNNING = re.compile(r"\.(work-|record|unfinished-)")  # names of files of running writers


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Result of `publish`."""

    files: FileList
    """All files but the card and the list itself."""
    sent: int
    """Number of files that were sent; the others were already at the URL."""
    sent_bytes: int
    """Bytes of the files that were sent."""


def publish(store: Store, url: str, *, overwrite: bool = False, log: Callable[[str], None], threads: int = 2) -> Upload:
    """Writes a complete store, a list of its files with their checksums, and a card to a URL.

    Files that are already at the URL are not sent again. A store that is already there may lack columns of this one.

    Args:
        store: The store. All files are checked first.
        url: A URL of fsspec, such as s3://bucket/name or hf://datasets/user/name, or a folder.
        overwrite: Replace another store, and a README.md that `publish` did not write.
        log: Called with lines for the user.
        threads: Number of threads that check files.

    Raises:
        RequestError: The store is at a URL, or something else is at `url`.
        StoreError: The store is damaged or not complete.
        FetchError: A file cannot be written or read.
    """
    store.require_local()
    if is_url(url):
        fetching.checked_folder(url)
    _require_complete(store)
    target = _Hub(url) if url.startswith("hf://") and not url.startswith("hf://buckets/") else _Target(url)
    there = target.sizes()
    report = verify(store, threads=threads)
    if report.damage:
        raise StoreError(f"{report.problems[0]} ({plural(len(report.problems), 'problem')}; fkd-ssl verify lists them)")
    for problem in report.problems:
        log(f"note: {problem}")
    groups = [list(group) for group in _groups(store)]
    listed = FileList({path: file for group in groups for path, file in group})
    log(f"{url}: {plural(len(listed.files), 'file')}, {format_bytes(listed.total)}")
    old = _previous(target, there, store, listed, overwrite=overwrite)
    with tqdm(total=listed.total, desc="publish", unit="B", unit_scale=True) as bar:
        sent = target.send(store.folder, [[path for path, _ in group] for group in groups], listed, old, there, bar)
    last = {README: card.text(store, target.url, listed).encode(), INDEX: listed.encode()}
    if README in there and not overwrite and card.MARK not in target.read(README):
        log(f"note: {url}/{README} was not written by fkd-ssl publish and is kept; --overwrite replaces it")
        del last[README]
    target.finish(last, sorted((old.files.keys() - listed.files.keys()) & there.keys()))
    return Upload(files=listed, sent=len(sent), sent_bytes=sum(listed.files[path][0] for path in sent))


def _require_complete(store: Store) -> None:
    """Raises StoreError if the store is not complete, or a process writes it."""
    if broken := store.broken_columns():
        raise StoreError(broken[0])
    if not store.column_names:
        raise StoreError(f"{store.folder}: has no targets yet; run fkd-ssl precompute")
    for name in store.column_names:
        store.column(name).require_complete()
    places = [store.folder, store.folder / layout.CROPS, store.folder / layout.TARGETS]
    for place in (*places, *(store.folder / layout.TARGETS / name for name in store.column_names)):
        if running := sorted(name for name in files.names(place) if _RUNNING.match(name)):
            raise StoreError(
                f"{place / running[0]}: the store is being written: wait for that command, or repeat it if it was stopped"
            )


def _groups(store: Store) -> Iterator[list[tuple[str, tuple[int, str]]]]:
    """Yields path, size and sha256 of the files of a verified store, in the order of sending.

    A group is sent in sequence. An array comes before its sidecar, so that a sidecar at the URL vouches for its array.
    """

    def entry(path: Path, digest: str | None = None) -> tuple[str, tuple[int, str]]:
        return path.relative_to(store.folder).as_posix(), (path.lstat().st_size, digest or files.sha256_file(path))

    yield [entry(store.folder / MANIFEST)]  # first, to tell unfinished stores apart
    for part in store.manifest.parts:
        yield [entry(part.file(store.folder, ".txt"), part.images_sha256)]
        yield [entry(part.file(store.folder, ".npy"), part.sizes_sha256)]
        if part.number:
            yield [entry(part.file(store.folder, ".json"))]
    columns = [store.column(name) for name in store.column_names]
    for column in columns:
        yield [entry(column.folder / "meta.json")]
        for name, digest in column.meta.arrays.items():
            yield [entry(column.folder / f"{name}.npy", digest)]
    for shard in range(store.manifest.shards):
        path = layout.crops_file(store.folder, shard)
        yield [entry(path, store.crops_sidecar(shard)["file"]), entry(path.with_suffix(".json"))]
        for column in columns:
            path = column.require(shard)
            yield [entry(path, column.sidecar(shard)["file"]), entry(path.with_suffix(".json"))]


def _previous(target: "_Target", there: Mapping[str, int], store: Store, listed: FileList, *, overwrite: bool) -> FileList:
    """Returns the list of the files that are published already.

    Raises:
        RequestError: Another store or something else is there, and may not be overwritten.
    """
    if INDEX in there:
        old = FileList.decode(target.read(INDEX), f"{target.url}/{INDEX}")
        if old.files.items() <= listed.files.items():
            return old
        if not overwrite:
            raise RequestError(f"{target.url}: holds another store, or a changed one; --overwrite replaces it")
        target.remove(INDEX)  # it is not complete from now on
        return old
    if there.keys() - {README} and not overwrite:
        own = (store.folder / MANIFEST).read_bytes()
        if foreign := sorted(there.keys() - listed.files.keys() - {README}):
            raise RequestError(f"{target.url}: holds {foreign[0]}, which is not part of this store; choose another URL")
        if MANIFEST not in there or target.read(MANIFEST) != own:
            raise RequestError(f"{target.url}: holds a part of another store; choose another URL, or pass --overwrite")
    if MANIFEST in there:  # an interrupted call has removed the list
        return FileList({path: (size, "") for path, size in there.items() if OF_STORE.fullmatch(path)})
    return FileList({})


class _Target:
    """A folder at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url = (url if is_url(url) else f"file://{os.path.abspath(url)}").rstrip("/")  # noqa: PTH100
        self._at = fetching.refreshed(url)
        if not hasattr(self._at, "put_file"):
            raise RequestError(f"{url}: a web server can be read, but not written; publish to a folder that it serves")
        self._root = self._at._strip_protocol(url)
        self._is_local = url.startswith(("file://", "local://"))

    def sizes(self) -> dict[str, int]:
        """Returns the size of each file, by its path; without hidden files."""

        def find() -> dict[str, Any]:
            with suppress(FileNotFoundError):
                return dict(self._at.find(self._root, detail=True))
            return {}

        found = fetching.attempt(self.url, find, "listed")
        paths = {path[len(self._root) :].lstrip("/"): int(file["size"] or 0) for path, file in found.items()}
        return {path: size for path, size in paths.items() if path and not path.startswith(".") and "/." not in path}

    def read(self, path: str) -> bytes:
        """Returns the bytes of a small file."""
        return fetching.piece(f"{self.url}/{path}", 0, 2**26 + 1, whole=False)

    def finish(self, contents: Mapping[str, bytes], removed: Sequence[str]) -> None:
        """Removes files and writes small ones, the last one of `contents` last: an interrupted call continues."""
        for path in removed:
            self.remove(path)
        for path, data in contents.items():
            self.write(path, data)

    def write(self, path: str, data: bytes) -> None:
        """Writes a small file."""
        self._try(path, lambda at: self._at.pipe_file(at, data))

    def remove(self, path: str) -> None:
        """Removes a file."""
        self._try(path, self._at.rm_file)

    def _try(self, path: str, call: Callable[[str], object]) -> None:
        """Calls a function with the path of a file, with several attempts."""
        if self._is_local:
            Path(self._root, path).parent.mkdir(parents=True, exist_ok=True)
        fetching.attempt(f"{self.url}/{path}", lambda: call(f"{self._root}/{path}"), "written")

    def send(
        self,
        folder: Path,
        groups: Sequence[Sequence[str]],
        listed: FileList,
        old: FileList,
        there: Mapping[str, int],
        bar: "tqdm[Any]",
    ) -> list[str]:
        """Sends the files that are not there. Returns their paths."""

        def missing(group: Sequence[str]) -> Sequence[str]:
            if all(old.files.get(path) == listed.files[path] and there.get(path) == listed.files[path][0] for path in group):
                return []
            if any(there.get(path) != listed.files[path][0] for path in group) or not self._has(group[-1], listed):
                return group
            return []  # the last file of a group vouches for the others

        sent: list[str] = []
        size = {path: file[0] for path, file in listed.files.items()}
        with ThreadPoolExecutor(_SENDERS) as pool:
            try:
                for part in self._parts(groups[:1], groups[1:]):
                    needed = list(pool.map(missing, part))
                    bar.update(sum(size[path] for group in part for path in group) - sum(size[p] for g in needed for p in g))
                    for paths in self._send(pool, folder, [group for group in needed if group]):
                        sent += paths
                        bar.update(sum(size[path] for path in paths))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return sent

    def _parts(self, first: Sequence[Sequence[str]], rest: Sequence[Sequence[str]]) -> Iterator[Sequence[Sequence[str]]]:
        yield first
        for start in range(0, len(rest), _COMMIT):
            yield rest[start : start + _COMMIT]

    def _send(self, pool: ThreadPoolExecutor, folder: Path, groups: Sequence[Sequence[str]]) -> Iterable[Sequence[str]]:
        def send(group: Sequence[str]) -> Sequence[str]:
            for path in group:
                self._try(path, functools.partial(self._at.put_file, str(folder / path)))
            return group

        return pool.map(send, groups)

    def _has(self, path: str, listed: FileList) -> bool:
        """Whether a file at the URL has the expected content."""
        size, digest = listed.files[path]
        found = hashlib.sha256()
        for start in range(0, size, fetching.PIECE):
            found.update(fetching.piece(f"{self.url}/{path}", start, min(start + fetching.PIECE, size)))
        return found.hexdigest() == digest


class _Hub(_Target):
    """A folder of a repository of the Hugging Face Hub, which takes many files at once."""

    def __init__(self, url: str) -> None:
        super().__init__(url)

        def resolve() -> Any:
            try:
                return self._at.resolve_path(self._root)
            except (ValueError, NotImplementedError) as error:
                raise FileNotFoundError(str(error)) from error

        try:
            self._where = fetching.attempt(url, resolve, "found")
        except FetchError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise RequestError(
                f"{url}: no such repository, or no access with the token in the environment; log in with `hf auth login`, and "
                "create the repository first, for instance with `hf repos create NAME --type dataset`"
            ) from error

    def finish(self, contents: Mapping[str, bytes], removed: Sequence[str]) -> None:
        """Removes and writes files in one commit."""
        self._commit(contents, removed)

    def _send(self, pool: ThreadPoolExecutor, folder: Path, groups: Sequence[Sequence[str]]) -> Iterable[Sequence[str]]:
        if groups:
            self._commit({path: str(folder / path) for group in groups for path in group})
        return groups

    def _commit(self, contents: Mapping[str, str | bytes], removed: Sequence[str] = ()) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        where = self._where
        inside = f"{where.path_in_repo}/" if where.path_in_repo else ""
        operations: list[Any] = [CommitOperationAdd(f"{inside}{path}", data) for path, data in contents.items()]
        operations += [CommitOperationDelete(f"{inside}{path}") for path in removed]
        name = f"Add {plural(len(contents), 'file')} of a store of fkd_ssl"
        at = {"repo_id": where.repo_id, "repo_type": where.repo_type, "revision": where.revision}
        self._try(next(iter(contents)), lambda _: HfApi().create_commit(operations=operations, commit_message=name, **at))
