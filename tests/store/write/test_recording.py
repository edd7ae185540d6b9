"""A training's online targets become a column, also after kills; precompute completes damaged shards."""

import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fkd_ssl import files, images, locks
from fkd_ssl.crops import RECIPES
from fkd_ssl.data import RecordingCrops, StoredCrops
from fkd_ssl.errors import FkdError, ImageError, RequestError, StoreError
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write import prepare as prepare_module
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.store.write.prepare import prepare
from fkd_ssl.store.write.recording import Recording
from fkd_ssl.targets.embedding import Embedding

CROPS, BLOCK = 6, 2
ORDER = np.random.default_rng(0).permutation(24)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 10)
    monkeypatch.setattr(locks, "PATIENCE", 0.0)


@pytest.fixture
def begin(tmp_path, image_folder, new_teacher):
    """begin() plans the store and opens a recording of it."""

    def make(folder="store", **options):
        asked = {"crops": CROPS, "recipe": RECIPES["mocov2"], "codec": "SQ8", "pixels": 32, "seed": 0, "chunk_size": 8}
        asked |= options
        (column,) = prepare(images.scan(asked.pop("images", image_folder)), tmp_path / folder, [new_teacher()], **asked)
        return Recording(column, BLOCK)

    return make


@pytest.fixture
def train(image_folder, new_teacher):
    """train(recording, first, last) adds what a training would: images [first, last) of its endless order, four at a time."""

    def add(recording, first, last, pictures=image_folder):
        store = recording.column.store
        data = RecordingCrops(store, pictures, with_targets=False, crops_per_image=BLOCK, pixels=32)
        teacher = new_teacher()
        for begin in range(first, last, 4):
            places = range(begin, min(last, begin + 4))
            batch = data.__getitems__([(p // len(data), int(ORDER[p % len(data)])) for p in places]).batch
            recording.add(batch["places"].numpy(), teacher.embed(batch["images"]).numpy())
        return recording

    return add


@pytest.fixture
def finish(tmp_path, image_folder):
    """finish(teacher) is the precompute that finishes the store."""

    def run(teacher, **options):
        asked = {"crops": CROPS, "recipe": RECIPES["mocov2"], "pixels": 32, "chunk_size": 8, **options}
        return precompute(images.scan(image_folder), tmp_path / "store", teacher, **asked)

    return run


@pytest.fixture
def whole(tmp_path, make_store):
    """The store that precompute makes."""
    return make_store(tmp_path / "whole", crops=CROPS, chunk_size=8)


def codes_of(column):
    return np.stack([column.codes(row, slice(None)) for row in range(24)]).astype(int)


def test_a_whole_recording_is_what_precompute_writes(tmp_path, begin, train, whole, tree):
    recording = train(begin(), 0, 24 * 3)
    recording.finish()
    recording.close()
    ours, theirs = tree(tmp_path / "store"), tree(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and "codes" not in name] == []
    difference = np.abs(codes_of(open_store(tmp_path / "store").column()) - codes_of(whole.column()))
    assert difference.max() <= 1  # the teacher saw the crops in other batches, which changes the last bits
    assert (difference > 0).mean() < 0.01
    assert verify(open_store(tmp_path / "store")).problems == []


def test_crops_are_used_in_the_order_of_the_store(tmp_path, begin, image_folder):
    recording = begin()
    data = RecordingCrops(recording.column.store, image_folder, with_targets=False, crops_per_image=BLOCK, pixels=32)
    firsts = [data.__getitems__([(p, 5)]).batch["places"].tolist() for p in range(4)]
    assert firsts == [[[5, 0]], [[5, 2]], [[5, 4]], [[5, 0]]]
    whole = StoredCrops(recording.column.store, image_folder, with_targets=False, crops_per_image=CROPS, pixels=32)
    start = whole._first(0, 5)
    np.testing.assert_array_equal(data[1, 5]["images"], whole[0, 5]["images"].roll(start, 0)[2:4])


def test_a_killed_training_goes_on(tmp_path, begin, train, tree):
    """Targets added after the last checkpoint are added again; earlier ones are kept."""
    recording = train(begin(), 0, 24)
    recording.sync()
    train(recording, 24, 40)  # no checkpoint contains these
    recording.close()
    recording = begin()
    with pytest.raises(FkdError, match="holds 48 recorded targets, and this run recorded 50 before"):
        recording.resume(50)
    recording.resume(24 * BLOCK)
    assert train(recording, 24, 72).finish() == []
    train(begin("other"), 0, 72).finish()
    assert tree(tmp_path / "store") == tree(tmp_path / "other")


def test_a_disk_that_the_recording_fills_is_no_reason_to_refuse(begin, train, monkeypatch):
    """The recorded bytes become the store, so only the rest needs space, plus four bytes per block."""
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(FkdError, match="the disk has 0 bytes free"):
        begin()
    free = 10**6
    recording = train(begin(), 0, 24 + 9)
    recording.sync()
    recording.close()
    free = (24 * CROPS - 33 * BLOCK) * 16
    recording = begin()
    recording.resume(33 * BLOCK)
    assert train(recording, 33, 72).finish() == []


def test_a_kill_while_finishing(tmp_path, begin, train, tree, monkeypatch):
    train(begin("other"), 0, 24 * 3).finish()
    recording = train(begin(), 0, 24 * 3)
    written = files.write_npy

    def dies(path, array):
        if path.name == "codes-00001.npy":
            raise KeyboardInterrupt
        return written(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_npy", dies)
        with pytest.raises(KeyboardInterrupt):
            recording.finish()
    recording.close()
    recording = begin()
    recording.resume(24 * CROPS)
    recording.finish()
    assert tree(tmp_path / "store") == tree(tmp_path / "other")


def test_precompute_leaves_a_training_alone_that_made_no_checkpoint_yet(tmp_path, begin, train, finish, new_teacher):
    recording = train(begin(), 0, 4)
    with pytest.raises(RequestError, match="another process is recording"):
        finish(new_teacher())
    recording.close()
    assert finish(new_teacher()).crops == 24 * CROPS  # no checkpoint relies on its targets
    assert not list((tmp_path / "store/targets/tiny").glob(".*"))


def test_a_column_that_precompute_began_is_not_recorded(begin, finish, new_teacher):
    class Dies(type(new_teacher())):
        def embed(self, crops):
            if self.calls == 20:
                raise KeyboardInterrupt
            return super().embed(crops)

    with pytest.raises(KeyboardInterrupt):
        finish(Dies())
    with pytest.raises(RequestError, match="holds targets of tiny already"):
        begin()


def test_no_two_record_one_column(begin):
    recording = begin()
    with pytest.raises(RequestError, match="another process is recording"):
        begin()
    recording.close()


def test_a_column_that_holds_targets_is_not_recorded(tmp_path, begin, train, finish, new_teacher):
    recording = train(begin(), 0, 24 * 3)
    recording.finish()
    recording.close()
    for _ in range(2):
        with pytest.raises(RequestError, match="holds targets of tiny already"):
            begin()
        assert finish(new_teacher()).crops == 0


def test_blocks_must_divide_the_crops(begin):
    with pytest.raises(RequestError, match="not a multiple of crops_per_image 2"):
        begin(crops=5)


def test_crops_are_used_again_where_the_training_is_longer(tmp_path, begin, train, tree):
    train(begin("once"), 0, 24 * 3).finish()
    train(begin(), 0, 24 * 4).finish()
    ours, once = (open_store(tmp_path / name).column() for name in ("store", "once"))
    assert np.abs(codes_of(ours) - codes_of(once)).max() <= 1


def test_targets_that_are_not_finite(begin):
    with pytest.raises(FkdError, match="not finite"):
        begin().add(np.array([[0, 0]]), np.full((BLOCK, 16), np.nan, dtype=np.float32))


def test_unreadable_images(tmp_path, begin, train, pictures):
    (pictures / "ash/003.jpg").write_bytes((pictures / "ash/003.jpg").read_bytes()[:300])  # a header, and nothing behind it
    recording = begin(images=pictures, skip_unreadable=True)
    data = RecordingCrops(recording.column.store, pictures, with_targets=False, crops_per_image=BLOCK, pixels=32)
    assert len(data) == 23
    for p in range(3):
        for i in range(23):
            batch = data.__getitems__([(p, i)]).batch
            recording.add(batch["places"].numpy(), np.eye(BLOCK, 16, dtype=np.float32))
    recording.finish()
    column = open_store(tmp_path / "store").column()
    column.require_complete()
    assert 3 not in column.rows
    assert verify(column.store).problems == []


def test_an_image_that_cannot_be_decoded_is_found_before_the_training(begin, pictures, monkeypatch):
    """If the store listed it as readable, the training could not continue when it reads the image."""
    monkeypatch.setattr(Embedding, "sample_size", lambda self, codec, shape: 8)
    paths = images.scan(pictures).names
    last = paths[manifest.in_hash_order(paths, "codec 0")[-1]]  # not part of the codec's sample
    (pictures / last).write_bytes((pictures / last).read_bytes()[:-400])
    with pytest.raises(ImageError, match=f"{last}.*remove it or pass --on_unreadable skip"):
        begin(images=pictures)
    assert len(begin(images=pictures, skip_unreadable=True).column.store) == 23


def test_processes_that_plan_one_store_share_its_images(begin, monkeypatch):
    checksums, read = prepare_module.image_checksums, []

    def meanwhile(reader, rows, pool, bar):
        read.append(rows)
        if len(read) == 1:
            begin().close()  # another process, which is faster
        return checksums(reader, rows, pool, bar)

    monkeypatch.setattr(prepare_module, "image_checksums", meanwhile)
    begin()
    assert len(read) == 1 + 3


def test_an_image_that_changed_is_not_recorded(begin, pictures):
    """It has the same size in bytes; the store would have the checksum of another image."""
    recording = begin(images=pictures)
    data = RecordingCrops(recording.column.store, pictures, with_targets=False, crops_per_image=BLOCK, pixels=32)
    assert len(data[0, 3]["images"]) == BLOCK
    path = pictures / "ash/003.jpg"
    changed = bytearray(path.read_bytes())
    changed[-20] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ImageError, match=r"ash/003.jpg: changed since the store was made: other content of the same"):
        data[0, 3]


def test_a_full_disk_is_named(tmp_path, begin, train, monkeypatch):
    recording = begin()
    monkeypatch.setattr(os, "pwrite", lambda *_: 3)
    with pytest.raises(OSError, match=r"No space left on device.*targets/tiny/\.record"):
        train(recording, 0, 4)
    assert recording.crops == 0


def test_a_strangers_link_is_not_written_through(tmp_path, begin, train, finish, new_teacher):
    """A link in place of a recording's or a shard's work file: its target would be truncated."""
    begin().close()
    (tmp_path / "mine").write_text("precious")
    for name in (".record", ".work-codes-00000"):
        path = tmp_path / "store/targets/tiny" / name
        path.unlink(missing_ok=True)
        path.symlink_to(tmp_path / "mine")
        with pytest.raises(StoreError, match="a symbolic link"):
            finish(new_teacher())
        assert (tmp_path / "mine").read_text() == "precious"
        path.unlink()


def test_readers_that_outlive_a_killed_training_are_waited_for(begin, monkeypatch):
    """They are forked processes and hold the lock until they end."""
    monkeypatch.setattr(locks, "PATIENCE", 30.0)
    held = begin()
    child = os.fork()
    if not child:
        time.sleep(1)
        os._exit(0)
    held.close()
    begin().close()
    os.waitpid(child, 0)


def test_a_killed_process_lets_go(tmp_path, begin, train):
    recording = train(begin(), 0, 24)
    recording.sync()
    recording.close()
    child = os.fork()
    if not child:
        begin()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    begin().close()


def stopped(recording, train, last):
    """A training that was stopped after a checkpoint: its work file and its journal."""
    train(recording, 0, last)
    recording.sync()
    recording.close()
    return recording.column.folder / ".record", recording.column.folder / ".record.json"


def test_precompute_does_not_touch_what_a_training_recorded(tmp_path, begin, train, finish, new_teacher, tree):
    recording = train(begin(), 0, 24 + 9)
    recording.sync()
    with pytest.raises(RequestError, match="another process is recording"):
        finish(new_teacher())
    recording.close()
    before, teacher = tree(tmp_path / "store"), new_teacher()
    with pytest.raises(RequestError, match=r"was stopped: run the same fkd-ssl train command .* delete \.record and"):
        finish(teacher)
    assert tree(tmp_path / "store") == before
    assert teacher.calls == 0
    for name in (".record", ".record.json"):
        (tmp_path / "store/targets/tiny" / name).unlink()
    assert finish(new_teacher()).crops == 24 * CROPS


@pytest.mark.parametrize("damage", ["bit", "checksum", "swap", "cut", "hole", "gone"])
def test_a_block_that_was_altered_is_computed_again(tmp_path, begin, train, finish, new_teacher, whole, damage):
    """Damage in a killed recording must not be written with a correct checksum."""
    work, _ = stopped(begin(), train, 24 * 3)
    unit = BLOCK * 16 + 4
    place = 10 * (CROPS // BLOCK) * unit  # of shard 1, of 10 rows
    data = bytearray(work.read_bytes())
    if damage == "bit":
        data[place + 17] ^= 4
    elif damage == "checksum":
        data[place + unit - 1] ^= 128
    elif damage == "swap":
        a, b = slice(place, place + unit), slice(place + unit, place + 2 * unit)
        data[a], data[b] = data[b], data[a]
    elif damage == "hole":
        data[place + unit : place + 2 * unit] = bytes(unit)
    work.write_bytes(data[:-1] if damage == "cut" else b"" if damage == "gone" else data)
    recording = begin()
    recording.resume(24 * CROPS)
    left_out = {"cut": [2], "gone": [2, 1, 0]}.get(damage, [1])
    assert recording.finish() == left_out
    recording.close()
    column = open_store(tmp_path / "store").column()
    assert column.missing_shards == sorted(left_out)
    if damage != "gone":
        assert finish(new_teacher()).crops == {"cut": 4}.get(damage, 10) * CROPS
        assert np.abs(codes_of(open_store(tmp_path / "store").column()) - codes_of(whole.column())).max() <= 1
        assert verify(open_store(tmp_path / "store")).problems == []


def test_no_bit_of_a_killed_recording_can_flip_unseen(begin, train):
    """Flips one bit of every byte of a shard's blocks."""
    work, journal = stopped(begin(), train, 24 * 3)
    whole, counted = work.read_bytes(), journal.read_bytes()
    generator = np.random.default_rng(0)
    length = 4 * (CROPS // BLOCK) * (BLOCK * 16 + 4)  # of shard 2, the last one, of 4 rows
    for place in range(len(whole) - length, len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << int(generator.integers(8))
        work.write_bytes(data)
        journal.write_bytes(counted)
        recording = begin()
        assert recording._codes(2) is None
        assert recording._codes(1) is not None
        recording.close()


def test_the_journal_does_not_grow_with_the_images(begin, train):
    """An earlier journal had a number per image, which for 15 million exceeded the maximum size of a JSON file."""
    _, journal = stopped(begin(), train, 24)
    assert files.read_json(journal).keys() == {"column", "block", "crops"}


@pytest.mark.parametrize("values", ["no", {"block": 3}, {"block": 0}, {"crops": "4"}, {"crops": -2}, {"column": "0" * 64}])
def test_an_impossible_journal(tmp_path, begin, train, finish, new_teacher, values):
    _, path = stopped(begin(), train, 24)
    was = files.read_json(path)
    path.unlink()
    if values == "no":
        path.write_text("no")
    else:
        files.write_json(path, {**was, **values})
    with pytest.raises(StoreError, match=r"\.record\.json: (the journal of another recording|not JSON)"):
        begin()
    with pytest.raises(RequestError, match="was stopped"):
        finish(new_teacher())


def test_a_store_that_was_replaced_is_noticed(begin):
    recording = begin()
    with pytest.raises(FkdError, match="restore the store that the run began with"):
        recording.resume(48)


def test_what_another_training_left_before_its_first_checkpoint_does_not_count(begin, train):
    recording = train(begin(), 0, 24)
    recording.close()  # no journal
    recording = begin()
    assert recording.crops == 0
    assert (recording.column.folder / ".record").stat().st_size == 0
