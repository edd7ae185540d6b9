"""What a training's teacher says becomes a column, complete or of first crops, whatever is killed; precompute finishes it."""

import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fkd_ssl import files, images, locks
from fkd_ssl.crops import RECIPES
from fkd_ssl.data import RecordedCrops, StoredCrops
from fkd_ssl.errors import FkdError, ImageError, RequestError, StoreError
from fkd_ssl.store import columns, manifest, open_store
from fkd_ssl.store import precompute as precompute_module
from fkd_ssl.store.precompute import precompute, prepare
from fkd_ssl.store.recode import recode
from fkd_ssl.store.recording import Recording, is_recorded, publish_left
from fkd_ssl.store.repair import repair
from fkd_ssl.store.subset import subset
from fkd_ssl.store.verify import verify

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
        data = RecordedCrops(store, pictures, with_targets=False, crops_per_image=BLOCK, pixels=32)
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
    recording.publish()
    recording.close()
    ours, theirs = tree(tmp_path / "store"), tree(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and "codes" not in name] == []
    difference = np.abs(codes_of(open_store(tmp_path / "store").column()) - codes_of(whole.column()))
    assert difference.max() <= 1  # the teacher saw the crops in other batches, which moves its last bits
    assert (difference > 0).mean() < 0.01
    assert verify(open_store(tmp_path / "store")).problems == []


def test_crops_are_used_in_the_order_of_the_store(tmp_path, begin, image_folder):
    recording = begin()
    data = RecordedCrops(recording.column.store, image_folder, with_targets=False, crops_per_image=BLOCK, pixels=32)
    firsts = [data.__getitems__([(p, 5)]).batch["places"].tolist() for p in range(4)]
    assert firsts == [[[5, 0]], [[5, 2]], [[5, 4]], [[5, 0]]]
    whole = StoredCrops(recording.column.store, image_folder, with_targets=False, crops_per_image=CROPS, pixels=32)
    start = whole._first(0, 5)
    np.testing.assert_array_equal(data[1, 5]["images"], whole[0, 5]["images"].roll(start, 0)[2:4])


def test_a_part_is_marked_and_read(tmp_path, begin, train, whole, image_folder):
    recording = train(begin(), 0, 24 + 9)
    recording.publish()
    column = open_store(tmp_path / "store").column()
    more = set(ORDER[:9].tolist())
    lengths = column.lengths(np.arange(24)).tolist()
    assert lengths == [4 if row in more else 2 for row in range(24)]
    assert "2 to 4 of 6 crops" in column.in_part
    for row in range(24):
        codes = column.codes(row, slice(None))
        assert len(codes) == lengths[row]
        assert np.abs(codes.astype(int) - whole.column().codes(row, slice(lengths[row]))).max() <= 1
    with pytest.raises(IndexError):
        column.codes(int(ORDER[20]), np.array([2]))
    data = StoredCrops(open_store(tmp_path / "store"), image_folder, crops_per_image=2, pixels=32)
    assert len(data) == 24
    seen = {i: [data[p, i]["targets"].numpy() for p in range(2)] for i in range(24)}
    for i, (first, second) in seen.items():
        assert np.array_equal(np.sort(first, axis=0), np.sort(second, axis=0)) == (lengths[i] == 2)
    with pytest.raises(RequestError, match="holds 2 crops of each image"):
        StoredCrops(open_store(tmp_path / "store"), image_folder, crops_per_image=4, pixels=32)


def test_images_that_no_batch_had_are_left_out(tmp_path, begin, train, image_folder):
    train(begin(), 0, 9).publish()
    store = open_store(tmp_path / "store")
    assert sorted(ORDER[:9].tolist()) == store.column().rows.tolist()
    assert "recorded 2 of 6 crops of an image, and none of 15 images: students can" in store.column().in_part
    assert len(StoredCrops(store, image_folder, crops_per_image=2, pixels=32)) == 9
    report = verify(store)
    assert [problem for problem in report.problems if "missing" not in problem] == []


