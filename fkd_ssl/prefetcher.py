"""Fetches remote files before they are read."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from fkd_ssl.fetching import RemoteFile, cache_limit

_AHEAD = 2  # files that are fetched at a time
_UNREAD = 1 / 4  # share of the cache for fetched files that were not read yet; more could evict each other
_POLL = 0.1  # seconds


class Prefetcher:
    """Fetches remote files before they are read, in threads of this process that do not delay its end.

    Args:
        files_of: Returns the remote files of a number.
    """

    def __init__(self, files_of: Callable[[int], Sequence[RemoteFile]]) -> None:
        self._files_of = files_of
        self._begin()

    def _begin(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._queue: deque[int] = deque()
        self._waiting: set[int] = set()
        self._unread: dict[RemoteFile, int] = {}
        self._threads = 0

    def expect(self, numbers: Iterable[int]) -> None:
        """Begins to fetch the files of these numbers in order, unless they are fetched already."""
        if self._process != os.getpid():  # a forked process has no threads
            self._begin()
        new = [number for number in dict.fromkeys(numbers) if number not in self._waiting and self._missing(number)]
        with self._lock:
            self._queue.extend(new)
            self._waiting.update(new)
            while self._threads < min(_AHEAD, len(self._queue)):
                self._threads += 1
                threading.Thread(target=self._work, name="fetch", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads -= 1
                    return
                number = self._queue.popleft()
            with suppress(Exception):  # raised again where the file is read
                for file in self._missing(number):
                    while not self._has_room(file.size):
                        time.sleep(_POLL)
                    if (fetched_at := file.fetch()) is not None:  # otherwise it was read meanwhile
                        with self._lock:
                            self._unread[file] = fetched_at
            self._waiting.discard(number)

    def _has_room(self, size: int) -> bool:
        with self._lock:
            for file, fetched_at in list(self._unread.items()):
                if file.read_at() != fetched_at:  # it was read, or removed
                    del self._unread[file]
            unread = sum(file.size for file in self._unread)
        return not unread or unread + size <= _UNREAD * cache_limit()

    def _missing(self, number: int) -> list[RemoteFile]:
        return [file for file in self._files_of(number) if not file.is_fetched]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Prefetcher, (self._files_of,))
