"""Plain keys: each read of an image gives its next pass, in every way that a DataLoader reads."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from fkd_ssl.crops import RECIPES
from fkd_ssl.data import Crops, FreshCrops, PassSampler, StoredCrops
from fkd_ssl.errors import RequestError
from fkd_ssl.images import scan
from fkd_ssl.store import Store

M, PASSES = 2, 3  # so 6 stored crops


@pytest.fixture
def store(make_store: Callable[..., Store], tmp_path: Path) -> Store:
    return make_store(tmp_path / "store", crops=M * PASSES, codec="Flat")


@pytest.fixture
def data(store: Store, image_folder: Path) -> StoredCrops:
    return StoredCrops(store, image_folder, crops_per_image=M, pixels=16)


def fresh(image_folder: Path) -> FreshCrops:
    return FreshCrops(scan(image_folder), RECIPES["mocov2"], crops_per_image=M, pixels=16)


class Reads:
    """Which passes of which images batches have, told by the pixels."""

    def __init__(self, data: Crops, passes: int = 2 * PASSES) -> None:
        self.data = data
        self.known = {self.of(data[p, i]): p for p in reversed(range(passes)) for i in range(len(data))}

    def of(self, item: dict[str, Any]) -> tuple[str, bytes]:
        images: Tensor = item["images"]
        return item["path"], images.numpy().tobytes()

    def passes(self, batches: Iterable[dict[str, Any]]) -> dict[str, list[int]]:
        """The passes of each image by its path, in the order of reading."""
        found: dict[str, list[int]] = {}
        for batch in batches:
            for path, images in zip(batch["path"], batch["images"], strict=True):
                found.setdefault(path, []).append(self.known[path, images.contiguous().numpy().tobytes()])
        return found


@pytest.mark.parametrize(
    ("workers", "context", "persistent"),
    [
        pytest.param(0, None, False, id="here"),
        pytest.param(2, "fork", False, id="fork"),
        pytest.param(2, "fork", True, id="fork-persistent"),
        pytest.param(2, "spawn", False, id="spawn", marks=pytest.mark.slow),
        pytest.param(2, "spawn", True, id="spawn-persistent", marks=pytest.mark.slow),
    ],
)
def test_each_epoch_reads_the_next_pass(data: StoredCrops, workers: int, context: str | None, persistent: bool) -> None:
    loader = DataLoader(
        data,
        batch_size=5,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=persistent,
    )
    reads = Reads(data, PASSES)
    for epoch in range(PASSES):
        assert set(map(tuple, reads.passes(loader).values())) == {(epoch,)}
    assert set(map(tuple, reads.passes(loader).values())) == {(0,)}  # all crops were read once, so now again


def test_all_stored_crops_are_read_once_before_any_twice(data: StoredCrops) -> None:
    loader = DataLoader(data, batch_size=7, shuffle=True)
    targets: dict[str, list[Tensor]] = {}
    for _ in range(PASSES):
        for batch in loader:
            for path, rows in zip(batch["path"], batch["targets"], strict=True):
                targets.setdefault(path, []).extend(rows)
    assert len(targets) == len(data)
    for i in range(len(data)):
        stored = data.columns[0].codec.decode(data.columns[0].codes(i, slice(0, M * PASSES)))
        read = torch.stack(targets[data.name(i)]).numpy()
        assert sorted(map(bytes, read)) == sorted(map(bytes, stored))  # float32 rows


@pytest.mark.parametrize("workers", [0, 2])
def test_it_counts_through_other_data_sets(data: StoredCrops, workers: int) -> None:
    """Those that read whole batches, and those that read item by item."""
    reads = Reads(data)
    loader = DataLoader(Subset(data, range(4, 16)), batch_size=4, shuffle=True, num_workers=workers)
    assert [set(map(tuple, reads.passes(loader).values())) for _ in range(2)] == [{(0,)}, {(1,)}]
    data.set_epoch(0)
    both: ConcatDataset[Any] = ConcatDataset([data, data])
    found = reads.passes(DataLoader(both, batch_size=48, num_workers=workers))
    assert set(map(tuple, found.values())) == {(0, 1)}


def test_single_items_count_too(data: StoredCrops) -> None:
    reads = Reads(data)
    items = [data[3], data[3], *DataLoader(data, batch_size=None, sampler=[3])]
    assert [reads.known[reads.of(item)] for item in items] == [0, 1, 2]
    assert torch.equal(data[0, 3]["images"], items[0]["images"])
    assert torch.equal(data[0, 3]["targets"], items[0]["targets"])
    assert reads.known[reads.of(data[3])] == 0  # of three passes; keys (p, i) do not count


def test_an_image_that_is_drawn_twice_gives_two_passes(data: StoredCrops) -> None:
    found = Reads(data).passes(DataLoader(data, batch_size=3, sampler=[1, 1, 5]))
    assert found == {data.name(1): [0, 1], data.name(5): [0]}


def test_two_loaders_share_the_count(data: StoredCrops) -> None:
    reads = Reads(data)
    one, two = (DataLoader(data, batch_size=8, shuffle=True) for _ in range(2))
    assert [set(map(tuple, reads.passes(loader).values())) for loader in (one, two, one)] == [{(0,)}, {(1,)}, {(2,)}]


def test_an_epoch_that_is_left_early_repeats_no_crop(data: StoredCrops) -> None:
    reads = Reads(data)
    batches = []
    for _ in range(PASSES):
        for k, batch in enumerate(DataLoader(data, batch_size=4, shuffle=True, num_workers=2)):
            batches.append(batch)
            if k == 1:
                break
    assert all(len(passes) == len(set(passes)) for passes in reads.passes(batches).values())


@pytest.mark.parametrize("persistent", [False, True], ids=["new-workers", "persistent"])
def test_set_epoch(data: StoredCrops, persistent: bool) -> None:
    reads = Reads(data)
    loader = DataLoader(data, batch_size=8, shuffle=True, num_workers=2, persistent_workers=persistent)
    for epoch in (2, 0, 1, 1):
        data.set_epoch(epoch)
        assert set(map(tuple, reads.passes(loader).values())) == {(epoch,)}
    with pytest.raises(RequestError, match="epoch -1: must not be negative"):
        data.set_epoch(-1)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_counts_with_its_own_workers(image_folder: Path, how: str) -> None:
    data = fresh(image_folder)
    reads = Reads(data)
    data[0], data[0]
    other = copy.deepcopy(data) if how == "deepcopy" else pickle.loads(pickle.dumps(data))  # noqa: S301
    loader = DataLoader(other, batch_size=24, num_workers=1)
    assert [reads.passes(loader)[data.name(0)] for _ in range(2)] == [[2], [3]]
    assert reads.known[reads.of(data[0])] == 2  # the other one counts for itself


def test_fresh_crops_are_drawn_again_in_each_epoch(image_folder: Path) -> None:
    data = fresh(image_folder)
    reads = Reads(data, 3)
    loader = DataLoader(data, batch_size=6, shuffle=True, num_workers=2)
    assert [set(map(tuple, reads.passes(loader).values())) for _ in range(3)] == [{(0,)}, {(1,)}, {(2,)}]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_pass_sampler_drives_a_plain_loader(data: StoredCrops, workers: int) -> None:
    sampler = PassSampler(len(data), 8, 9, seed=0)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    assert set(map(tuple, Reads(data).passes(loader).values())) == {(0, 1, 2)}


RANK = """
import pickle
import sys
import pytest
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler
from fkd_ssl.crops import RECIPES
from fkd_ssl.data import FreshCrops
from fkd_ssl.errors import RequestError
from fkd_ssl.images import scan

