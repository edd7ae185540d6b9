"""The DataLoader of this library. Its errors are short and say what to do, and it never hangs."""

import contextlib
import multiprocessing
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from fkd_ssl import allocator, processes
from fkd_ssl.data import memory
from fkd_ssl.errors import FkdError, RequestError

_FEWER = "fewer --workers, or --workers 0"
_SENT = (FkdError, OSError)
"""Errors with a message for the user. Workers send them unchanged, while torch would send their traceback as text."""
_GRACE_SECONDS = 60
_abandoned: list[Iterator[Any]] = []


class Loader(DataLoader[Any]):
    """A DataLoader over batches of keys. Its errors are short, and an error in a worker never blocks the parent.

    - A worker moves its batch into shared memory when it collates it, so that an error is raised in the parent. In torch, a
      thread of the queue moves it, which only prints the error, and the parent waits forever.
    - If a worker dies, `next` raises FkdError. In torch, a signal handler raises an error at any point of the parent, or the
      parent fails on a batch that was only partly sent.
    - Workers ignore Ctrl-C; the parent ends them.

    Args:
        dataset: Read by `dataset.__getitems__(keys)` if it has that, else by `dataset[key]`.
        batches: Lists of keys, as a list or a batch sampler.
        workers: Number of processes that read; 0 reads in this process.
        collate: Collates the items into a batch.
        prefetch: Number of batches that each worker reads ahead.
        generator: Generator of the workers' seed. Default: torch's global generator.

    Raises:
        RequestError: `workers` is negative.
        FkdError: While iterating: a worker died or could not be started, or a batch does not fit into shared memory.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Iterable[Sequence[Any]],
        *,
        workers: int,
        collate: Callable[[Any], Any],
        prefetch: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        if workers < 0:
            raise RequestError(f"workers must not be negative, got {workers}")
        super().__init__(
            _Batches(dataset, collate),
            batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists
            num_workers=workers,
            collate_fn=_unchanged,
            worker_init_fn=start_worker,
            prefetch_factor=prefetch if workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=generator,
        )

    def __iter__(self) -> Any:
        """Starts the workers and returns an iterator over the batches."""
        if not self.num_workers:
            return map(_raised, super().__iter__())
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the workers inherit it
        try:
            # torch makes as many queues; fail here instead of there, where the iterator's destructor would print a traceback
            [multiprocessing.Queue() for _ in range(self.num_workers + 1)]
            batches: Any = super().__iter__()
            # so that torch's signal handler ignores these workers
            signal_handling._remove_worker_pids(id(batches))  # type: ignore[attr-defined]
            batches._worker_pids_set = False
            workers: list[Any] = batches._workers
        except OSError as error:
            raise FkdError(
                f"cannot start {self.num_workers} processes that read images: {error.strerror or error} (is {memory.SHARED} "
                f"full?); use {_FEWER}"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        weakref.finalize(batches, _kill, workers)  # also at exit, when Python would wait for them
        return _Reader(batches, workers)


class _Batches(Dataset[Any]):
    """Whole batches of a data set, collated and in shared memory, or the error of a batch."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.collate = collate

    def __len__(self) -> int:
        length: int = len(self.dataset)  # type: ignore[arg-type]
        return length

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        try:
            read = getattr(self.dataset, "__getitems__", None)
            batch = self.collate([self.dataset[key] for key in keys] if read is None else read(keys))
            return batch if get_worker_info() is None else memory.share(batch)
        except _SENT as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch


def _raised(batch: Any) -> Any:
    """Returns a batch, or raises it if it is an error."""
    if isinstance(batch, _SENT):
        raise batch
    return batch


class _Reader:
    """torch's iterator with the errors of Loader. A generator would keep each batch alive until the next one arrives."""

    def __init__(self, batches: Iterator[Any], workers: list[Any]) -> None:
        self._batches = batches
        self._workers = workers

    def __iter__(self) -> "_Reader":
        return self

    def __next__(self) -> Any:
        try:
            with _interrupted_by_death(self._workers):
                return _raised(next(self._batches))
        except StopIteration:
            raise
        except BaseException as error:
            died = _how_died(self._workers) if isinstance(error, Exception) and not isinstance(error, FkdError) else ""
            _kill(self._workers)
            _abandoned.append(self._batches)  # else torch waits for its workers, and perhaps for the rest of a batch
            if died:
                raise FkdError(died) from error
            raise


def _kill(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()


@contextlib.contextmanager
def _interrupted_by_death(workers: list[Any]) -> Iterator[None]:
    """Raises ChildProcessError as soon as a worker has died, also during a read that would never end."""

    def check(*_: Any) -> None:
        if any(worker.exitcode for worker in workers):  # None while it runs, 0 after a normal end
            raise ChildProcessError

    main = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
    before = signal.signal(signal.SIGCHLD, check) if main else None
    try:
        check()
        yield
    finally:
        if main:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _how_died(workers: list[Any]) -> str:
    """Returns the message for a worker that has died; "" if none has."""
    sentinels = {worker.sentinel: worker for worker in workers}
    for sentinel in connection.wait(sentinels, timeout=1):  # a worker closes its pipes a little before it has ended
        sentinels[sentinel].join(1)
    codes = [worker.exitcode for worker in workers if worker.exitcode is not None]
    if not codes:
        return ""
    code = min(codes)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return (
        f"a process that reads images {how}, often for lack of memory (see dmesg): use {_FEWER}, then repeat the command to "
        "continue"
    )


def start_worker(worker: int) -> None:
    """Prepares a worker: limits faiss to one thread, keeps freed memory, and ends with its parent or 60 s after a SIGTERM.

    A cluster sends SIGTERM to all processes of a job. The parent then finishes its step, for which it needs its workers, and
    saves a checkpoint.

    Args:
        worker: Number of the worker.
    """
    import faiss

    faiss.omp_set_num_threads(1)
    if get_worker_info() is not None:
        allocator.keep_freed_memory()  # a spawned worker inherits nothing
        processes.end_with_parent()
        sys.excepthook = _except_broken_connections
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_SECONDS))


def _except_broken_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an error of the thread that sends a worker's batches, unless the parent ended and broke the connection."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)