@pytest.mark.parametrize("end", [5, 24, 24 + 9, 24 * 2 + 23])
def test_precompute_finishes_it(tmp_path, begin, train, whole, finish, new_teacher, tree, end):
    train(begin(), 0, end).publish()
    was = open_store(tmp_path / "store").column()
    recorded = {row: was.codes(row, slice(None)) for row in was.rows.tolist()}
    teacher = new_teacher()
    summary = finish(teacher)
    assert summary.crops == 24 * CROPS - end * BLOCK
    assert teacher.crops_seen < summary.crops + 3 * 8  # each shard's last chunk is filled up
    column = open_store(tmp_path / "store").column()
    column.require_complete()
    assert np.abs(codes_of(column) - codes_of(whole.column())).max() <= 1
    for row, codes in recorded.items():
        np.testing.assert_array_equal(column.codes(row, slice(len(codes))), codes)
    assert tree(tmp_path / "store").keys() == tree(tmp_path / "whole").keys()
    assert verify(open_store(tmp_path / "store")).problems == []


def test_a_killed_finish_gives_the_same_bytes(tmp_path, begin, train, finish, new_teacher, tree, image_folder, monkeypatch):
    train(begin(), 0, 24 + 9).publish()
    train(begin("other"), 0, 24 + 9).publish()

    class Dies(type(new_teacher())):
        def embed(self, crops):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().embed(crops)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            finish(Dies())
    finish(new_teacher())
    asked = {"crops": CROPS, "recipe": RECIPES["mocov2"], "pixels": 32, "chunk_size": 8}
    precompute(images.scan(image_folder), tmp_path / "other", new_teacher(), **asked)
    assert tree(tmp_path / "store") == tree(tmp_path / "other")


def test_a_killed_training_goes_on(tmp_path, begin, train, tree):
    """What was added after the last checkpoint is added again; what was before is not lost."""
    recording = train(begin(), 0, 24)
    recording.sync()
    train(recording, 24, 40)  # no checkpoint counts on these
    recording.close()
    recording = begin()
    assert recording.counts.sum() == 24 * BLOCK
    recording.require(24 * BLOCK)
    with pytest.raises(FkdError, match="this run recorded 50 before"):
        recording.require(50)
    train(recording, 24, 48).publish()
    train(begin("other"), 0, 48).publish()
    assert tree(tmp_path / "store") == tree(tmp_path / "other")


def test_a_disk_that_the_recording_fills_is_no_reason_to_refuse(tmp_path, begin, train, finish, new_teacher, monkeypatch):
    """What was recorded becomes the store: only the rest needs room."""
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
    recording.publish()
    recording.close()
    assert finish(new_teacher()).crops == 24 * CROPS - 33 * BLOCK


