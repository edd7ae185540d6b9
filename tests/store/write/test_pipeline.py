"""The stages of precompute overlap on a GPU, with the same bytes and errors as one after the other."""

import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from fkd_ssl import images
from fkd_ssl.crops import RECIPES, draw, image_key, replay_into
from fkd_ssl.crops.device import PendingCrops
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.write import chunks, pipeline, work
from fkd_ssl.store.write.pipeline import Pipeline, Stages
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.teachers import Teacher


def make(folder, image_folder, teacher, **options):
    asked = {"crops": 6, "recipe": RECIPES["mocov2"], "pixels": 32, "chunk_size": 7, **options}
    return precompute(images.scan(image_folder), folder, teacher, **asked)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 5)


@pytest.fixture
def whole(tmp_path, image_folder, new_teacher, tree):
    make(tmp_path / "whole", image_folder, new_teacher())
    return tree(tmp_path / "whole")


@pytest.fixture
def overlapping(monkeypatch):
    """Three chunks wait to be written while the teacher runs, as on a GPU."""
    monkeypatch.setitem(pipeline.IN_FLIGHT, "cpu", 3)


def test_overlapping_stages_write_the_same_store(tmp_path, whole, image_folder, new_teacher, tree, overlapping):
    make(tmp_path / "store", image_folder, new_teacher())
    assert tree(tmp_path / "store") == whole
    make(tmp_path / "both", image_folder, [new_teacher(0, "a"), new_teacher(1, "b")], pixels=[32, 40])
    make(tmp_path / "single", image_folder, new_teacher(0, "a"))
    make(tmp_path / "single", image_folder, new_teacher(1, "b"), pixels=40)
    assert tree(tmp_path / "both") == tree(tmp_path / "single")


@pytest.mark.parametrize("calls", [15, 24, 30])
def test_after_an_error_in_the_teacher_nothing_is_computed_twice(
    tmp_path, whole, image_folder, new_teacher, tree, overlapping, calls
):
    first = new_teacher()
    real = first.embed

    def embed(views):
        if first.calls == calls - 1:
            raise KeyboardInterrupt
        return real(views)

    first.embed = embed
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "store", image_folder, first)
    second = new_teacher()
    make(tmp_path / "store", image_folder, second)
    assert first.calls + second.calls == 21 + 24
    assert tree(tmp_path / "store") == whole


def test_an_error_of_the_disk_stops_the_run_and_nothing_later_is_written(
    tmp_path, whole, image_folder, new_teacher, tree, overlapping, monkeypatch
):
    real, done = work.WorkFile.add, []

    def add(self, array):
        done.append(len(array))
        if len(done) == 24:  # 21 are of the codec's sample
            raise OSError(28, "No space left on device")
        real(self, array)

    teacher = new_teacher()
    with monkeypatch.context() as patch:
        patch.setattr(work.WorkFile, "add", add)
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path / "store", image_folder, teacher)
    assert len(done) == 24
    assert teacher.calls <= 24 + 3
    make(tmp_path / "store", image_folder, new_teacher())
    assert tree(tmp_path / "store") == whole


def test_no_more_than_the_bound_waits_to_be_written(overlapping, tiny_teacher):
    written, ahead = 0, []
    with Pipeline(1, [tiny_teacher]) as stages:

        def slow(targets):
            nonlocal written
            time.sleep(0.02)
            written += 1

        with stages.draining():
            for k in range(8):
                crops = np.zeros((4, 32, 32, 3), dtype=np.uint8)
                stages.embed([tiny_teacher], [crops], slow, pixels=32, chunk_size=4)
                ahead.append(k + 1 - written)
        assert written == 8
    assert max(ahead) == 3
    assert stages.stages.write >= 8 * 0.02
    assert stages.queue_bytes(100, 10) == (2 + 1) * 100 + (3 + 1) * 10


def test_a_decoding_that_waits_does_not_hold_the_next_shard(tmp_path, image_folder, new_teacher, monkeypatch):
    """While a shard is written, images of the next one are read."""
    from fkd_ssl.store.write import shards
    from fkd_ssl.store.write.rows import RowReader

    read, seen = [], threading.Event()
    real_read, real_write = RowReader.__call__, shards.write_codes

    def reading(self, row, *rest):
        read.append(row)
        if 5 in read[-24:] and len(read) > 24:  # a row of the second shard, after the codec's sample
            seen.set()
        return real_read(self, row, *rest)

    def writing(*rest, **named):
        assert seen.wait(20)
        return real_write(*rest, **named)

    monkeypatch.setattr(RowReader, "__call__", reading)
    monkeypatch.setattr(shards, "write_codes", writing)
    make(tmp_path / "store", image_folder, new_teacher())


