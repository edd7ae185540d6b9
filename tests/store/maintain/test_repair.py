"""Damage that `verify` finds is rebuilt byte for byte, and nothing else is changed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fkd_ssl import files, images
from fkd_ssl.crops import RECIPES
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.maintain.repair import repair, repair_lists
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write.precompute import precompute

SHARDS = 3


@pytest.fixture(scope="module")
def template(tmp_path_factory, image_folder, new_teacher):
    folder = tmp_path_factory.mktemp("template") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "ROWS_PER_SHARD", 10)
        for seed, name in enumerate(("tiny", "other")):
            teacher = new_teacher(seed, name)
            teacher.info = replace(
                teacher.info, arrays={"prototypes": np.random.default_rng(seed).normal(size=(30, 16)).astype(np.float32)}
            )
            precompute(images.scan(image_folder), folder, teacher, crops=4, recipe=RECIPES["mocov2"], pixels=32, chunk_size=16)
    return folder


@pytest.fixture
def folder(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def flip(path: Path, where: float = 0.9) -> None:
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def mend(folder, *arguments, **options):
    """Returns the lines of a repair after a verify, and the result of a second verify."""
    lines = []
    repair(open_store(folder), verify(open_store(folder)).damage, *arguments, log=lines.append, **options)
    return lines, verify(open_store(folder)).problems


@pytest.fixture
def teacher(new_teacher):
    teacher = new_teacher()
    teacher.info = replace(
        teacher.info, arrays={"prototypes": np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)}
    )
    return teacher


@pytest.mark.parametrize("how", ["flipped", "deleted", "truncated"])
def test_crop_records_come_back_without_images_and_teacher(folder, tree, how):
    before = tree(folder)
    path = folder / "crops/00001.npy"
    if how == "flipped":
        flip(path)
    elif how == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    lines, problems = mend(folder)
    assert lines == [f"{path}: drawn again, as it was"]
    assert problems == []
    assert tree(folder) == before


@pytest.mark.parametrize("gone", ["flipped", "both"])
def test_a_sidecar_of_crops_comes_back_from_the_images(folder, tree, image_folder, gone):
    before = tree(folder)
    flip(folder / "crops/00001.json")
    if gone == "both":
        (folder / "crops/00001.json").unlink()
        (folder / "crops/00001.npy").unlink()
    lines, problems = mend(folder)
    assert lines == ["crops of 1 shard: --images is needed to make them again"]
    assert len(problems) == 1
    lines, problems = mend(folder, images.scan(image_folder))
    assert lines == [f"{folder / 'crops/00001.npy'}: made again from the images"]
    assert problems == []
    assert tree(folder) == before


@pytest.mark.parametrize("names", [["codes-00001.npy"], ["codes-00000.json", "codes-00002.npy"]])
def test_codes_come_back_and_no_other_shard_is_redone(folder, tree, image_folder, teacher, names):
    before = tree(folder)
    for name in names:
        flip(folder / "targets/tiny" / name)
    lines, problems = mend(folder)
    assert lines == ["column tiny: to make it again, pass --images, --teacher, --checkpoint and --column tiny"]
    assert len(problems) == len(names)
    lines, problems = mend(folder, images.scan(image_folder), teacher, column="tiny")
    assert problems == []
    assert tree(folder) == before
    shards = {name[:11]: 4 if name.startswith("codes-00002") else 10 for name in names}
    assert teacher.calls == sum(-(-rows * 4 // 16) for rows in shards.values())
    said = [line for line in lines if "made again" in line]
    assert [line.endswith(", as it was") for line in said] == [name.endswith(".npy") for name in names]


def test_deleted_shards_of_codes_and_crops_come_back(folder, tree, image_folder, teacher):
    before = tree(folder)
    for name in ("targets/tiny/codes-00001", "crops/00001"):
        for suffix in (".npy", ".json"):
            (folder / f"{name}{suffix}").unlink()
    assert mend(folder, images.scan(image_folder), teacher, column="tiny")[1] == []
    assert tree(folder) == before


@pytest.mark.parametrize(("array", "calls"), [("ranges", 6), ("teacher-prototypes", 0)])
def test_a_columns_arrays_come_back_if_they_come_out_the_same(folder, tree, image_folder, teacher, array, calls):
    before = tree(folder)
    flip(folder / f"targets/tiny/{array}.npy")
    lines, problems = mend(folder, images.scan(image_folder), teacher, column="tiny")
    assert lines == [f"{folder}/targets/tiny/{array}.npy: made again, as it was"]
    assert problems == []
    assert tree(folder) == before
    assert teacher.calls == calls


def test_an_array_that_comes_out_otherwise_is_not_put_there(folder, tree, pictures, teacher):
    flip(folder / "targets/tiny/ranges.npy")
    before = tree(folder)
    real = teacher.embed
    teacher.embed = lambda views: real(views) * 0.5
    lines, problems = mend(folder, images.scan(pictures), teacher, column="tiny")
    assert "ranges.npy: cannot be made again: the result differs from what was recorded" in lines[0]
    assert len(problems) == 1
    assert tree(folder) == before


def test_a_damaged_meta_json_is_said_to_be_lost(folder, tree, image_folder, teacher):
    flip(folder / "targets/tiny/meta.json")
    before = tree(folder)
    lines, problems = mend(folder, images.scan(image_folder), teacher, column="tiny")
    assert "restore meta.json from a backup, or move the folder" in lines[0]
    assert len(problems) == 1
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("teacher-more", "names an array 'teacher-more', which neither .* nor the teacher has .*: restore teacher-"),
        ("teacher-/../../../../secret", None),
    ],
)
def test_an_array_that_the_teacher_does_not_bring(folder, tmp_path, image_folder, teacher, tree, name, message):
    (tmp_path / "secret.npy").write_bytes(b"mine")
    path = folder / "targets/tiny/meta.json"
    values = files.read_json(path)
    values["arrays"][name] = "0" * 64
    path.write_bytes(files.with_checksum(values))
    before = tree(tmp_path)
    if message is not None:
        with pytest.raises(StoreError, match=message):
            mend(folder, images.scan(image_folder), teacher, column="tiny")
    else:
        lines, problems = mend(folder, images.scan(image_folder), teacher, column="tiny")
        assert "meta.json: its arrays is invalid" in lines[0]
        assert problems
    assert tree(tmp_path) == before


def test_another_teacher_repairs_nothing(folder, tree, image_folder, new_teacher):
    flip(folder / "targets/tiny/ranges.npy")
    before = tree(folder)
    with pytest.raises(
        RequestError, match=r"tiny: its checkpoint_sha256 is 0+, not 0+5; this is not the teacher of the column"
    ):
        mend(folder, images.scan(image_folder), new_teacher(5, "tiny"), column="tiny")
    assert tree(folder) == before


@pytest.mark.parametrize("name", ["images.txt", "images.npy"])
def test_the_list_of_images_comes_back(folder, tree, image_folder, name):
    before = tree(folder)
    flip(folder / name)
    with pytest.raises(StoreError, match="its sha256 differs"):
        open_store(folder)
    lines = []
    repair_lists(folder, images.scan(image_folder), lines.append)
    assert lines == [f"{folder / name}: made again, as it was"]
    assert tree(folder) == before


def test_the_sizes_of_images_of_which_one_has_no_header_come_back(tmp_path, make_store, pictures, tree):
    (pictures / "birch" / "004.jpg").write_bytes(b"no picture at all")
    folder = make_store(tmp_path / "store", images=pictures, skip_unreadable=True).folder
    before = tree(folder)
    flip(folder / "images.npy")
    lines = []
    repair_lists(folder, images.scan(pictures), lines.append)
    assert lines == [f"{folder / 'images.npy'}: made again, as it was"]
    assert tree(folder) == before
    (pictures / "birch" / "005.jpg").write_bytes(b"nor this")
    flip(folder / "images.npy")
    repair_lists(folder, images.scan(pictures), lines.append)
    assert "images.npy: cannot be made again" in lines[1]


def test_a_list_of_other_images_is_not_put_there(folder, tree, pictures):
    flip(folder / "images.txt")
    (pictures / "ash" / "000.jpg").unlink()
    before = tree(folder)
    lines = []
    repair_lists(folder, images.scan(pictures), lines.append)
    assert "images.txt: cannot be made again" in lines[0]
    assert tree(folder) == before


def test_images_that_are_missing_are_named(folder, pictures):
    (pictures / "ash" / "000.jpg").unlink()
    with pytest.raises(StoreError, match=r"lacks 1 of the 24 images of .*, for instance 'ash/000\.jpg'"):
        mend(folder, images.scan(pictures))


def test_random_flips_anywhere_are_found_and_repaired(folder, tree, image_folder, new_teacher):
    """All files of a store except the manifest and a column's meta.json, which cannot be rebuilt."""
    before = tree(folder)
    generator = np.random.default_rng(0)
    names = sorted(name for name in before if "manifest" not in name and "meta" not in name)
    for name in generator.choice(names, size=12, replace=False):
        path = folder / name
        data = bytearray(path.read_bytes())
        data[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
        path.write_bytes(data)
        found = images.scan(image_folder)
        repair_lists(folder, found, lambda line: None)
        for seed, column in enumerate(("tiny", "other")):
            teacher = new_teacher(seed, column)
            teacher.info = replace(
                teacher.info, arrays={"prototypes": np.random.default_rng(seed).normal(size=(30, 16)).astype(np.float32)}
            )
            mend(folder, found, teacher, column=column)
        assert tree(folder) == before, name


def test_verify_reports_damage_as_json(folder):
    flip(folder / "targets/tiny/codes-00001.npy")
    (damage,) = verify(open_store(folder)).damage
    assert (damage.kind, damage.shard, damage.column) == ("codes", 1, "tiny")
    assert json.dumps(damage.__dict__)
    assert files.read_json(folder / "targets/tiny/codes-00001.json")