def test_a_kill_while_publishing(tmp_path, begin, train, tree, monkeypatch):
    train(begin("other"), 0, 24 * 3).publish()
    recording = train(begin(), 0, 24 * 3)
    written = files.write_npy

    def dies(path, array):
        if path.name == "codes-00001.npy":
            raise KeyboardInterrupt
        return written(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_npy", dies)
        with pytest.raises(KeyboardInterrupt):
            recording.publish()
    recording.close()
    recording = begin()
    recording.require(24 * CROPS)
    recording.publish()
    assert tree(tmp_path / "store") == tree(tmp_path / "other")


def test_precompute_takes_what_a_training_left(tmp_path, begin, train, finish, new_teacher):
    recording = train(begin(), 0, 24 + 9)
    recording.sync()
    with pytest.raises(RequestError, match="another process records"):
        finish(new_teacher())
    recording.close()
    assert finish(new_teacher()).crops == 24 * CROPS - 33 * BLOCK
    assert not is_recorded(open_store(tmp_path / "store").column())
    assert not publish_left(open_store(tmp_path / "store").column())


def test_precompute_leaves_a_training_alone_that_made_no_checkpoint_yet(tmp_path, begin, train, finish, new_teacher):
    recording = train(begin(), 0, 4)
    with pytest.raises(RequestError, match="another process records"):
        finish(new_teacher())
    recording.close()
    assert finish(new_teacher()).crops == 24 * CROPS  # nothing counts on what it gave
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
    with pytest.raises(RequestError, match="another process records"):
        begin()
    recording.close()


def test_a_column_that_holds_targets_is_not_recorded(tmp_path, begin, train, finish, new_teacher):
    train(begin(), 0, 24 + 9).publish()
    for _ in range(2):
        with pytest.raises(RequestError, match="holds targets of tiny already"):
            begin()
        finish(new_teacher())


def test_blocks_must_divide_the_crops(begin):
    with pytest.raises(RequestError, match="no multiple of crops_per_image 2"):
        begin(crops=5)


def test_a_store_that_was_replaced_is_noticed(begin, train):
    with pytest.raises(FkdError, match="this is not the store that the run began to record"):
        train(begin(), 24, 25)


def test_crops_are_used_again_where_the_training_is_longer(tmp_path, begin, train, tree):
    train(begin("once"), 0, 24 * 3).publish()
    train(begin(), 0, 24 * 4).publish()
    ours, once = (open_store(tmp_path / name).column() for name in ("store", "once"))
    assert np.abs(codes_of(ours) - codes_of(once)).max() <= 1


def test_targets_that_are_not_finite(begin):
    with pytest.raises(FkdError, match="not finite"):
        begin().add(np.array([[0, 0]]), np.full((BLOCK, 16), np.nan, dtype=np.float32))


def test_unreadable_images(tmp_path, begin, train, pictures):
    (pictures / "ash/003.jpg").write_bytes((pictures / "ash/003.jpg").read_bytes()[:300])  # a header, and nothing behind it
    recording = begin(images=pictures, skip_unreadable=True)
    data = RecordedCrops(recording.column.store, pictures, with_targets=False, crops_per_image=BLOCK, pixels=32)
    assert len(data) == 23
    for p in range(3):
        for i in range(23):
            batch = data.__getitems__([(p, i)]).batch
            recording.add(batch["places"].numpy(), np.eye(BLOCK, 16, dtype=np.float32))
    recording.publish()
    column = open_store(tmp_path / "store").column()
    column.require_complete()
    assert 3 not in column.rows
    assert verify(column.store).problems == []


def test_an_image_that_cannot_be_decoded_is_found_before_the_training(begin, pictures, monkeypatch):
    """A store that counted it as readable could not be gone on with when the training comes to it."""
    monkeypatch.setattr(columns, "sample_size", lambda codec: 8)
    paths = images.scan(pictures).paths
    last = paths[manifest.in_hash_order(paths, "codec 0")[-1]]  # no part of the codec's sample
    (pictures / last).write_bytes((pictures / last).read_bytes()[:-400])
    with pytest.raises(ImageError, match=f"{last}.*remove it or pass --on_unreadable skip"):
        begin(images=pictures)
    assert len(begin(images=pictures, skip_unreadable=True).column.store) == 23


def test_processes_that_plan_one_store_share_its_images(begin, monkeypatch):
    checksums, read = precompute_module.image_checksums, []

    def meanwhile(reader, rows, pool, bar):
        read.append(rows)
        if len(read) == 1:
            begin().close()  # another process, which is faster
        return checksums(reader, rows, pool, bar)

    monkeypatch.setattr(precompute_module, "image_checksums", meanwhile)
    begin()
    assert len(read) == 1 + 3


def test_an_image_that_changed_is_not_recorded(begin, pictures):
    """Its size is the same, and the store would say that the teacher saw another."""
    recording = begin(images=pictures)
    data = RecordedCrops(recording.column.store, pictures, with_targets=False, crops_per_image=BLOCK, pixels=32)
    assert len(data[0, 3]["images"]) == BLOCK
    path = pictures / "ash/003.jpg"
    changed = bytearray(path.read_bytes())
    changed[-20] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ImageError, match=r"ash/003.jpg: changed since the store was made: other content of the same"):
        data[0, 3]