def test_the_summary_tells_where_the_time_went(tmp_path, image_folder, new_teacher):
    lines = []
    teacher = new_teacher()
    real = teacher.embed
    teacher.embed = lambda views: time.sleep(0.02) or real(views)
    summary = make(tmp_path / "store", image_folder, teacher, log=lines.append)
    assert summary.stages["forward"] >= 0.02 * teacher.calls
    assert summary.teacher_busy == summary.stages["forward"] / summary.seconds
    assert 0 < sum(summary.stages.values()) <= 2 * summary.seconds
    assert summary.queue_bytes == (3 + 1) * 6 * 3 * 32**2 + 7 * 3 * 32**2
    assert lines[-1].startswith("time: teacher ")
    assert "bound by: teacher; at most 95.2 kB of memory" in lines[-1]
    lines.clear()
    assert make(tmp_path / "store", image_folder, teacher, log=lines.append).crops == 0
    assert not [line for line in lines if line.startswith("time:")]


def test_the_stage_that_took_most_bounds_the_run():
    assert Stages(crops=3, join=1, transfer=0.5, forward=2, write=1).describe(10) == (
        "time: teacher 20 %, waiting for crops 30 %, joining chunks 10 %, transfer to the GPU 5 %, encoding and writing 10 %; "
        "bound by: waiting for crops"
    )


def test_a_teacher_on_another_kind_of_device_is_run_as_on_the_cpu(tiny_teacher):
    """Such as Apple's, which torch calls mps."""
    tiny_teacher.device = torch.device("mps")
    with Pipeline(1, [tiny_teacher]) as stages:
        assert stages.in_flight == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("device_crops", [False, True])
def test_starting_a_chunk_does_not_wait_for_the_gpu(device_crops):
    """Only the thread that writes may wait, in `Launched.wait`."""
    image, views = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8), np.empty((8, 32, 32, 3), np.uint8)
    records = draw(RECIPES["swav"], image_key(0, "0"), 90, 120, 0, 8)
    replay_into(views, image, records)
    part = PendingCrops(image=image, records=records) if device_crops else views
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    teacher = Teacher(backbone, nn.Linear(32, 16), name="small", shape=(16,), feature_dim=32, precision="bf16").to("cuda")

    def start():
        return chunks.Launched([teacher], chunks.join([part], 32, pinned=True), 8)

    stages, first = Stages(), start()  # compiles the kernels
    first.wait(stages)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = start()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    second.wait(stages)
    assert second.targets[0].is_pinned()
    assert torch.equal(second.targets[0], first.targets[0])
    assert min(stages.transfer, stages.forward) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("device_crops", [False, True])
def test_a_gpu_writes_what_the_same_teacher_says_chunk_by_chunk(tmp_path, image_folder, new_teacher, device_crops):
    """The overlapping stages give the bits of a forward that waits for each chunk."""

    class OnGpu(type(new_teacher())):
        device = torch.device("cuda")

        def embed(self, crops):
            assert crops.is_cuda
            self.module.cuda()
            mean, std = (torch.tensor(v, device="cuda").view(3, 1, 1) for v in (self.info.mean, self.info.std))
            return torch.nn.functional.normalize(self.module((crops.float() / 255 - mean) / std), dim=1).detach()

    teacher = OnGpu()
    make(tmp_path / "store", image_folder, teacher, codec="Flat", device="cuda" if device_crops else None)
    store, found = open_store(tmp_path / "store"), []
    from fkd_ssl.crops import replay

    for shard in range(store.manifest.shards):
        rows = store.manifest.shard_rows(shard)
        crops = np.concatenate(
            [replay(images.read_image(image_folder / store.paths[r]), store.crops(r, slice(None)), 32) for r in rows]
        )
        for start in range(0, len(crops), 7):
            chunk = torch.from_numpy(np.ascontiguousarray(crops[start : start + 7])).cuda()
            padded = torch.cat([chunk, chunk.new_zeros(7 - len(chunk), 3, 32, 32)])
            found.append(teacher.embed(padded.contiguous(memory_format=torch.channels_last))[: len(chunk)].cpu())
    stored = np.concatenate([store.targets("tiny", row, slice(None)) for row in range(24)])
    np.testing.assert_array_equal(stored, torch.cat(found).numpy())
