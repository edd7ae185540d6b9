"""After kills, errors and concurrent runs, the store has the same bytes."""

import errno
import json
import shutil
import signal
from contextlib import suppress

import numpy as np
import pytest

from fkd_ssl import images
from fkd_ssl.crops import RECIPES
from fkd_ssl.errors import FkdError
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write import columns, work
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.store.write.rows import Row
from fkd_ssl.targets import faiss_codecs

OPTIONS = {"crops": 6, "chunk_size": 7}  # 24 rows x 6 crops; rows and chunks do not fall together
CROPS = 24 * 6


def make(folder, image_folder, teacher, **options):
    """One `precompute` in this process; returns its summary."""
    asked = {"recipe": RECIPES["mocov2"], "pixels": 32, **OPTIONS, **options}
    return precompute(images.scan(image_folder), folder, teacher, **asked)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 5)


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory, image_folder, new_teacher):
    folder = tmp_path_factory.mktemp("whole") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "ROWS_PER_SHARD", 5)
        make(folder, image_folder, new_teacher())
    return folder


@pytest.fixture
def whole(whole_folder, tree):
    """The files of a store made without interruption, in five shards."""
    files = tree(whole_folder)
    assert sum(name.startswith("crops/") for name in files) == 10
    return files


def finish(start, tmp_path, image_folder, **options):
    report = tmp_path / "report.json"
    asked = {"images": str(image_folder), "folder": str(tmp_path / "store"), "rows_per_shard": 5, "report": str(report)}
    process = start(**{**asked, **options})
    process.join(120)
    return process.exitcode, json.loads(report.read_text()) if report.exists() else None


@pytest.mark.parametrize("threads", [1, 3])
def test_same_bytes_with_any_number_of_threads(tmp_path, whole, image_folder, tiny_teacher, tree, threads):
    make(tmp_path / "store", image_folder, tiny_teacher, threads=threads)
    assert tree(tmp_path / "store") == whole


def test_same_bytes_in_another_process_at_another_time(tmp_path, whole, start, tree, image_folder):
    """A store does not depend on the time, its path or the process."""
    code, report = finish(start, tmp_path, image_folder)
    assert code == 0
    assert report["crops"] == CROPS
    assert tree(tmp_path / "store") == whole


@pytest.mark.parametrize("calls", [1, 15, 22, 24, 27, 40])
def test_killed_in_the_teacher_and_resumed(tmp_path, whole, start, tree, image_folder, calls):
    """21 forwards train the codec (all 144 crops), then five for each of four shards of 30 crops, four for the last."""
    code, _ = finish(start, tmp_path, image_folder, kill_at=("embed", calls), journal_seconds=0)
    assert code == -signal.SIGKILL
    unfinished = tree(tmp_path / "store")
    assert set(whole) - set(unfinished)
    code, report = finish(start, tmp_path, image_folder)
    assert code == 0
    assert tree(tmp_path / "store") == whole
    done = max(0, calls - 22) // 5 * 30 + max(0, calls - 22) % 5 * 7  # whole shards, and chunks of the shard after
    assert report["crops"] == CROPS - done


@pytest.mark.parametrize("calls", [1, 2, 4, 6, 8, 10, 20])
def test_killed_while_syncing_and_resumed(tmp_path, whole, start, tree, image_folder, calls):
    code, _ = finish(start, tmp_path, image_folder, kill_at=("fsync", calls), journal_seconds=0)
    assert code == -signal.SIGKILL
    code, _ = finish(start, tmp_path, image_folder)
    assert code == 0
    left = {name for name in tree(tmp_path / "store") if ".tmp-" in name}  # a killed process leaves its temporary file
    assert {name: data for name, data in tree(tmp_path / "store").items() if name not in left} == whole
    assert verify(open_store(tmp_path / "store"), images.scan(image_folder)).problems == []


def test_killed_twice_at_the_same_chunk(tmp_path, whole, start, tree, image_folder):
    for calls in (25, 2, 2):  # 22 and on write; once resumed there is no codec to train
        assert finish(start, tmp_path, image_folder, kill_at=("embed", calls), journal_seconds=0)[0] == -signal.SIGKILL
    code, report = finish(start, tmp_path, image_folder)
    assert code == 0
    assert report["crops"] == CROPS - 5 * 7 + 5  # five chunks: 7, 7, 7, 7 and the shard's last two
    assert tree(tmp_path / "store") == whole


def test_two_processes_at_once(tmp_path, whole, start, tree, image_folder):
    common = {"images": str(image_folder), "folder": str(tmp_path / "store"), "rows_per_shard": 5}
    workers = [start(**common, report=str(tmp_path / f"{k}.json")) for k in range(2)]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert tree(tmp_path / "store") == whole
    reports = [json.loads((tmp_path / f"{k}.json").read_text()) for k in range(2)]
    assert sum(report["crops"] for report in reports) == CROPS  # no crop was seen twice


def test_a_shard_that_another_process_writes_is_left_to_it(tmp_path, whole, whole_folder, image_folder, tiny_teacher, tree):
    folder = shutil.copytree(whole_folder, tmp_path / "store")
    for path in (folder / "targets" / "tiny").glob("codes-0000[13].*"):
        path.unlink()
    column = open_store(folder).column("tiny")
    with work.open_work(work.shard_file(manifest.codes_file(folder, "tiny", 1)), column.digest, unit=16, crops=1) as progress:
        assert progress is not None
        summary = make(folder, image_folder, tiny_teacher)
        assert (summary.busy, summary.crops) == ([1], 30)
    summary = make(folder, image_folder, tiny_teacher)
    assert (summary.busy, summary.crops) == ([], 30)
    assert tree(folder) == whole


