"""`--extend` adds rows for new images as new shards. The files of the store do not change."""

import importlib.util
import json
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fkd_ssl import files
from fkd_ssl.crops import IMPORTED, RECIPES
from fkd_ssl.data import StoredCrops
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.images import open_images, scan
from fkd_ssl.store import Store, manifest, open_store
from fkd_ssl.store.maintain.recode import recode
from fkd_ssl.store.maintain.repair import repair, repair_lists
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write import creation
from fkd_ssl.store.write.precompute import precompute

LISTS = ("images-00001.json", "images-00001.npy", "images-00001.txt")


def make(folder, source, teacher, **options):
    asked = {"recipe": RECIPES["mocov2"], "pixels": 32, "crops": 6, "chunk_size": 7, **options}
    return precompute(open_images(source), folder, teacher, **asked)


def keep(pictures: Path, names: list[str], to: Path) -> Path:
    """Copies some pictures into another folder, which may exist."""
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(pictures / name, to / name)
    return to


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", 5)


@pytest.fixture(scope="module")
def names(image_folder):
    return list(scan(image_folder).names)


@pytest.fixture(scope="module")
def made(tmp_path_factory, image_folder, new_teacher, names):
    """A folder with `first`, a store of 13 images in shards of 5, 5 and 3; `grown`, with 11 more between them; `whole`."""
    folder = tmp_path_factory.mktemp("made")
    some = keep(image_folder, names[:3] + names[4::2], folder / "some")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "ROWS_PER_SHARD", 5)
        make(folder / "first", some, new_teacher())
        shutil.copytree(folder / "first", folder / "grown")
        make(folder / "grown", image_folder, new_teacher(), extend=True)
        make(folder / "whole", image_folder, new_teacher())
    return folder


def test_old_files_stay_and_new_rows_are_new_shards(made, tree, names):
    first, grown = tree(made / "first"), tree(made / "grown")
    assert {name: grown[name] for name in first} == first
    added = {
        f"{part}{shard:05d}.{kind}"
        for part in ("crops/", "targets/tiny/codes-")
        for shard in (3, 4, 5)
        for kind in ("npy", "json")
    }
    assert set(grown) - set(first) == {*LISTS, *added}
    store = open_store(made / "grown")
    assert list(store.paths) == [*(names[:3] + names[4::2]), *(name for name in names[3:] if name not in names[4::2])]
    assert [len(store.manifest.shard_rows(shard)) for shard in range(store.manifest.shards)] == [5, 5, 3, 5, 5, 1]


def test_the_same_name_has_the_same_crops_in_a_store_made_at_once(made):
    grown, whole = open_store(made / "grown"), open_store(made / "whole")
    for row, name in enumerate(grown.paths):
        other = list(whole.paths).index(name)
        assert grown.sizes[row] == whole.sizes[other]
        assert np.array_equal(grown.crops(row, slice(None)), whole.crops(other, slice(None)))
        cosines = (grown.targets("tiny", row, slice(None)) * whole.targets("tiny", other, slice(None))).sum(axis=1)
        assert cosines.min() > 0.98  # the codec of one was trained on half of the images


def test_extending_again_with_the_same_images_changes_nothing(tmp_path, made, image_folder, tiny_teacher, tree):
    shutil.copytree(made / "grown", tmp_path / "store")
    for extend in (False, True):
        assert make(tmp_path / "store", image_folder, tiny_teacher, extend=extend).crops == 0
    assert tree(tmp_path / "store") == tree(made / "grown")


@pytest.mark.parametrize(
    "kill_at", [("fsync", 1), ("fsync", 2), ("fsync", 4), ("fsync", 6), ("fsync", 9), ("embed", 3), ("embed", 9)]
)
def test_killed_and_continued(tmp_path, made, image_folder, start, tree, kill_at):
    shutil.copytree(made / "first", tmp_path / "store")
    common = {"images": str(image_folder), "folder": str(tmp_path / "store"), "rows_per_shard": 5, "journal_seconds": 0}
    for kill, code in ((kill_at, -signal.SIGKILL), (None, 0)):
        process = start(**common, extend=True, kill_at=kill)
        process.join(120)
        assert process.exitcode == code
    found = {name: data for name, data in tree(tmp_path / "store").items() if ".tmp-" not in name}
    assert found == tree(made / "grown")


def test_two_processes_extend_at_once(tmp_path, made, image_folder, start, tree):
    shutil.copytree(made / "first", tmp_path / "store")
    common = {"images": str(image_folder), "folder": str(tmp_path / "store"), "rows_per_shard": 5, "extend": True}
    workers = [start(**common, report=str(tmp_path / f"{k}.json")) for k in range(2)]
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert tree(tmp_path / "store") == tree(made / "grown")
    assert sum(json.loads((tmp_path / f"{k}.json").read_text())["crops"] for k in range(2)) == 11 * 6


