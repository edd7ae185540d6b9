"""precompute by many processes: torchrun, --shards, Ray; and several teachers on the command line."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fkd_ssl.commands import precompute, resolve
from fkd_ssl.commands.precompute import Config
from fkd_ssl.store import manifest

LINE = "precompute --images train --teacher own_teacher:make --crops 4 --codec Flat --chunk_size 16"

# shards of 4 rows in every process that imports the teacher; `slow` records its process, and waits once to be killed
TEACHER = """
import os, time
from pathlib import Path
from fkd_ssl.commands import resolve
from fkd_ssl.store import manifest

manifest.ROWS_PER_SHARD = 4
HERE = Path(__file__).parent

class Slow(Network):
    def forward(self, pixels):
        with (HERE / "pids").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        if len(list((HERE / "new/targets/slow").glob("codes-*.json"))) >= 2:
            try:
                (HERE / "victim").open("x").write(str(os.getpid()))
                time.sleep(320)
            except FileExistsError:
                pass
        return super().forward(pixels)

def slow():
    return Slow()
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def workplace(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The prepared folder with five small shards."""
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 4)
    with (work / "own_teacher.py").open("a") as file:
        file.write(TEACHER)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    sys.modules.pop("own_teacher", None)
    return work


class TestShards:
    def test_jobs_of_a_share_each(self, workplace: Path, call: Any) -> None:
        assert call(f"{LINE} --store whole").status == 0
        first = call(f"{LINE} --store new --shards 2/3")
        assert first.status == 0
        assert "4 of 5 shards left to the other --shards" in first.err
        assert json.loads(call("inspect new --json").out)["columns"]["make"]["missing_shards"] == [0, 1, 3, 4]
        assert call(f"{LINE} --store new --shards 0/2 --json").status == 0
        last = call(f"{LINE} --store new --shards 1/2 --json")
        assert json.loads(last.out)["left"] == []
        assert contents(workplace / "new") == contents(workplace / "whole")

    @pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "1/0", "1/2/3"])
    def test_what_is_no_share(self, workplace: Path, call: Any, text: str) -> None:
        status, _, err = call(f"{LINE} --store new --shards={text}")
        assert status == 2
        assert f"--shards {text}: expected i/n" in err
        assert not (workplace / "new").exists()

    @pytest.mark.parametrize(
        ("more", "said"),
        [("--shards 0/2", "--shards cannot be used under torchrun"), ("--runner ray", "leave out --shards and torchrun")],
    )
    def test_not_with_torchrun(self, workplace: Path, call: Any, monkeypatch: pytest.MonkeyPatch, more: str, said: str) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        status, _, err = call(f"{LINE} --store new {more}")
        assert status == 2
        assert said in err

    def test_ray_says_no_accuracy(self, workplace: Path, call: Any) -> None:
        status, _, err = call(f"{LINE} --store new --runner ray --evaluate val")
        assert status == 2
        assert "--evaluate cannot be used with --runner ray" in err

    def test_a_rank_that_is_not_the_first_says_nothing(
        self, workplace: Path, call: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert call(f"{LINE} --store new") == (0, "", "")
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")
        assert json.loads(call("inspect new --json").out)["columns"]["make"]["missing_shards"] == []


@pytest.mark.slow
def test_torchrun(workplace: Path, call: Any) -> None:
    """Two processes, of which one prints."""
    assert call(f"{LINE} --store whole").status == 0
    (workplace / "start.py").write_text("import sys, own_teacher\nfrom fkd_ssl.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "start.py"]
    done = subprocess.run([*torchrun, *LINE.split(), "--store", "new"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("new: ") == 1
    left = {name: data for name, data in contents(workplace / "new").items() if "/." not in name}
    assert left == contents(workplace / "whole")


class TestSeveralTeachers:
    def test_two_columns_at_once(self, workplace: Path, call: Any) -> None:
        both = f"{LINE.replace('own_teacher:make', 'own_teacher:make,own_teacher:other')} --store both"
        assert call(both).status == 0
        assert call(f"{LINE} --store single").status == 0
        assert call(f"{LINE.replace(':make', ':other')} --store single").status == 0
        assert contents(workplace / "both") == contents(workplace / "single")
        assert call(f"{both} --column a,b").status == 0
        assert set(json.loads(call("inspect both --json").out)["columns"]) == {"make", "other", "a", "b"}

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ("--checkpoint a,b,c", "checkpoint 'a,b,c': 3 for 2 teachers"),
            ("--column a", "2 teachers, columns ['a']"),
            ("--column a,a", "2 teachers, columns ['a', 'a']"),
        ],
    )
    def test_what_is_refused(self, workplace: Path, call: Any, more: str, said: str) -> None:
        status, _, err = call(f"{LINE.replace('own_teacher:make', 'own_teacher:make,own_teacher:other')} --store new {more}")
        assert status == 2
        assert said in err
        assert not (workplace / "new").exists()

    def test_a_checkpoint_for_one_of_them(self, workplace: Path, call: Any) -> None:
        status, _, err = call(
            f"{LINE.replace('own_teacher:make', 'own_teacher:make,mocov2')} --store new --checkpoint ,none.pth"
        )
        assert status == 2
        assert "none.pth" in err


@pytest.mark.parametrize(
    ("teacher", "checkpoint", "expected"),
    [
        ("a", None, None),
        ("a", "runs/x+y", "{0}/runs/x+y"),
        ("timm/a", "pretrained", "pretrained"),
        ("a+b", "f+runs/g", "{0}/f+{0}/runs/g"),
        ("a+b,c", "+g,h", "+{0}/g,{0}/h"),
    ],
)
def test_ray_is_told_paths_that_mean_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str, checkpoint: str | None, expected: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    config = precompute._with_absolute_paths(Config(images="i", store="s", teacher=teacher, checkpoint=checkpoint))
    assert config.checkpoint == (None if expected is None else expected.format(tmp_path))


@pytest.mark.slow
class TestRay:
    @pytest.fixture
    def cluster(self, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A Ray cluster with two processors on this machine."""
        ray = pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", str(workplace))
        monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
        yield ray
        ray.shutdown()

    def test_a_killed_worker_is_replaced_and_an_error_is_said(self, workplace: Path, call: Any, cluster: Any) -> None:
        """After a kill within a shard, the bytes equal those of one process; errors are reported as without Ray."""
        line = LINE.replace(":make", ":slow")
        killed: list[int] = []

        def kill() -> None:
            until = time.monotonic() + 300
            while time.monotonic() < until:
                victim = workplace / "victim"
                if victim.exists() and victim.read_text():
                    killed.append(int(victim.read_text()))
                    os.kill(killed[0], signal.SIGKILL)
                    return
                time.sleep(0.05)

        killer = threading.Thread(target=kill)
        killer.start()
        status, out, err = call(f"{line} --store new --runner ray --json")
        killer.join()
        assert (status, len(killed)) == (0, 1), err
        assert json.loads(out)["busy"] == json.loads(out)["left"] == []
        pids = (workplace / "pids").read_text().split()
        assert len(set(pids)) >= 3  # this process, which wraps the network, and at least two workers
        found = contents(workplace / "new")
        assert call(f"{line} --store whole").status == 0
        assert {name: data for name, data in found.items() if "/." not in name} == contents(workplace / "whole")
        (workplace / "train/birch/3.png").write_bytes(b"no picture")
        status, _, err = call(f"{LINE} --store bad --runner ray")
        assert status == 1
        assert "birch/3.png: not a readable image" in err


def test_without_ray_it_says_what_to_install(workplace: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, err = call(f"{LINE} --store new --runner ray")
    assert status == 2
    assert "--runner ray needs Ray: pip install 'fkd_ssl[ray]'" in err


class TestPlaces:
    def test_each_process_of_a_machine_has_a_gpu_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        assert resolve.device() == torch.device("cuda", 0)
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert resolve.device() == torch.device("cuda", 3)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert resolve.device() == torch.device("cuda", 1)

    def test_and_its_part_of_the_processors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
        assert resolve.cpu_threads() == 12
        for world, expected in ((4, 3), (5, 2), (16, 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
            assert resolve.cpu_threads() == expected