class StopError(Exception):
    pass


@pytest.mark.parametrize("calls", [22, 24, 27])
def test_an_exception_keeps_the_progress(tmp_path, whole, image_folder, tree, tiny_teacher, monkeypatch, calls):
    real = tiny_teacher.embed

    def embed(views):
        if tiny_teacher.calls == calls - 1:
            raise StopError("pulled the plug")
        return real(views)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_teacher, "embed", embed)
        with pytest.raises(StopError, match="pulled the plug"):
            make(tmp_path / "store", image_folder, tiny_teacher)
    make(tmp_path / "store", image_folder, tiny_teacher)
    assert tiny_teacher.calls == 21 + 24  # as many as without the exception
    assert tree(tmp_path / "store") == whole


@pytest.mark.parametrize("damage", ["journal", "codes", "shorter"])
def test_damaged_progress_is_not_trusted(tmp_path, whole, start, tiny_teacher, tree, image_folder, damage):
    finish(start, tmp_path, image_folder, kill_at=("embed", 25), journal_seconds=0)
    codes = tmp_path / "store" / "targets" / "tiny" / ".work-codes-00000"
    target = codes.with_name(codes.name + ".json") if damage == "journal" else codes
    data = bytearray(target.read_bytes())
    assert len(data) > 20
    data[10] ^= 1
    target.write_bytes(data[:10] if damage == "shorter" else data)
    make(tmp_path / "store", image_folder, tiny_teacher)
    assert tree(tmp_path / "store") == whole


def test_the_largest_codecs_sample_is_resumed(tmp_path, new_teacher):
    """One crop of each of 294,912 images: their checksums would exceed the maximum size of a JSON file."""
    request = columns.Request(name="tiny", teacher=new_teacher(), codec="PQ4x12", pixels=32, chunk_size=7)
    count = faiss_codecs.sample_size("PQ4x12") * 9 // 8
    sizes = {"unit": 64, "crops": count, "per_row": 1}
    with suppress(StopError), work.open_work(tmp_path / "sample", "me", **sizes) as progress:
        stream = columns._sample_stream(request, [], progress, 1, lambda: False)
        for row in range(count):
            stream.on_row(Row(views={}, checksum="" if row == 5 else "0" * 64))
        stream.on_targets(np.zeros((count - 1, 16), dtype=np.float32))
        raise StopError
    with work.open_work(tmp_path / "sample", "me", **sizes) as progress:
        stream = columns._sample_stream(request, [], progress, 1, lambda: False)
        assert (count, stream.first, stream.skip) == (294_912, count, 0)


def test_a_finished_store_is_left_as_it_is(tmp_path, whole, whole_folder, image_folder, tree, tiny_teacher):
    folder = shutil.copytree(whole_folder, tmp_path / "store")
    summary = make(folder, image_folder, tiny_teacher)
    assert (tiny_teacher.calls, summary.crops, summary.busy) == (0, 0, [])
    assert summary.store_bytes == sum(map(len, whole.values()))
    assert tree(folder) == whole


@pytest.mark.parametrize(
    ("limit", "fails_at"), [(100, "images.txt"), (400, "images.npy"), (600, "sample"), (1800, "codes"), (2800, "crops")]
)
def test_a_full_disk_and_then_space(tmp_path, start, image_folder, tiny_teacher, tree, monkeypatch, limit, fails_at):
    """No file may grow beyond `limit` bytes; whatever fails, the next run finishes the store."""
    if fails_at in ("codes", "crops"):  # the codec's sample, 9216 bytes, was seen before the disk filled up
        finish(start, tmp_path, image_folder, rows_per_shard=24, kill_at=("embed", 22))
    code, report = finish(start, tmp_path, image_folder, rows_per_shard=24, file_limit=limit, journal_seconds=0)
    assert (code, report["errno"]) == (3, errno.EFBIG)
    assert f"{fails_at if '.' in fails_at else '.work-' if fails_at != 'crops' else 'crops/00000.npy'}" in report["error"]
    store = tmp_path / "store"
    there = {name for name in tree(store) if "/.work" not in name and ".tmp-" not in name}
    parts = ["images.txt", "images.npy", "targets/tiny/meta.json", "crops/00000.npy", "targets/tiny/codes-00000.npy"]
    reached = {"images.txt": 0, "images.npy": 1, "sample": 2, "codes": 3, "crops": 3}[fails_at]
    assert [part in there for part in parts] == [True] * reached + [False] * (5 - reached)
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 24)
    make(store, image_folder, tiny_teacher)
    make(tmp_path / "straight", image_folder, tiny_teacher)
    left = {name: data for name, data in tree(store).items() if ".tmp-" not in name}
    assert left == tree(tmp_path / "straight")


def test_a_disk_that_is_too_small_is_refused_before_the_work(tmp_path, image_folder, tiny_teacher, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 3000, 3000))
    with pytest.raises(FkdError, match=r"store: needs 5\.2 kB more and the disk has 3\.0 kB free: free some, choose a smaller"):
        make(tmp_path / "store", image_folder, tiny_teacher)
    assert tiny_teacher.calls == 0
    monkeypatch.undo()
    make(tmp_path / "store", image_folder, tiny_teacher)
    assert len(open_store(tmp_path / "store")) == 24