def test_lists_of_a_killed_extension_do_not_stop_another(tmp_path, made, image_folder, tiny_teacher, tree):
    store = shutil.copytree(made / "first", tmp_path / "store")
    (store / "images-00001.txt").write_text("other.png\n")
    (store / "images-00001.npy").write_bytes(b"cut")
    make(store, image_folder, tiny_teacher, extend=True)
    assert tree(store) == tree(made / "grown")


def test_lists_of_an_extension_with_crops_are_kept(tmp_path, made, image_folder, tiny_teacher, names):
    store = shutil.copytree(made / "grown", tmp_path / "store")
    (store / "images-00001.json").unlink()
    some = keep(image_folder, names[:-1], tmp_path / "some")
    with pytest.raises(StoreError, match=r"images-00001\.txt: exists with other content"):
        make(store, some, tiny_teacher, extend=True)
    assert (store / "images-00001.txt").read_bytes() == (made / "grown/images-00001.txt").read_bytes()
    make(store, image_folder, tiny_teacher, extend=True)
    assert (store / "images-00001.json").read_bytes() == (made / "grown/images-00001.json").read_bytes()


def test_other_images_added_by_another_process_meanwhile(tmp_path, made, image_folder, names, monkeypatch):
    """The second process sees what the first has added, and adds the rest as one more part."""
    store = Store(shutil.copytree(made / "first", tmp_path / "store"))
    some = keep(image_folder, [*store.paths, names[3]], tmp_path / "some")
    whole, sizes = scan(image_folder), creation.read_sizes
    during = [lambda: creation.extend_store(store, scan(some), skip_unreadable=False)]

    def read(*args, **options):
        if during:
            during.pop()()
        return sizes(*args, **options)

    monkeypatch.setattr(creation, "read_sizes", read)
    grown = creation.extend_store(store, whole, skip_unreadable=False)
    assert [part.count for part in grown.manifest.parts] == [13, 1, 10]
    assert sorted(grown.paths) == list(whole.names)


def test_twice_and_by_tars(tmp_path, made, image_folder, new_teacher, names, tree):
    """A new tar beside the others; its images come from a folder in the store that it is compared with."""
    parts = {"a": names[:3] + names[4::2], "b": names[3:8:2], "c": names[9::2]}
    for tar, inside in parts.items():
        with tarfile.open(tmp_path / f"{tar}.tar", "w") as archive:
            for name in inside:
                archive.add(image_folder / name, name)
        make(
            tmp_path / "store",
            str(tmp_path / "{a,b,c}.tar") if tar == "c" else str(tmp_path / "*.tar"),
            new_teacher(),
            extend=True,
        )
    store, grown = open_store(tmp_path / "store"), open_store(made / "grown")
    assert [part.count for part in store.manifest.parts] == [13, 3, 8]
    assert list(store.paths) == [*parts["a"], *parts["b"], *parts["c"]]
    assert {name: data for name, data in tree(store.folder).items() if name in tree(made / "first")} == tree(made / "first")
    for row, name in enumerate(store.paths):
        other = list(grown.paths).index(name)
        assert np.array_equal(store.targets("tiny", row, slice(None)), grown.targets("tiny", other, slice(None))) or row >= 13
        assert np.array_equal(store.crops(row, slice(None)), grown.crops(other, slice(None)))
    assert verify(store, scan(image_folder), new_teacher()).problems == []


def test_a_larger_limit_extends(tmp_path, image_folder, tiny_teacher, tree):
    make(tmp_path / "store", image_folder, tiny_teacher, limit=12)
    first = tree(tmp_path / "store")
    with pytest.raises(RequestError, match="--extend to add images"):
        make(tmp_path / "store", image_folder, tiny_teacher, limit=20)
    make(tmp_path / "store", image_folder, tiny_teacher, limit=20, extend=True)
    assert [part.count for part in open_store(tmp_path / "store").manifest.parts] == [12, 8]
    assert {name: data for name, data in tree(tmp_path / "store").items() if name in first} == first


def test_new_images_without_extend_are_named(tmp_path, made, image_folder, tiny_teacher, names):
    with pytest.raises(
        RequestError, match=rf"lists 13, .* has 24 .* the store lacks '{names[3]}'; pass --extend to add images"
    ):
        make(made / "first", image_folder, tiny_teacher)


