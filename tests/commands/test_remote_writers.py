"""precompute of tars in an object store: by several machines, by torchrun, on Ray, and after kills."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs", reason="pip install s3fs 'moto[server]'")
pytest.importorskip("moto.server", reason="pip install s3fs 'moto[server]'")

from fkd_ssl.images import scan
from fkd_ssl.images.shrinking import shrink_set
from tests.test_images_remote import Server, environment, s3, server  # noqa: F401  (fixtures)

pytestmark = pytest.mark.slow
LINE = "precompute --teacher own_teacher:make --crops 4 --codec Flat --chunk_size 16"
URL = "s3://cluster/{00000..00005}.tar"

# Python imports it at its start. A process is a machine: it has its own folder of fetched files.
START = """
import os
os.environ["FKD_SSL_FETCHED"] = f"{os.environ['PYTHONPATH']}/fetched/{os.getpid()}"
"""

# Shards have three rows, like the tars.
TEACHER = """
import os, time
from pathlib import Path
from fkd_ssl.store import manifest

manifest.ROWS_PER_SHARD = 3
HERE = Path(__file__).parent

class Dying(Network):
    def forward(self, pixels):
        if len(list((HERE / "new/targets/dying").glob("codes-*.json"))) >= int(os.environ.get("DIE_AFTER", "2")):
            try:
                (HERE / "victim").touch(exist_ok=False)
                os.kill(os.getpid(), 9)
            except FileExistsError:
                pass
        return super().forward(pixels)

def dying():
    return Dying()
"""


def contents(folder: Path) -> dict[str, bytes]:
    files = {path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def fetched(reads: list[str]) -> list[int]:
    """The tars that were read, in order."""
    return [int(read.split()[0].removesuffix(".tar")[-5:]) for read in reads]


def fetched_by_machine() -> list[list[int]]:
    """The tars that each machine has fetched."""
    numbers = {tar.read_bytes(): int(tar.stem) for tar in Path("tars").iterdir()}
    return [[numbers[path.read_bytes()] for path in folder.glob("?" * 64)] for folder in Path("fetched").iterdir()]


@pytest.fixture
def workplace(work: Path, server: Server, s3: Any, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The prepared folder, with `whole`, a store of the folder `train`; its images are also in six tars on the server."""
    with (work / "own_teacher.py").open("a") as file:
        file.write(TEACHER)
    (work / "sitecustomize.py").write_text(START)
    (work / "start.py").write_text("import sys, own_teacher\nfrom fkd_ssl.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("PYTHONPATH", str(work))
    monkeypatch.setenv("FKD_SSL_CACHE", str(work / "shared"))  # the indexes; a machine's own folder is in FKD_SSL_FETCHED
    shrink_set(scan("train"), work / "tars", short_side=0, tars=6)
    if not s3.exists("cluster"):
        s3.mkdir("cluster")
    for tar in sorted((work / "tars").iterdir()):
        s3.put_file(str(tar), f"cluster/{tar.name}")
    server.reads.clear()
    return work


def run(*arguments: str, start: tuple[str, ...] = ("start.py",), **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *start, *LINE.split(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})


def whole(teacher: str = "make") -> dict[str, bytes]:
    done = run("--images", "train", "--store", "whole", "--teacher", f"own_teacher:{teacher}")
    assert done.returncode == 0, done.stderr
    return contents(Path("whole"))


def test_each_machine_fetches_its_own_tars(workplace: Path, server: Server) -> None:  # noqa: F811
    """The first run lists the images, which fetches all. The others need the tars of their shards only."""
    first = run("--images", URL, "--store", "new", "--shards", "99/100")
    assert first.returncode == 0, first.stderr
    assert sorted(fetched(server.reads)) == [0, 1, 2, 3, 4, 5]
    for share, tars in (("0/3", [0, 3]), ("1/3", [1, 4]), ("2/3", [2, 5])):
        server.reads.clear()
        done = run("--images", URL, "--store", "new", "--shards", share)
        assert done.returncode == 0, done.stderr
        assert sorted(fetched(server.reads)) == tars
    assert contents(Path("new")) == whole()


def test_torchrun(workplace: Path, server: Server) -> None:  # noqa: F811
    assert run("--images", URL, "--store", "new", "--shards", "99/100").returncode == 0
    server.reads.clear()
    shutil.rmtree("fetched")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "start.py")
    done = run("--images", URL, "--store", "new", start=torchrun)
    assert done.returncode == 0, done.stderr
    assert set(fetched(server.reads)) == {0, 1, 2, 3, 4, 5}
    # each process fetched a tar once; one that is done takes over shards of the other
    assert len(server.reads) == sum(map(len, fetched_by_machine()))
    assert contents(Path("new")) == whole()


def test_ray(workplace: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Of two workers one is killed. Ray starts another, which fetches the tar of that shard again."""
    ray = pytest.importorskip("ray", reason="pip install 'fkd_ssl[ray]'")
    line = ("--images", URL, "--store", "new", "--teacher", "own_teacher:dying")
    assert run(*line, "--shards", "99/100").returncode == 0
    server.reads.clear()
    shutil.rmtree("fetched")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    try:
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        done = run(*line, "--runner", "ray")
    finally:
        ray.shutdown()
    assert done.returncode == 0, done.stderr
    assert (workplace / "victim").exists()
    machines = fetched_by_machine()
    assert len([tars for tars in machines if tars]) >= 3  # the killed one, the one that replaced it, and the other
    assert {tar for tars in machines for tar in tars} == {0, 1, 2, 3, 4, 5}
    assert len(server.reads) == sum(map(len, machines)) <= 6 + 1
    assert contents(Path("new")) == whole("dying")


@pytest.mark.parametrize("after", ["0", "1", "4"])
def test_a_killed_process_and_the_next(workplace: Path, server: Server, after: str) -> None:  # noqa: F811
    """Killed in the codec's sample or a shard, while the server drops connections; the bytes are those of the folder."""
    line = ("--images", URL, "--store", "new", "--teacher", "own_teacher:dying")
    server.harms += ["", "drop", "truncate", "", "drop"]
    assert run(*line, DIE_AFTER=after).returncode == -signal.SIGKILL
    assert not (Path("new/targets/dying") / "codes-00005.json").exists()
    done = run(*line)
    assert done.returncode == 0, done.stderr
    assert contents(Path("new")) == whole("dying")