@pytest.mark.parametrize("change", ["flip", "shorten", "sidecar", "counts"])
def test_verify_finds_damage_in_a_part(tmp_path, begin, train, change):
    train(begin(), 0, 24 + 9).publish()
    path = tmp_path / "store/targets/tiny/prefix-00001.npy"
    data = bytearray(path.read_bytes())
    if change == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif change == "shorten":
        path.write_bytes(data[:-1])
    else:
        values = files.read_json(path.with_suffix(".json"))
        if change == "sidecar":
            values["column"] = "0" * 64
        else:
            values["crops"][0] = CROPS + 1
        path.with_suffix(".json").unlink()
        files.write_json(path.with_suffix(".json"), values)
    if change == "counts":  # they are looked at when the column is
        with pytest.raises(StoreError, match="expected 10 numbers of crops from 0 to 6"):
            open_store(tmp_path / "store").column().rows  # noqa: B018
    report = verify(open_store(tmp_path / "store"))
    assert len(report.problems) == 1
    assert "prefix-00001" in report.problems[0]
    assert "shard 1" in report.problems[0]


@pytest.mark.parametrize("name", ["prefix-00001.npy", "prefix-00001.json"])
def test_verify_samples_the_sound_shards_beside_a_damaged_part(tmp_path, begin, train, image_folder, new_teacher, name):
    train(begin(), 0, 24 + 9).publish()
    path = tmp_path / "store/targets/tiny" / name
    path.write_bytes(path.read_bytes()[:-2] + b"  ")
    report = verify(open_store(tmp_path / "store"), images.scan(image_folder), new_teacher(), sample=24)
    assert len(report.problems) == 1
    assert "prefix-00001" in report.problems[0]
    assert report.checked["crops"] == 14
    assert report.cosine["min"] > 0.999


def test_verify_notes_and_samples_a_part(tmp_path, begin, train, image_folder, new_teacher):
    train(begin(), 0, 24 + 9).publish()
    report = verify(open_store(tmp_path / "store"), images.scan(image_folder), new_teacher(), sample=24)
    assert report.problems == []
    assert "a training recorded 2 to 4 of 6 crops" in report.notes[0]
    assert report.cosine["min"] > 0.999


def test_precompute_does_not_publish_damage(tmp_path, begin, train, finish, new_teacher):
    train(begin(), 0, 24 + 9).publish()
    path = tmp_path / "store/targets/tiny/prefix-00001.npy"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"prefix-00001\.npy: altered"):
        finish(new_teacher())
    for name in ("npy", "json"):
        path.with_suffix(f".{name}").unlink()
    finish(new_teacher())
    assert verify(open_store(tmp_path / "store")).problems == []


def test_repair_makes_crops_of_a_part_again(tmp_path, begin, train, image_folder, tree):
    train(begin(), 0, 24 + 9).publish()
    before = tree(tmp_path / "store")
    for damaged in ("00001.npy", "00001.json"):
        (tmp_path / "store/crops" / damaged).write_text("damaged")
    store = open_store(tmp_path / "store")
    repair(store, verify(store).damage, images.scan(image_folder))
    assert tree(tmp_path / "store") == before


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_repair_leaves_the_rest_to_precompute(tmp_path, begin, train, image_folder, new_teacher, finish, suffix):
    train(begin(), 0, 24 + 9).publish()
    path = tmp_path / "store/targets/tiny/prefix-00001.npy"
    damaged = path.with_suffix(suffix)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    said = []
    store = open_store(tmp_path / "store")
    repair(store, verify(store).damage, images.scan(image_folder), new_teacher(), log=said.append)
    assert "delete the damaged files, and precompute into this store makes those crops" in said[0]
    for name in ("npy", "json"):
        path.with_suffix(f".{name}").unlink()
    assert finish(new_teacher()).crops > 0
    assert verify(open_store(tmp_path / "store")).problems == []


