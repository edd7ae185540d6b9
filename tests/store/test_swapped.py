"""Swapped files: each is intact with a correct checksum, but belongs to another shard, column or store."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fkd_ssl import files, images
from fkd_ssl.commands import inspect
from fkd_ssl.crops import RECIPES
from fkd_ssl.errors import StoreError
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write.precompute import precompute

SUFFIXES = ("npy", "json")


@pytest.fixture(scope="module")
def templates(tmp_path_factory, image_folder, new_teacher) -> Path:
    """`store` and `other`, of other seeds: two shards of 12 images, columns a and b of two teachers; Flat has no parameters."""
    folder = tmp_path_factory.mktemp("templates")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "ROWS_PER_SHARD", 12)
        for seed, name in enumerate(("store", "other")):
            precompute(
                images.scan(image_folder),
                folder / name,
                [new_teacher(0, "a"), new_teacher(1, "b")],
                crops=3,
                recipe=RECIPES["mocov2"],
                codec="Flat",
                pixels=32,
                seed=seed,
                chunk_size=16,
            )
    return folder


@pytest.fixture
def folder(templates, tmp_path) -> Path:
    return Path(shutil.copytree(templates, tmp_path / "both"))


def swap(first: Path, second: Path) -> None:
    """Swaps two arrays and their sidecars."""
    for suffix in SUFFIXES:
        one, two = first.with_suffix(f".{suffix}"), second.with_suffix(f".{suffix}")
        data = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)


def read(folder: Path) -> None:
    store = open_store(folder)
    for row in (0, 12):
        store.crops(row, slice(None))
        for name in store.column_names:
            store.targets(name, row, slice(None))


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (
            "store/crops/00000",
            "store/crops/00001",
            r"crops/00000\.json: belongs to shard 1: files were swapped",
        ),
        ("store/targets/a/codes-00000", "store/targets/a/codes-00001", r"codes-00000\.json: belongs to shard 1"),
        ("store/targets/a/codes-00000", "store/targets/b/codes-00000", r"a/codes-00000\.npy: belongs to another column"),
        ("store/crops/00000", "other/crops/00000", r"crops/00000\.json: belongs to another folder"),
        ("store/targets/a/codes-00001", "other/targets/a/codes-00001", r"codes-00001\.json: belongs to another folder"),
    ],
)
def test_swapped_pairs_are_found(folder, image_folder, tmp_path, first, second, what):
    read(folder / "store")
    assert verify(open_store(folder / "store")).problems == []
    a, b = (open_store(folder / name).column("a") for name in ("store", "other"))
    assert a.digest == b.digest  # so that their codes differ only in their store
    swap(folder / f"{first}.npy", folder / f"{second}.npy")
    with pytest.raises(StoreError, match=what):
        read(folder / "store")
    report = verify(open_store(folder / "store"), images.scan(image_folder))
    assert any(part.shard == int(first[-1]) for part in report.damage)
    assert report.problems
    with pytest.raises(StoreError, match=what):
        subset(open_store(folder / "store"), tmp_path / "part")


def test_a_shard_of_a_store_with_the_same_crops_is_told_apart_from_a_part_of_it(folder, tmp_path):
    """A subset of a store has the same codes and another manifest."""
    part = subset(open_store(folder / "store"), tmp_path / "part", crops=2)
    assert part.column("a").digest == open_store(folder / "store").column("a").digest
    for suffix in SUFFIXES:
        shutil.copy(tmp_path / f"part/targets/a/codes-00000.{suffix}", folder / f"store/targets/a/codes-00000.{suffix}")
    (found,) = verify(open_store(folder / "store")).problems
    assert "codes-00000.json: belongs to another folder" in found


def test_a_column_of_another_store_is_found(folder):
    shutil.rmtree(folder / "store/targets/a")
    shutil.copytree(folder / "other/targets/a", folder / "store/targets/a")
    found = verify(open_store(folder / "store")).problems
    assert len(found) == 2
    assert all("belongs to another folder" in problem for problem in found)


@pytest.mark.parametrize("how", ["empty", "meta", "link", "named"])
def test_a_column_that_is_none_any_more_is_named(folder, capsys, how):
    place, store = folder / "store/targets/a", folder / "store"
    if how == "meta":
        (place / "meta.json").unlink()
    else:
        place.rename(folder / "away")
        if how == "empty":
            place.mkdir()
        elif how == "link":
            place.symlink_to(folder / "away")
        else:
            (place.parent / "ä").mkdir()
    (found,) = verify(open_store(store)).problems
    expected = {"link": "targets/a: a symbolic link", "named": "targets/ä: not a valid name of a column"}
    assert expected.get(how, "targets/a: meta.json is missing") in found
    assert inspect.run(inspect.Config(store=str(store))) == 1
    assert found in capsys.readouterr().out
    assert inspect.run(inspect.Config(store=str(store), json=True)) == 1
    assert json.loads(capsys.readouterr().out)["damaged"] == [found]
    (store / "targets/.tmp-c-000000000000").mkdir()  # an unfinished column
    (store / "targets/notes.txt").touch()
    assert len(verify(open_store(store)).problems) == 1


def test_a_column_that_was_removed_is_not_missed(folder):
    shutil.rmtree(folder / "store/targets/a")
    assert verify(open_store(folder / "store")).problems == []
    assert open_store(folder / "store").column_names == ["b"]


def test_the_manifests_digest_is_the_one_in_its_file(folder):
    text = json.loads((folder / "store/manifest.json").read_text())
    assert open_store(folder / "store").manifest.digest == text["sha256"]
    assert json.loads((folder / "store/crops/00001.json").read_text())["manifest"] == text["sha256"]


def test_other_images_than_the_teacher_saw_are_still_told_by_their_rows(folder, image_folder):
    """All four files of shard 0 replace those of shard 1; each pair of files is consistent."""
    for name in ("crops", "targets/a", "targets/b"):
        (first,) = (folder / "store" / name).glob("*00000.npy")
        (second,) = (folder / "store" / name).glob("*00001.npy")
        swap(first, second)
    report = verify(open_store(folder / "store"), images.scan(image_folder))
    assert {(part.kind, part.shard) for part in report.damage} == {(kind, n) for kind in ("crops", "codes") for n in (0, 1)}
    assert np.all(open_store(folder / "store").sizes["width"] > 0)


def test_a_manifest_that_lacks_a_later_versions_setting_keeps_its_digest(folder):
    """Sidecars refer to the digest of the file; the recipe that is read has defaults for settings missing from it."""
    store = folder / "store"
    values = files.read_json(store / "manifest.json")
    del values["recipe"]["blur"]
    (store / "manifest.json").write_bytes(files.with_checksum(values))
    digest = files.sha256(files.canonical(values))
    for path in [*store.glob("crops/*.json"), *store.glob("targets/*/codes-*.json")]:
        path.write_bytes(files.with_checksum({**files.read_json(path), "manifest": digest}))
    assert open_store(store).manifest.digest == digest
    assert verify(open_store(store)).problems == []
