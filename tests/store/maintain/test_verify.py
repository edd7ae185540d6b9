import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fkd_ssl import files, images
from fkd_ssl.crops import RECIPES, box_record, replay_digest
from fkd_ssl.data import StoredCrops
from fkd_ssl.errors import FkdError, ImageError, NotFoundError, RequestError, StoreAccessError, StoreError
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.maintain import verify as verifying
from fkd_ssl.store.maintain.repair import repair
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write.precompute import precompute

# every file of the store that `template` makes
FILES = [
    "manifest.json",
    "images.txt",
    "images.npy",
    *(f"crops/{shard:05d}.{suffix}" for shard in range(2) for suffix in ("npy", "json")),
    "targets/tiny/meta.json",
    "targets/tiny/ranges.npy",
    "targets/tiny/teacher-prototypes.npy",
    *(f"targets/tiny/codes-{shard:05d}.{suffix}" for shard in range(2) for suffix in ("npy", "json")),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory, image_folder, new_teacher):
    folder = tmp_path_factory.mktemp("template") / "store"
    teacher = new_teacher()
    teacher.info = replace(
        teacher.info, arrays={"prototypes": np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "ROWS_PER_SHARD", 20)
        precompute(images.scan(image_folder), folder, teacher, crops=4, recipe=RECIPES["mocov2"], pixels=32, chunk_size=16)
    return folder


@pytest.fixture
def folder(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def problems(folder: Path, *arguments, **options) -> list[str]:
    """Returns the problems that `verify` finds, or the error when opening the store."""
    try:
        return verify(open_store(folder), *arguments, **options).problems
    except StoreError as error:
        return [str(error)]


def rewrite(folder: Path, name: str, array: np.ndarray) -> None:
    """Replaces a shard, with a correct checksum."""
    path = folder / name
    sidecar = files.read_json(path.with_suffix(".json"))
    path.unlink()
    path.with_suffix(".json").unlink()
    files.write_json(path.with_suffix(".json"), {**sidecar, "file": files.write_npy(path, array)})


def test_a_clean_store_has_no_problems(folder, image_folder, tiny_teacher, tree):
    before = tree(folder)
    report = verify(open_store(folder), images.scan(image_folder), tiny_teacher, sample=15)
    assert report.problems == []
    assert report.checked == {"files": 11, "images": 24, "crops": 15}
    assert report.cosine["min"] > 0.9999
    assert report.cosine["mean"] <= 1 + 1e-6
    assert tree(folder) == before


def test_without_a_teacher_there_is_no_cosine(folder):
    report = verify(open_store(folder))
    assert (report.problems, report.cosine, report.checked["images"]) == ([], None, 0)


def test_the_list_of_files_is_complete(folder, tree):
    assert sorted(tree(folder)) == sorted(FILES)


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file_is_found(folder, name, where):
    path = folder / name
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)
    found = problems(folder)
    assert found
    assert any(Path(name).name in problem for problem in found), found


@pytest.mark.parametrize("name", FILES)
def test_any_missing_or_emptied_file_is_found(folder, name):
    (folder / name).write_bytes(b"")
    assert problems(folder)
    (folder / name).unlink()
    found = problems(folder)
    assert any("missing" in p or "cannot be read" in p or "not a store" in p or "no teacher" in p for p in found), found


def test_a_changed_and_a_missing_image_are_found(folder, pictures):
    data = bytearray((pictures / "ash" / "002.jpg").read_bytes())
    data[len(data) // 2] ^= 1
    (pictures / "ash" / "002.jpg").write_bytes(data)
    found = problems(folder, images.scan(pictures))
    assert len(found) == 1
    assert "row 2" in found[0]
    assert "ash/002.jpg: changed since its crops were made; restore it or make another store" in found[0]
    (pictures / "ash" / "003.jpg").unlink()
    with pytest.raises(StoreError, match=r"lacks 1 of the 24 images of .*, for instance 'ash/003\.jpg'"):
        verify(open_store(folder), images.scan(pictures))


def test_a_wholly_other_folder_of_images_is_a_wrong_request(folder, tmp_path):
    other = tmp_path / "other" / "ash"
    other.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(other / "other.jpg")
    with pytest.raises(NotFoundError, match="lacks 24 of the 24 images"):
        verify(open_store(folder), images.scan(other.parent))


def test_images_that_the_store_does_not_hold_do_not_matter(folder, pictures, tiny_teacher):
    shutil.copy(pictures / "ash" / "002.jpg", pictures / "ash" / "0000.jpg")
    assert problems(folder, images.scan(pictures), tiny_teacher) == []


def test_another_teacher_is_found(folder, image_folder, new_teacher):
    report = verify(open_store(folder), images.scan(image_folder), new_teacher(seed=1))
    assert len(report.problems) == 1
    assert "24 of 24 sampled targets differ from this teacher's" in report.problems[0]
    assert report.cosine["mean"] < 0.9


def test_a_teacher_of_another_dimension_is_found(folder, image_folder, tiny_teacher):
    real = tiny_teacher.embed
    tiny_teacher.embed = lambda views: real(views)[:, :8]
    found = problems(folder, images.scan(image_folder), tiny_teacher)
    assert found == [f"{folder}/targets/tiny: holds targets [16], this teacher gives [8]"]


@pytest.mark.parametrize("rows", [[4], [4, 5, 6, 7]])
def test_wrong_codes_that_are_signed_are_found_by_the_teacher(folder, image_folder, tiny_teacher, rows):
    codes = np.array(np.load(folder / "targets/tiny/codes-00000.npy"))
    codes[rows] = 255 - codes[rows]
    rewrite(folder, "targets/tiny/codes-00000.npy", codes)
    assert problems(folder) == []
    found = problems(folder, images.scan(image_folder), tiny_teacher)
    assert f"{len(rows)} of 24 sampled targets" in found[0]
    assert str(open_store(folder).paths[rows[0]]).split("/")[0] in found[0]


@pytest.mark.parametrize(
    "change", [{"height": 0}, {"top": 60000}, {"width": 65535}, {"order": 24}, {"flags": 255}, {"hue": 3.0}]
)
def test_impossible_records_that_are_signed_are_found(folder, change):
    records = np.array(np.load(folder / "crops/00001.npy"))
    for field, value in change.items():
        records[field][3, 1] = value
    rewrite(folder, "crops/00001.npy", records)
    (found,) = problems(folder)
    assert "crops/00001.npy: " in found
    assert "is invalid; delete" in found
    assert found.startswith("shard 1: ")
    assert "row 23 (cedar/007.jpg)" in found


def test_other_records_than_the_teacher_saw_are_found(folder, image_folder, tiny_teacher):
    records = np.array(np.load(folder / "crops/00000.npy"))
    records[:] = box_record(0, 0, 9, 9)[0]
    rewrite(folder, "crops/00000.npy", records)
    assert "differ from this teacher's" in problems(folder, images.scan(image_folder), tiny_teacher)[0]


def test_codes_of_another_column_are_found(folder, make_store, new_teacher):
    make_store(folder, teacher=new_teacher(1, "other"))
    for suffix in ("npy", "json"):
        shutil.copy(folder / f"targets/other/codes-00001.{suffix}", folder / f"targets/tiny/codes-00001.{suffix}")
    (found,) = problems(folder)
    assert "targets/tiny/codes-00001.npy: belongs to another column: files were swapped; restore" in found


@pytest.mark.parametrize("part", ["crops/00001", "targets/tiny/codes-00001"])
def test_an_incomplete_store_is_found(folder, part, image_folder, tiny_teacher):
    for suffix in (".npy", ".json"):
        (folder / f"{part}{suffix}").unlink()
    (found,) = problems(folder, images.scan(image_folder), tiny_teacher)
    assert f"{part}.npy: missing: run the same precompute again to finish" in found


def test_a_store_without_targets_is_found(folder):
    shutil.rmtree(folder / "targets")
    (found,) = problems(folder)
    assert "has no targets; run fkd-ssl precompute" in found


def test_codes_without_a_meta_json_are_found_beside_another_column(folder, make_store, new_teacher, tree):
    make_store(folder, teacher=new_teacher(1, "other"))
    (folder / "targets/tiny/meta.json").unlink()
    before = tree(folder)
    (found,) = problems(folder)
    assert "targets/tiny: meta.json is missing: restore" in found
    teacher = new_teacher()
    with pytest.raises(RequestError, match=r"targets/tiny: the folder exists, but its meta\.json is missing.* move the folder"):
        make_store(folder, teacher=teacher)
    assert teacher.calls == 0
    assert tree(folder) == before
    (folder / "targets/tiny").rename(folder.parent / "away")
    make_store(folder)
    assert problems(folder) == []


def test_a_folder_that_comes_while_the_codec_is_trained_is_left(folder, make_store, new_teacher):
    """And no temporary file remains beside it."""
    teacher, path = new_teacher(1, "other"), folder / "targets/other/codes-00000.npy"
    real = teacher.embed

    def embed(views):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
        return real(views)

    teacher.embed = embed
    with pytest.raises(
        RequestError, match=r"targets/other: the folder exists, but its meta\.json is missing.* move the folder"
    ):
        make_store(folder, teacher=teacher)
    assert path.read_bytes() == b"mine"
    assert not list((folder / "targets").glob(".tmp-*"))


def test_a_store_of_nothing_but_unreadable_images_is_said_to_be_one(tmp_path, make_store, pictures):
    for path in pictures.rglob("*.jpg"):
        path.write_bytes(b"nothing")
    with pytest.raises(ImageError, match="none of the images in the codec's sample can be read"):
        make_store(tmp_path / "store", images=pictures, skip_unreadable=True)
    (found,) = problems(tmp_path / "store", images.scan(pictures))
    assert "none of its 24 images could be read when it was made" in found
    assert "run the same precompute again" not in found


def test_a_part_of_skipped_images_alone_is_right(tmp_path, make_store, pictures):
    (pictures / "birch" / "004.jpg").write_bytes(b"nothing")
    store = make_store(tmp_path / "store", images=pictures, skip_unreadable=True)
    subset(store, tmp_path / "part", paths=["birch/004.jpg"])
    assert problems(tmp_path / "part", images.scan(pictures)) == []


def test_another_pixel_path_is_found(folder, monkeypatch):
    assert replay_digest() == open_store(folder).column().meta.replay_digest
    monkeypatch.setattr(verifying, "replay_digest", lambda: "0" * 64)
    (found,) = problems(folder)
    assert "its crops were made with another version of OpenCV" in found


@pytest.mark.parametrize(
    "place", ["crops/00001.npy", "crops/00001.json", *(f"targets/tiny/codes-00000.{k}" for k in ("npy", "json"))]
)
def test_what_may_not_be_read_is_neither_missing_nor_to_be_deleted(folder, pictures, tiny_teacher, tree, unprivileged, place):
    before = tree(folder)
    (folder / place).chmod(0)
    with unprivileged():
        store = open_store(folder)
        report = verify(store)
        repair(store, report.damage, images.scan(pictures), tiny_teacher)
    assert len(report.problems) == 1
    advice = "cannot be read: Permission denied; check its permissions and its disk"
    assert re.fullmatch(rf"shard \d: .*{place}: {advice}", report.problems[0])
    assert [damage.kind for damage in report.damage] == ["access"]
    (folder / place).chmod(0o644)
    assert tree(folder) == before


@pytest.mark.parametrize("place", ["targets", "targets/tiny", "."])
def test_a_folder_that_cannot_be_listed_does_not_read_as_missing(folder, unprivileged, place):
    (folder / place).chmod(0)
    with unprivileged(), pytest.raises(StoreAccessError, match="cannot be read: Permission denied"):
        verify(open_store(folder))


def test_crops_that_cannot_be_listed_do_not_read_as_missing_shards(folder, pictures, unprivileged):
    (folder / "crops").chmod(0)
    with unprivileged():
        report = verify(open_store(folder))
        with pytest.raises(StoreAccessError, match="crops: cannot be read: Permission denied"):
            StoredCrops(open_store(folder), pictures)
    assert report.problems
    assert all(re.search(r"crops/\d{5}\.json: cannot be read: Permission denied", problem) for problem in report.problems)


def test_an_image_that_cannot_be_opened_is_named_as_such(folder, pictures, unprivileged):
    (pictures / "ash" / "002.jpg").chmod(0)
    (pictures / "birch" / "001.jpg").write_bytes(b"other")
    with unprivileged():
        found = problems(folder, images.scan(pictures))
    assert len(found) == 2
    assert "ash/002.jpg: cannot be read: Permission denied; restore the file" in found[0]
    assert "birch/001.jpg: changed since its crops were made" in found[1]


def test_what_verify_advises_to_delete_can_be_made_again(folder, make_store, tree, new_teacher):
    before = tree(folder)
    for name in ("crops/00001.npy", "targets/tiny/codes-00000.npy"):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
    found = problems(folder)
    assert len(found) == 2
    for problem in found:
        path = Path(problem.split("delete ")[1].split(" and its .json")[0])
        path.unlink()
        path.with_suffix(".json").unlink()
    make_store(folder)
    assert tree(folder) == before
    assert problems(folder) == []


def test_a_teacher_needs_the_images(folder, tiny_teacher):
    with pytest.raises(RequestError, match="--teacher needs --images"):
        verify(open_store(folder), None, tiny_teacher)


def test_a_teacher_needs_the_name_of_one_of_several_columns(folder, make_store, image_folder, new_teacher):
    make_store(folder, teacher=new_teacher(1, "other"))
    with pytest.raises(StoreError, match=r"has the columns other, tiny; choose one with --column"):
        verify(open_store(folder), images.scan(image_folder), new_teacher())
    assert verify(open_store(folder), images.scan(image_folder), new_teacher(1), column="other", sample=5).problems == []


def test_a_failing_teacher_names_the_image(folder, image_folder, tiny_teacher):
    def fail(views):
        raise FkdError("out of cheese")

    tiny_teacher.embed = fail
    with pytest.raises(FkdError, match=r"\w+/00\d\.jpg: out of cheese"):
        verify(open_store(folder), images.scan(image_folder), tiny_teacher)


def test_a_teacher_that_has_drifted_is_found_by_the_mean(folder, image_folder, tiny_teacher):
    """Each single crop would pass."""
    generator = torch.Generator().manual_seed(0)
    real = tiny_teacher.embed

    def embed(views):
        noise = torch.nn.functional.normalize(torch.randn(len(views), 16, generator=generator), dim=1)
        return torch.nn.functional.normalize(real(views) + 0.05 * noise, dim=1)

    tiny_teacher.embed = embed
    column = open_store(folder).column()
    assert 1 - column.meta.fidelity["cosine_mean"] < 1e-4
    report = verify(open_store(folder), images.scan(image_folder), tiny_teacher)
    assert 0.998 < report.cosine["mean"] < 1 - 1e-3 - 4e-5
    assert any(
        "the versions of the libraries differ slightly" in problem or "differ from this teacher's" in problem
        for problem in report.problems
    )


def test_a_changed_image_is_not_blamed_on_the_teacher(folder, pictures, tiny_teacher):
    shutil.copy(pictures / "birch" / "002.jpg", pictures / "ash" / "002.jpg")
    found = problems(folder, images.scan(pictures), tiny_teacher)
    assert len(found) == 1
    assert "ash/002.jpg: changed since its crops were made" in found[0]


def test_what_is_whole_is_compared_although_a_shard_is_damaged(folder, image_folder, tiny_teacher):
    path = folder / "targets/tiny/codes-00001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    report = verify(open_store(folder), images.scan(image_folder), tiny_teacher)
    assert (len(report.problems), report.checked["images"], report.checked["crops"]) == (1, 24, 20)