def test_a_part_of_a_part(tmp_path, begin, train, whole):
    train(begin(), 0, 24 + 9).publish()
    store = open_store(tmp_path / "store")
    with pytest.raises(RequestError, match="2 to 4 of 6 crops"):
        subset(store, tmp_path / "large", crops=3)
    part = subset(store, tmp_path / "small", crops=2)
    part.column().require_complete()
    assert np.abs(codes_of(part.column()) - codes_of(whole.column())[:, :2]).max() <= 1
    assert verify(part).problems == []
    longer = [store.paths[row] for row in sorted(ORDER[:9].tolist())]
    assert subset(store, tmp_path / "longer", crops=4, paths=longer).crops_per_image == 4
    with pytest.raises(StoreError, match="2 to 4 of 6 crops"):
        recode(store, "SQ4")


@pytest.mark.parametrize("values", ["no", {"block": 2}, {"block": 3}, {"block": 0}, {"counts": "AAAA"}, {"counts": "é"}])
def test_a_strange_journal(tmp_path, begin, train, finish, new_teacher, values):
    recording = train(begin(), 0, 24)
    recording.sync()
    recording.close()
    path = tmp_path / "store/targets/tiny/.record.json"
    was = files.read_json(path)
    path.unlink()
    if values == "no":
        path.write_text("no")
    elif values == {"block": 2}:
        files.write_json(path, values)
    else:
        files.write_json(path, {**was, **values})
    with pytest.raises((StoreError, RequestError)):
        begin()
    with pytest.raises((StoreError, RequestError)):
        finish(new_teacher())


def test_a_file_that_was_cut_is_not_published_as_zeros(tmp_path, begin, train, finish, new_teacher):
    recording = train(begin(), 0, 24 + 9)
    recording.sync()
    recording.close()
    path = tmp_path / "store/targets/tiny/.record"
    os.truncate(path, path.stat().st_size - 1)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"shorter than .record.json"):
            finish(new_teacher())
        path.unlink(missing_ok=True)
    (path.parent / ".record.json").unlink()
    assert finish(new_teacher()).crops == 24 * CROPS


def test_a_full_disk_is_named(tmp_path, begin, train, monkeypatch):
    recording = begin()
    monkeypatch.setattr(os, "pwrite", lambda *_: 3)
    with pytest.raises(OSError, match=r"No space left on device.*targets/tiny/\.record"):
        train(recording, 0, 4)
    assert recording.counts.sum() == 0


def test_a_strangers_link_is_not_written_through(tmp_path, begin, train, finish, new_teacher):
    """In the place of the file of a recording, or of a shard's progress: what it leads to would be cut."""
    recording = train(begin(), 0, 24)
    recording.sync()
    recording.close()
    (tmp_path / "mine").write_text("precious")
    for name in (".record", ".work-codes-00000"):
        path = tmp_path / "store/targets/tiny" / name
        was = path.rename(tmp_path / "was") if path.exists() else None
        path.symlink_to(tmp_path / "mine")
        with pytest.raises(StoreError, match="a symbolic link"):
            finish(new_teacher())
        assert (tmp_path / "mine").read_text() == "precious"
        path.unlink()
        if was is not None:
            was.rename(path)


def test_readers_that_outlive_a_killed_training_are_waited_for(begin, monkeypatch):
    """They are forks of it, and hold its lock until they notice."""
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


def test_a_prefix_that_a_kill_left_beside_its_shard_goes(tmp_path, begin, train, finish, new_teacher):
    train(begin(), 0, 24 + 9).publish()
    column = tmp_path / "store/targets/tiny"
    left = {path: path.read_bytes() for path in column.glob("prefix-*")}
    assert len(left) == 6
    finish(new_teacher())
    assert not list(column.glob("prefix-*"))
    for path, data in left.items():
        path.write_bytes(data)
    assert verify(open_store(tmp_path / "store")).problems == []
    assert finish(new_teacher()).crops == 0
    assert not list(column.glob("prefix-*"))