def epoch(e, data):
    options = dict(batch_size=4, sampler=sampler, num_workers=1, persistent_workers=True)
    loader = loaders.setdefault(id(data), DataLoader(data, **options))
    sampler.set_epoch(e)
    return {known[images.contiguous().numpy().tobytes()] for batch in loader for images in batch["images"]}

folder, file, rank = sys.argv[1:]
distributed.init_process_group("gloo", init_method=f"file://{file}", rank=int(rank), world_size=2)
data, other = (FreshCrops(scan(folder), RECIPES["mocov2"], crops_per_image=2, pixels=16) for _ in range(2))
known = {data[p, i]["images"].numpy().tobytes(): p for p in range(3) for i in range(len(data))}
sampler, loaders = DistributedSampler(data), {}
for e in range(3):
    if e:  # the first epoch is right without it
        data.set_epoch(e)
    found = epoch(e, data)
    assert found == {e}, (e, found)
assert epoch(0, other) == {0}
with pytest.raises(RequestError, match=r"call data.set_epoch\\(epoch\\)"):
    epoch(1, other)
sent = pickle.loads(pickle.dumps(other))
distributed.destroy_process_group()
with pytest.raises(RequestError, match="several processes train"):  # in a spawned worker, which knows of no other process
    [sent[i] for i in range(len(sent))]
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_distributed_training_needs_set_epoch(image_folder: Path, tmp_path: Path) -> None:
    """Each process counts only its own reads, so without it a process reads pass 0 of the images that another one has read."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(image_folder), str(tmp_path / "meet")]
    ranks = [subprocess.Popen([*command, str(k)], env=env, stderr=subprocess.PIPE, text=True) for k in range(2)]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said