@pytest.mark.parametrize("extend", [False, True])
def test_missing_images_are_refused(tmp_path, made, pictures, tiny_teacher, names, tree, extend):
    (pictures / names[0]).unlink()
    before = tree(made / "first")
    with pytest.raises(RequestError, match=rf"lacks .*'?{names[0]}"):
        make(made / "first", pictures, tiny_teacher, extend=extend)
    assert tree(made / "first") == before


def test_changed_images_are_refused(made, pictures, tiny_teacher, names, tree):
    (pictures / names[4]).write_bytes((pictures / names[4]).read_bytes() + b"\0")
    before = tree(made / "first")
    with pytest.raises(RequestError, match=rf"{names[4]}: changed since the store was made \(\d+ bytes then\)"):
        make(made / "first", pictures, tiny_teacher, extend=True)
    assert tree(made / "first") == before


def test_other_settings_are_refused_before_anything_is_written(made, image_folder, tiny_teacher, tree):
    before = tree(made / "first")
    for options, what in (({"crops": 5}, "crops per image"), ({"seed": 1}, "seed"), ({"recipe": RECIPES["swav"]}, "recipe")):
        with pytest.raises(RequestError, match=f"its {what}"):
            make(made / "first", image_folder, tiny_teacher, extend=True, **options)
    assert tree(made / "first") == before


def test_damaged_new_images(tmp_path, made, pictures, tiny_teacher):
    shutil.copytree(made / "first", tmp_path / "store")
    (pictures / "aaa.jpg").write_bytes(b"not an image")
    with pytest.raises(Exception, match=r"aaa\.jpg: not a readable image.*--on_unreadable skip"):
        make(tmp_path / "store", pictures, tiny_teacher, extend=True)
    make(tmp_path / "store", pictures, tiny_teacher, extend=True, skip_unreadable=True)
    store = open_store(tmp_path / "store")
    assert [store.paths[row] for shard in range(store.manifest.shards) for row in store.skipped(shard)] == ["aaa.jpg"]
    assert len(store) == 24
    assert verify(store, scan(pictures), tiny_teacher).problems == []


def test_a_second_teacher_later(tmp_path, made, image_folder, new_teacher, tree):
    """Its column covers all rows; a column from before lacks the new rows until the same precompute finishes it."""
    store = shutil.copytree(made / "first", tmp_path / "store")
    make(store, keep(image_folder, list(open_store(store).paths), tmp_path / "some"), new_teacher(2, "old"))
    make(store, image_folder, new_teacher(), extend=True)
    with pytest.raises(StoreError, match=r"3 of 6 shards missing \(the first is 3\): run the same fkd-ssl precompute"):
        open_store(store).column("old").require_complete()
    with pytest.raises(StoreError, match="3 of 6 shards missing"):
        StoredCrops(store, image_folder, pixels=32, column="old")
    make(store, image_folder, new_teacher(2, "old"))
    make(store, image_folder, new_teacher(3, "new"))
    opened = open_store(store)
    for name in ("tiny", "old", "new"):
        opened.column(name).require_complete()
    report = verify(opened, scan(image_folder), new_teacher(3, "new"), column="new")
    assert report.problems == []
    assert {name: data for name, data in tree(store).items() if name in tree(made / "grown")} == tree(made / "grown")


def test_training_reads_the_same_crops_of_old_images(made, image_folder):
    first, grown = (StoredCrops(made / name, image_folder, crops_per_image=2, pixels=32) for name in ("first", "grown"))
    assert (len(first), len(grown)) == (13, 24)
    for i in range(13):
        a, b = first[i], grown[[grown.name(k) for k in range(24)].index(first.name(i))]
        assert a["path"] == b["path"]
        assert np.array_equal(a["images"], b["images"])
        assert np.array_equal(a["targets"], b["targets"])


@pytest.mark.parametrize(
    "file",
    [
        "images-00001.txt",
        "images-00001.npy",
        "images.txt",
        "crops/00004.npy",
        "crops/00005.json",
        "targets/tiny/codes-00003.npy",
        "targets/tiny/ranges.npy",
    ],
)
def test_verify_names_damage_and_repairs_it(tmp_path, made, image_folder, tiny_teacher, tree, file):
    store = shutil.copytree(made / "grown", tmp_path / "store")
    data = bytearray((store / file).read_bytes())
    data[-9] ^= 1
    (store / file).write_bytes(data)
    lists = file.startswith("images")
    if lists:
        with pytest.raises(StoreError, match=f"{file}: damaged"):
            open_store(store)
    else:
        assert file in verify(open_store(store)).problems[0]
    repair_lists(store, scan(image_folder), lambda line: None)
    opened = open_store(store)
    repair(opened, verify(opened).damage, scan(image_folder), tiny_teacher)
    assert tree(store) == tree(made / "grown")


