"""The loader: errors after a worker's death, a full /dev/shm and Ctrl-C."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fkd_ssl.data import Loader, memory
from fkd_ssl.errors import FkdError, ImageError, RequestError

KEYS = [[2 * k, 2 * k + 1] for k in range(10)]


class Reads(Dataset[Any]):
    """Item k is `function(k)`, called in the worker."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def __getitem__(self, key: int) -> Any:
        return self.function(key)

    def __len__(self) -> int:
        return 20


def loader(function: Callable[[int], Any], *, workers: int = 1, prefetch: int = 1) -> Loader:
    return Loader(Reads(function), KEYS, workers=workers, collate=torch.tensor, prefetch=prefetch)


def at_seven(do: Callable[[], Any]) -> Callable[[int], int]:
    return lambda key: key if key != 7 else do()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_the_middle_of_a_batch() -> None:
    """Sends only the first bytes of a batch, so that the parent waits for the rest."""
    frame = sys._getframe()
    while "data_queue" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    time.sleep(0.5)  # until the parent has received the earlier batches
    os.write(frame.f_locals["data_queue"]._writer.fileno(), struct.pack("!i", 1000) + b"part")
    time.sleep(0.5)
    kill()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order_and_in_shared_memory(workers: int) -> None:
    found = list(loader(lambda key: key, workers=workers))
    assert [batch.tolist() for batch in found] == KEYS
    assert all(batch.is_shared() == (workers > 0) for batch in found)
    again = loader(lambda key: key, workers=workers)
    assert [len(list(again)) for _ in range(2)] == [10, 10]


def test_every_tensor_of_a_batch_is_shared_in_the_worker() -> None:
    """Before it is sent, so that an error is raised for this batch."""

    batch = memory.share(
        {"a": torch.tensor([1, 2]), "b": [torch.zeros(3), {"c": torch.ones(2)}], "d": "x", "e": (torch.ones(1), 5)}
    )
    assert all(tensor.is_shared() for tensor in (batch["a"], batch["b"][0], batch["b"][1]["c"], batch["e"][0]))
    assert (batch["a"].tolist(), batch["d"], batch["e"][1]) == ([1, 2], "x", 5)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ImageError("a.jpg: not a readable image"), r"^a\.jpg: not a readable image$"),
        (PermissionError(errno.EACCES, "Permission denied", "b.jpg"), r"^\[Errno 13\] Permission denied: 'b\.jpg'$"),
        (ValueError("a mistake"), "a mistake"),
    ],
)
def test_errors_of_the_data_set_arrive_as_they_are(raised: Exception, expected: str, workers: int) -> None:
    def fail() -> None:
        raise raised

    batches = iter(loader(at_seven(fail), workers=workers))
    assert [next(batches).tolist() for _ in range(3)] == KEYS[:3]
    with pytest.raises(type(raised), match=expected) as caught:
        next(batches)
    assert getattr(caught.value, "filename", None) == getattr(raised, "filename", None)


def test_a_negative_number_of_workers() -> None:
    with pytest.raises(RequestError, match="workers must not be negative, got -2"):
        loader(lambda key: key, workers=-2)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("end", "how"),
    [
        (kill, "was killed by SIGKILL"),
        (lambda: os._exit(3), "ended with status 3"),
        (lambda: os._exit(0), "ended with status 0"),
        (kill_in_the_middle_of_a_batch, "was killed by SIGKILL"),
    ],
    ids=["killed", "status", "quietly", "sending"],
)
def test_a_worker_that_dies(end: Callable[[], Any], how: str, workers: int) -> None:
    started = time.monotonic()
    batches = iter(loader(at_seven(end), workers=workers))
    with pytest.raises(FkdError, match=f"^a process that reads images {how}, often for lack of memory .*--workers 0"):
        list(batches)
    assert time.monotonic() - started < 20


def test_a_death_is_raised_where_the_next_batch_is_asked_for_and_nowhere_else() -> None:
    batches = iter(loader(at_seven(kill)))
    assert [next(batches).tolist() for _ in range(2)] == KEYS[:2]
    until = time.monotonic() + 1.5  # the worker is at the fourth batch, and dies
    while time.monotonic() < until:
        sum(range(1000))
    with pytest.raises(FkdError, match="SIGKILL"):
        list(batches)


