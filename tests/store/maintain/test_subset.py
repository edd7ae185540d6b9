"""A part of a store as a store of its own."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fkd_ssl import files, images
from fkd_ssl.crops import RECIPES
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.maintain.subset import atomic_folder, subset
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write import creation
from fkd_ssl.store.write.precompute import precompute


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 5)


@pytest.fixture
def source(tmp_path, make_store, new_teacher):
    """24 images x 6 crops, columns a (SQ8) and b (Flat), in five shards."""
    make_store(tmp_path / "source", crops=6, teacher=new_teacher(0, "a"))
    return make_store(tmp_path / "source", crops=6, teacher=new_teacher(1, "b"), codec="Flat")


def test_the_first_crops_are_those_of_a_store_of_so_many(tmp_path, source, make_store, tree, new_teacher):
    """Except the last bits of targets, since the teacher saw other chunks."""
    part = subset(source, tmp_path / "part", crops=4)
    direct = make_store(tmp_path / "direct", crops=4, teacher=new_teacher(1, "b"), codec="Flat")
    found, expected = tree(tmp_path / "part"), tree(tmp_path / "direct")
    same = [name for name in expected if not name.startswith("targets/")]
    assert len(same) == 3 + 2 * 5
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    for row in range(24):
        np.testing.assert_allclose(part.targets("b", row, slice(None)), direct.targets("b", row, slice(None)), atol=2e-6)


def test_codes_are_the_sources(tmp_path, source, image_folder, new_teacher):
    part = subset(source, tmp_path / "part", crops=3)
    assert part.column_names == ["a", "b"]
    for name in "ab":
        assert part.column(name).digest == source.column(name).digest
        for row in range(24):
            np.testing.assert_array_equal(part.column(name).codes(row, slice(None)), source.column(name).codes(row, slice(3)))
    report = verify(part, images.scan(image_folder), new_teacher(0, "a"), column="a")
    assert (report.problems, report.checked["crops"]) == ([], 24)


@pytest.mark.parametrize("names", [["b"], []])
def test_only_some_teachers(tmp_path, source, names):
    assert subset(source, tmp_path / "part", column=names).column_names == names
    assert (tmp_path / "part" / "targets").is_dir()


def test_a_damaged_column_is_not_left_out_without_a_word(tmp_path, source):
    (source.folder / "targets" / "b" / "meta.json").unlink()
    damaged = open_store(source.folder)
    with pytest.raises(StoreError, match=r"targets/b: meta\.json is missing.*; or name the columns to copy"):
        subset(damaged, tmp_path / "part")
    assert not (tmp_path / "part").exists()
    assert subset(damaged, tmp_path / "part", column=["a"]).column_names == ["a"]


def test_a_list_of_images_in_any_order(tmp_path, source, image_folder, new_teacher):
    chosen = ["cedar/007.jpg", "ash/001.jpg", "birch/000.jpg", "cedar/001.jpg", "ash/004.jpg", "ash/007.jpg", "ash/001.jpg"]
    part = subset(source, tmp_path / "part", paths=chosen)
    assert list(part.paths) == sorted(set(chosen))
    assert part.manifest.shards == 2
    where = {path: row for row, path in enumerate(source.paths)}
    for row, path in enumerate(part.paths):
        np.testing.assert_array_equal(part.crops(row, slice(None)), source.crops(where[path], slice(None)))
        np.testing.assert_array_equal(part.targets("a", row, slice(None)), source.targets("a", where[path], slice(None)))
    assert verify(part, images.scan(image_folder), new_teacher(0, "a"), column="a").problems == []


def test_skipped_images_stay_skipped(tmp_path, pictures, make_store):
    path = pictures / "birch" / "004.jpg"
    path.write_bytes(path.read_bytes()[:700])
    source = make_store(tmp_path / "source", images=pictures, skip_unreadable=True)
    part = subset(source, tmp_path / "part", paths=["birch/003.jpg", "birch/004.jpg", "birch/005.jpg"])
    assert part.rows.tolist() == [0, 2]
    assert verify(part, images.scan(pictures)).problems == []


def test_a_part_can_be_given_another_teacher(tmp_path, source, image_folder, new_teacher):
    subset(source, tmp_path / "part", column=["a"], crops=2)
    precompute(images.scan(image_folder), tmp_path / "part", new_teacher(2, "c"), crops=2, recipe=RECIPES["mocov2"], pixels=32)
    assert open_store(tmp_path / "part").column_names == ["a", "c"]


class PulledError(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 3, 5, 8, 12, 16, 22])
def test_a_killed_one_appears_not_at_all_and_goes_on(tmp_path, source, tree, monkeypatch, calls):
    before = tree(source.folder)
    subset(source, tmp_path / "whole", crops=4)
    real, done = files.create, []

    def create(path):
        done.append(path)
        if len(done) == calls:
            raise PulledError
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "create", create)
        with pytest.raises(PulledError):
            subset(source, tmp_path / "part", crops=4)
    assert not (tmp_path / "part").exists()
    if calls > 1:
        with pytest.raises(RequestError, match="holds other unfinished work; delete this folder"):
            subset(source, tmp_path / "part", crops=3)
    subset(source, tmp_path / "part", crops=4)
    assert tree(tmp_path / "part") == tree(tmp_path / "whole")
    assert tree(source.folder) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_column_that_was_begun_is_refused(tmp_path, source, monkeypatch):
    def fail(*arguments, **options):
        raise PulledError

    with monkeypatch.context() as patch:
        patch.setattr(creation, "write_codes", fail)
        with pytest.raises(PulledError):
            subset(source, tmp_path / "part", column=["a"])
    with pytest.raises(RequestError, match="holds other unfinished work"):
        subset(source, tmp_path / "part", column=["b"])


def test_two_at_once_are_refused(tmp_path, source):
    with (
        atomic_folder(tmp_path / "part"),
        pytest.raises(RequestError, match="part: another process is writing it; wait for it"),
    ):
        subset(source, tmp_path / "part")


def test_a_finished_one_is_left_and_another_is_refused(tmp_path, source, tree):
    subset(source, tmp_path / "part", crops=4)
    before = tree(tmp_path / "part")
    assert subset(source, tmp_path / "part", crops=4).crops_per_image == 4
    for options in ({"crops": 3}, {"crops": 4, "column": ["a"]}):
        with pytest.raises(RequestError, match="part: exists and is not this subset; choose another --out"):
            subset(source, tmp_path / "part", **options)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="file: exists and is not this subset"):
        subset(source, tmp_path / "file")
    assert tree(tmp_path / "part") == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": 7}, "--crops 7: .*source holds 6 of each image"),
        ({"crops": 0}, "--crops 0: .*source holds 6 of each image"),
        ({"column": ["c"]}, r"source: no targets of 'c'; there are \['a', 'b'\]"),
        ({"paths": ["ash/000.jpg", "elm/000.jpg"]}, "lacks 1 of the requested images, for instance 'elm/000.jpg'"),
        ({"paths": []}, "the list of images is empty"),
    ],
)
def test_what_is_refused(tmp_path, source, options, message):
    with pytest.raises(RequestError, match=message):
        subset(source, tmp_path / "part", **options)
    assert not list(tmp_path.glob("*part*"))


def test_a_damaged_shard_is_not_copied(tmp_path, source):
    path = source.folder / "targets/a/codes-00002.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        StoreError, match=r"codes-00002\.npy: damaged: its sha256 differs from the one in its .json; fkd-ssl verify"
    ):
        subset(source, tmp_path / "part")
    assert not (tmp_path / "part").exists()
    assert len(subset(source, tmp_path / "other", column=["b"])) == 24


@pytest.fixture
def prototyped(tmp_path, make_store, new_teacher):
    teacher = new_teacher()
    teacher.info = replace(
        teacher.info, arrays={"prototypes": np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)}
    )
    return make_store(tmp_path / "prototyped", teacher=teacher)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flipped", r"teacher-prototypes\.npy: damaged: its sha256 differs from the one in meta\.json"),
        ("link", r"teacher-prototypes\.npy: a symbolic link"),
        ("pipe", r"teacher-prototypes\.npy: not a regular file"),
        ("holes", r"teacher-prototypes\.npy: 1099511627776 bytes, and at most"),
    ],
)
def test_a_teachers_array_that_is_not_what_meta_json_says_is_not_copied(tmp_path, prototyped, how, message):
    path = prototyped.folder / "targets/tiny/teacher-prototypes.npy"
    data = bytearray(path.read_bytes())
    if how in ("flipped", "holes"):
        data[-1] ^= 1
        path.write_bytes(data)
    if how == "holes":
        os.truncate(path, 2**40)
    elif how == "link":
        path.rename(tmp_path / "same.npy")
        path.symlink_to(tmp_path / "same.npy")
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(StoreError, match=message):
        subset(prototyped, tmp_path / "part")
    assert not (tmp_path / "part").exists()
    assert not list(tmp_path.rglob(".unfinished-part/targets/tiny/teacher*"))


@pytest.mark.parametrize("name", ["teacher-/../../../../secret", "teacher-a/b", "teacher-\0", "teacher-ä", "../teacher-x"])
def test_an_arrays_name_that_leads_elsewhere_is_refused_when_the_column_is_opened(tmp_path, prototyped, name):
    secret = tmp_path / "secret.npy"
    digest = files.write_npy(secret, np.zeros(3, dtype=np.float32))
    path = prototyped.folder / "targets/tiny/meta.json"
    values = files.read_json(path)
    values["arrays"][name] = digest
    path.write_bytes(files.with_checksum(values))
    with pytest.raises(StoreError, match=r"meta\.json: its arrays is invalid"):
        subset(open_store(prototyped.folder), tmp_path / "part")
    assert not list(tmp_path.glob("*part*"))


def test_a_meta_json_that_changes_meanwhile_is_not_copied(tmp_path, prototyped):
    column = prototyped.column()
    path = column.folder / "meta.json"
    path.write_bytes(files.with_checksum({**files.read_json(path), "chunk_size": 3}))
    with pytest.raises(StoreError, match=r"meta\.json: changed since the store was opened; repeat the command"):
        subset(prototyped, tmp_path / "part")


def test_an_unfinished_source_gives_the_images_that_are_done(tmp_path, source):
    (source.folder / "targets/a/codes-00002.json").unlink()
    with pytest.raises(StoreError, match=r"codes-00002\.npy: this shard is not finished; .* again, or leave out a"):
        subset(source, tmp_path / "part")
    assert len(subset(source, tmp_path / "part", paths=[source.paths[3], source.paths[15]])) == 2
    shutil.rmtree(source.folder / "crops")
    with pytest.raises(StoreError, match=r"crops/00000\.npy: this shard is not finished"):
        subset(open_store(source.folder), tmp_path / "more")