def test_a_lost_extension_is_named(tmp_path, made):
    store = shutil.copytree(made / "grown", tmp_path / "store")
    (store / "images-00001.json").unlink()
    problems = verify(open_store(store)).problems
    assert len(problems) == 3
    assert "00003.json: its shard is in no list of images: restore images-*.json" in problems[0]


def test_extensions_of_another_store_are_refused(tmp_path, made, image_folder, tiny_teacher):
    store = shutil.copytree(made / "grown", tmp_path / "store")
    (store / "images-00001.json").rename(store / "images-00002.json")
    with pytest.raises(StoreError, match=r"images-00002.json: does not follow the previous list of images"):
        open_store(store)
    make(tmp_path / "other", image_folder, tiny_teacher, limit=5)
    shutil.copy(made / "grown" / "images-00001.json", tmp_path / "other")
    with pytest.raises(StoreError, match=r"images-00001.json: does not follow the previous list of images"):
        open_store(tmp_path / "other")


@pytest.mark.parametrize(
    "change", [{"count": 0}, {"count": 2**31}, {"count": True}, {"count": 10}, {"more": 1}, {"images_sha256": None}]
)
def test_impossible_extensions(tmp_path, made, change):
    store = shutil.copytree(made / "grown", tmp_path / "store")
    path = store / "images-00001.json"
    path.write_bytes(files.with_checksum({**files.read_json(path), **change}))
    with pytest.raises(StoreError, match="images-00001"):
        open_store(store)


def test_a_manifest_cannot_hold_extensions(tmp_path, made):
    store = shutil.copytree(made / "first", tmp_path / "store")
    path = store / "manifest.json"
    path.write_bytes(files.with_checksum({**files.read_json(path), "extensions": []}))
    with pytest.raises(StoreError, match="unknown: 'extensions'"):
        open_store(store)


def test_subset_and_recode(tmp_path, made, image_folder, names, tree, new_teacher):
    """A subset is an ordinary store in the order of names. Its records are those of a store that was made at once."""
    grown = open_store(made / "grown")
    flat = subset(grown, tmp_path / "flat")
    assert subset(grown, tmp_path / "flat").manifest == flat.manifest
    assert list(flat.paths) == names
    whole = tree(made / "whole")
    assert {name: data for name, data in tree(tmp_path / "flat").items() if not name.startswith("targets")} == {
        name: data for name, data in whole.items() if not name.startswith("targets")
    }
    some = subset(grown, tmp_path / "some", paths=[names[3], names[1]], crops=2)
    assert list(some.paths) == [names[1], names[3]]
    apart = recode(grown, "SQ4", out=tmp_path / "apart")
    assert recode(grown, "SQ4", out=tmp_path / "apart").digest == apart.digest
    for row, name in enumerate(grown.paths):
        other, exact = names.index(name), grown.targets("tiny", row, slice(None))
        assert np.array_equal(flat.targets("tiny", other, slice(None)), exact)
        assert np.array_equal(flat.crops(other, slice(None)), grown.crops(row, slice(None)))
        assert (apart.store.targets("tiny", other, slice(None)) * exact).sum(axis=1).min() > 0.9
    copy = open_store(shutil.copytree(made / "grown", tmp_path / "copy"))
    small = recode(copy, "SQ4")
    small.require_complete()
    assert np.array_equal(small.codes(20, slice(None)), apart.codes(names.index(copy.paths[20]), slice(None)))
    make(tmp_path / "flat", image_folder, new_teacher(4, "more"))  # another column of the copy
    assert verify(open_store(tmp_path / "flat"), scan(image_folder)).problems == []


def test_imported_stores_cannot_be_extended(tmp_path, made, image_folder, tiny_teacher):
    store = shutil.copytree(made / "first", tmp_path / "store")
    path = store / "manifest.json"
    path.write_bytes(files.with_checksum({**files.read_json(path), "recipe": IMPORTED.to_dict()}))
    with pytest.raises(RequestError, match="its crops were imported"):
        make(store, image_folder, tiny_teacher, extend=True, recipe=IMPORTED)


def test_the_format_page_is_right(made):
    spec = importlib.util.spec_from_file_location("plain_reader", Path(__file__).parents[1] / "plain_reader.py")
    assert spec is not None
    assert spec.loader is not None
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    read, store = plain.read_store(made / "grown"), open_store(made / "grown")
    assert read["paths"] == list(store.paths)
    assert np.array_equal(read["crops"], [store.crops(row, slice(None)) for row in range(24)])
    assert np.allclose(read["columns"]["tiny"], [store.targets("tiny", row, slice(None)) for row in range(24)], atol=1e-6)