def test_workers_do_not_hear_ctrl_c() -> None:
    blocked = list(loader(lambda key: int(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))))
    assert all(batch.tolist() == [1, 1] for batch in blocked)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_signal_handler_of_the_program_stays() -> None:
    heard: list[int] = []
    list(loader(lambda key: key))  # torch has set its own
    before = signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))
    try:
        batches = iter(loader(lambda key: key))
        next(batches)
        subprocess.run([sys.executable, "-c", ""], check=True)
        assert heard
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_dies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any batch is requested."""
    from fkd_ssl.data import loading

    monkeypatch.setattr(loading, "start_worker", lambda worker: kill())
    batches = iter(loader(lambda key: key, workers=2))
    time.sleep(1)
    with pytest.raises(FkdError, match="SIGKILL"):
        next(batches)


def test_torch_raises_nothing_of_a_worker_that_was_ended() -> None:
    """Its signal handler is installed if another DataLoader was used before."""
    list(DataLoader(Reads(lambda key: key), num_workers=1))
    batches = iter(loader(lambda key: key))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    subprocess.run([sys.executable, "-c", ""], check=True)
    with pytest.raises(FkdError, match="SIGKILL"):
        list(batches)
    subprocess.run([sys.executable, "-c", ""], check=True)


def test_a_program_that_fails_does_not_wait_for_its_workers() -> None:
    """Even if the exception keeps the loader alive and workers have 60 seconds after a SIGTERM."""
    script = (
        "import time\n"
        "from fkd_ssl.data import Loader\n"
        "class Slow:\n"
        "    def __getitem__(self, key):\n"
        "        time.sleep(30 if key else 0)\n"
        "batches = iter(Loader(Slow(), [[0], [1], [1]], workers=1, collate=list))\n"
        "next(batches)\n"
        "time.sleep(1)\n"
        "error = ValueError(batches)\n"
        "error.itself = error\n"
        "print('now', flush=True)\n"
        "raise error\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    assert "ValueError" in process.communicate(timeout=25)[1]
    assert process.returncode == 1


UNSHARE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
NETWORK = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
"""
VERBS = {
    "knn": "knn --model net:net --pixels 224 --train train --leave_one_out --workers 2",
    "features": "features --model net:net --pixels 224 --images train --features kept --workers 2",
    "retrieve": "retrieve --model net:net --pixels 224 --gallery train --workers 2",
    "linear": "linear --protocol moco --model net:net --pixels 224 --train train --val train --workers 2",
    "sweep": "linear --protocol sweep --model net:net --pixels 224 --train train --val train --workers 2",
    "mocov2": "pretrain --images train --out moco --batch_size 6 --epochs 2 --queue 6 --workers 2",
    "swav": "pretrain --method swav --images train --out swav --batch_size 6 --epochs 2 --workers 2",
    "train": "train --images train --targets online --teacher net:net --student squeezenet1_1 --batch_size 24 --out run "
    "--epochs 2 --workers 2",
}


@pytest.fixture(scope="module")
def small_memory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Status and standard error of each verb, run in a mount namespace where /dev/shm has 1 MB."""
    folder = tmp_path_factory.mktemp("shm")
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs mount namespaces (unshare)")
    (folder / "net.py").write_text(NETWORK)
    for k in range(12):
        path = folder / f"train/{'ab'[k % 2]}/{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(path)
    script = (
        "import os, sys\n"
        "from fkd_ssl.cli import main\n"
        f"for name, line in {VERBS!r}.items():\n"
        "    sys.stderr.flush()\n"
        "    os.dup2(os.open(name + '.err', os.O_WRONLY | os.O_CREAT), 2)\n"
        "    with open(name + '.status', 'w') as file:\n"
        "        file.write(str(main(line.split())))\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [*UNSHARE, "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name: (int((folder / f"{name}.status").read_text()), (folder / f"{name}.err").read_text()) for name in VERBS}


@pytest.mark.skipif(not memory.SHARED.is_dir(), reason="there is no /dev/shm")
@pytest.mark.parametrize("verb", VERBS)
def test_a_small_shared_memory_ends_a_verb_at_once(verb: str, small_memory: dict[str, tuple[int, str]]) -> None:
    status, said = small_memory[verb]
    assert (status, "Traceback" in said) == (1, False), said
    assert re.fullmatch(
        rf"fkd-ssl {VERBS[verb].split()[0]}: a batch does not fit into shared memory: it needs (1\.8|3\.[67]) MB, and "
        rf"{memory.SHARED} has \d+\.\d kB of its 1\.0 MB free; enlarge it \(docker run --shm-size=2g\), or use fewer "
        r"--workers, or --workers 0",
        said.splitlines()[-1],
    )
