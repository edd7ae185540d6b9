"""What lands in a store, and which requests are refused."""

import itertools
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fkd_ssl import files, images
from fkd_ssl.crops import CROP_DTYPE, RECIPES, replay
from fkd_ssl.errors import FkdError, ImageAccessError, ImageError, RequestError, StoreError
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.targets import TargetSpec


def embedded(store, root, teacher, pixels):
    """What the teacher says now of every crop of a store: [N, C, D]."""
    rows = []
    for path, row in zip(store.paths, range(store.manifest.count), strict=True):
        views = replay(images.read_image(root / path), store.crops(row, slice(None)), pixels)
        rows.append(teacher.embed(torch.from_numpy(views)).numpy())
    return np.stack(rows)


def stored(store, name="tiny"):
    return np.stack([store.targets(name, row, slice(None)) for row in range(store.manifest.count)])


@pytest.mark.parametrize("rows_per_shard", [5, 1024])
@pytest.mark.parametrize(("codec", "least"), [("Flat", 1 - 1e-6), ("SQ8", 0.9995), ("SQ4", 0.97), ("PCA8,SQ8", 0.5)])
def test_targets_are_what_the_teacher_says_of_the_replayed_crops(
    tmp_path, make_store, image_folder, tiny_teacher, monkeypatch, codec, least, rows_per_shard
):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", rows_per_shard)
    store = make_store(tmp_path / "store", codec=codec)
    found, expected = stored(store), embedded(store, image_folder, tiny_teacher, 32)
    assert found.shape == expected.shape == (24, 4, 16)
    assert found.dtype == np.float32
    cosines = (found * expected).sum(axis=2)
    assert cosines.min() >= least
    if codec == "Flat":
        np.testing.assert_allclose(found, expected, atol=2e-6)  # the teacher's last bits depend on its batch
    others = (found * np.roll(expected, 1, axis=0)).sum(axis=2)
    assert others.mean() < cosines.mean() - 0.2  # so a mix-up of rows would be seen


def test_flat_targets_are_bit_identical_to_the_same_chunks(tmp_path, make_store, image_folder, tiny_teacher):
    """24 x 4 crops in chunks of 7: the last is padded with zeros."""
    store = make_store(tmp_path / "store", codec="Flat", chunk_size=7)
    views = np.concatenate(
        [
            replay(images.read_image(image_folder / path), store.crops(row, slice(None)), 32)
            for row, path in enumerate(store.paths)
        ]
    )
    padded = np.concatenate([views, np.zeros((2, 3, 32, 32), dtype=np.uint8)])
    chunks = [np.ascontiguousarray(padded[k : k + 7].transpose(0, 2, 3, 1)) for k in range(0, 98, 7)]
    said = np.concatenate([tiny_teacher.embed(torch.from_numpy(chunk).permute(0, 3, 1, 2)).numpy() for chunk in chunks])
    np.testing.assert_array_equal(stored(store).reshape(-1, 16), said[:96])


def test_the_store_says_what_it_holds(tmp_path, make_store, image_folder):
    store = make_store(tmp_path / "store", seed=3, codec="SQ4")
    assert list(store.paths) == images.scan(image_folder).names
    assert (len(store), store.crops_per_image, store.column_names) == (24, 4, ["tiny"])
    assert (store.manifest.seed, store.manifest.recipe) == (3, RECIPES["mocov2"])
    for row, path in enumerate(store.paths):
        with Image.open(image_folder / path) as picture:
            expected = ((image_folder / path).stat().st_size, *picture.size)
        assert tuple(store.sizes[row]) == expected
    meta = store.column().meta
    assert (meta.target, meta.codec, meta.code_size, meta.chunk_size) == (TargetSpec("embedding", (16,)), "SQ4", 8, 16)
    assert (meta.teacher.name, meta.teacher.pixels) == ("tiny", 32)
    assert (meta.teacher.mean, meta.teacher.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert store.crops_sidecar(0)["images"] == [files.sha256_file(image_folder / path) for path in store.paths]


def test_recorded_fidelity_is_that_of_targets_held_out(tmp_path, make_store, image_folder, tiny_teacher):
    store = make_store(tmp_path / "store", codec="SQ4", crops=12)
    fidelity = store.column().meta.fidelity
    cosines = (stored(store) * embedded(store, image_folder, tiny_teacher, 32)).sum(axis=2)
    assert fidelity["sample"] == 24 * 12 // 9
    assert fidelity["cosine_mean"] == pytest.approx(cosines.mean(), abs=5e-3)
    assert cosines.min() - 0.02 <= fidelity["cosine_min"] <= fidelity["cosine_mean"] < 1


def test_numpy_alone_reads_a_store(tmp_path, make_store):
    store = make_store(tmp_path / "store")
    folder = tmp_path / "store"
    crops = np.load(folder / "crops" / "00000.npy", allow_pickle=False)
    assert crops.dtype == CROP_DTYPE
    assert crops.shape == (24, 4)
    codes = np.load(folder / "targets" / "tiny" / "codes-00000.npy", allow_pickle=False)
    assert codes.dtype == np.uint8
    assert codes.shape == (24, 4, 16)
    np.testing.assert_array_equal(codes[3], store.column().codes(3, slice(None)))
    assert np.load(folder / "images.npy", allow_pickle=False).dtype.names == ("bytes", "width", "height")
    assert (folder / "images.txt").read_text(encoding="utf-8").splitlines() == list(store.paths)
    assert all(json.loads(path.read_text())["sha256"] for path in folder.rglob("*.json"))


def test_nothing_in_a_store_tells_where_or_when_it_was_made(tmp_path, make_store, tree, image_folder):
    import datetime
    import getpass
    import platform

    make_store(tmp_path / "store")
    secrets = [
        str(tmp_path),
        str(image_folder),
        str(image_folder.parent),
        platform.node(),
        str(datetime.date.today().year) + "-",
    ]
    secrets.append(f'"{getpass.getuser()}"')
    for name, data in tree(tmp_path / "store").items():
        for secret in secrets:
            assert secret.encode() not in data, name
        assert not name.split("/")[-1].startswith("."), name


def test_summary_and_log(tmp_path, image_folder, tiny_teacher, tree):
    lines = []
    summary = precompute(
        images.scan(image_folder), tmp_path / "s", tiny_teacher, crops=4, recipe=RECIPES["mocov2"], pixels=32, log=lines.append
    )
    assert (summary.shards, summary.busy, summary.crops) == (1, [], 96)
    assert summary.store_bytes == sum(map(len, tree(tmp_path / "s").values()))
    assert summary.seconds > 0
    assert lines[0].startswith("24 images x 4 crops = 96 targets of 'tiny' at 16 + 20 bytes: 3.5 kB in 1 shard; ")
    assert lines[1].startswith("teacher tiny: random convolutions; pixels normalised by mean 0.485 0.456 0.406")
    assert lines[2] == "training the codec SQ8 on a sample"
    assert lines[3].startswith("codec SQ8: cosine to the teacher's own targets 0.9999")


# columns


def test_a_second_teacher_adds_a_column_over_the_same_crops(tmp_path, make_store, tree, image_folder, new_teacher):
    make_store(tmp_path / "store")
    before = tree(tmp_path / "store")
    other = new_teacher(seed=1, name="other")
    store = make_store(tmp_path / "store", teacher=other, pixels=48, codec="Flat", chunk_size=5)
    after = tree(tmp_path / "store")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[1] for name in set(after) - set(before)} == {"other"}
    assert store.column_names == ["other", "tiny"]
    np.testing.assert_allclose(stored(store, "other"), embedded(store, image_folder, other, 48), atol=2e-6)
    with pytest.raises(StoreError, match=r"has the columns other, tiny; choose one with --column"):
        store.column()


def test_columns_do_not_depend_on_their_order(tmp_path, make_store, tree, new_teacher):
    teachers = [new_teacher(seed, name) for seed, name in enumerate("ab")]
    for folder, order in (("one", (0, 1)), ("two", (1, 0))):
        for k in order:
            make_store(tmp_path / folder, teacher=teachers[k])
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_column_has_the_name_that_it_is_given(tmp_path, make_store, new_teacher):
    make_store(tmp_path / "store")
    with pytest.raises(RequestError, match=r"this column's checkpoint_sha256 is 0+, not 0+5; .*choose another --column"):
        make_store(tmp_path / "store", teacher=new_teacher(seed=5))
    store = make_store(tmp_path / "store", teacher=new_teacher(seed=5), column="tiny-5")
    assert store.column_names == ["tiny", "tiny-5"]
    for bad in (".hidden", "a/b", "..", "a b", "x" * 101):
        with pytest.raises(RequestError, match=r"use only letters, digits, '\.', '_' and '-'"):
            make_store(tmp_path / "store", column=bad)


def test_a_teachers_own_arrays_are_kept(tmp_path, make_store, tiny_teacher):
    tiny_teacher.info = replace(
        tiny_teacher.info, arrays={"prototypes": np.random.default_rng(0).normal(size=(30, 16)).astype(np.float32)}
    )
    column = make_store(tmp_path / "store", teacher=tiny_teacher).column()
    np.testing.assert_array_equal(column.array("teacher-prototypes"), tiny_teacher.info.arrays["prototypes"])
    with pytest.raises(StoreError, match=r"no array 'more'; there are \['ranges', 'teacher-prototypes'\]"):
        column.array("more")


def test_an_array_that_cannot_be_a_files_name_is_refused_before_the_work(tmp_path, make_store, tiny_teacher):
    tiny_teacher.info = replace(tiny_teacher.info, arrays={"my prototypes": np.zeros((3, 16), dtype=np.float32)})
    with pytest.raises(RequestError, match=r"teacher tiny: an array named 'my prototypes' cannot be stored; letters, digits"):
        make_store(tmp_path / "store", teacher=tiny_teacher)
    assert not (tmp_path / "store").exists()


# limit


def test_limit_takes_a_prefix_of_hash_order_from_all_classes(tmp_path, image_folder, make_store):
    image_set = images.scan(image_folder)
    sets = [set(manifest.limit_images(image_set, n).names) for n in range(1, 25)]
    assert [len(part) for part in sets] == list(range(1, 25))
    assert all(a < b for a, b in itertools.pairwise(sets))
    assert {path.split("/")[0] for path in sets[8]} == {"ash", "birch", "cedar"}
    assert manifest.limit_images(image_set, 100) is manifest.limit_images(image_set, None) is image_set
    store = make_store(tmp_path / "store", limit=9)
    assert list(store.paths) == sorted(sets[8])
    assert len(store) == 9


def test_crops_of_an_image_do_not_depend_on_the_others(tmp_path, make_store):
    """Nor on how many of them there are, nor on C."""
    all_of_them, some = make_store(tmp_path / "a"), make_store(tmp_path / "b", limit=7, crops=3)
    for row, path in enumerate(some.paths):
        np.testing.assert_array_equal(
            some.crops(row, slice(None)), all_of_them.crops(list(all_of_them.paths).index(path), slice(3))
        )


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path, make_store, limit):
    with pytest.raises(RequestError, match=rf"--limit {limit}: at least one image is needed"):
        make_store(tmp_path / "store", limit=limit)


# refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "its seed is 0, not 1; pass the same, or choose another --store"),
        ({"crops": 5}, "its crops per image is 4, not 5; pass the same, or choose another --store"),
        ({"recipe": RECIPES["swav"]}, "its recipe is mocov2, not swav; pass the same"),
        ({"recipe": replace(RECIPES["mocov2"], scale=(0.5, 1.0))}, r"its recipe's scale is \(0\.2, 1\.0\), not \(0\.5, 1\.0\)"),
        ({"limit": 20}, r"was made from other images: it lists 24, .* has 20 .*; .*train lacks '.*\.jpg'"),
        ({"chunk_size": 8}, "this column's chunk_size is 16, not 8; pass the same, or choose another --column"),
        ({"codec": "SQ4"}, "this column's codec is SQ8, not SQ4"),
        ({"pixels": 48}, "this column's pixels is 32, not 48"),
    ],
)
def test_other_arguments_for_the_same_store_are_refused(tmp_path, make_store, tree, change, message):
    make_store(tmp_path / "store")
    before = tree(tmp_path / "store")
    with pytest.raises(RequestError, match=message):
        make_store(tmp_path / "store", **change)
    assert tree(tmp_path / "store") == before


def test_other_images_are_refused(tmp_path, make_store, pictures):
    make_store(tmp_path / "store", images=pictures)
    shutil.copy(pictures / "ash" / "000.jpg", pictures / "ash" / "aaa.jpg")
    with pytest.raises(RequestError, match=r"it lists 24, .* has 25 .*; the store lacks 'ash/aaa\.jpg'"):
        make_store(tmp_path / "store", images=pictures)


@pytest.mark.parametrize("change", [{"crops": 0}, {"chunk_size": 0}, {"pixels": 0}])
def test_numbers_below_one_are_refused(tmp_path, make_store, change):
    with pytest.raises(RequestError, match="must be between 1 and"):
        make_store(tmp_path / "store", **change)


@pytest.mark.parametrize("codec", ["SQ5", "PQ5x8", "PQ16x8"])
def test_codecs_that_cannot_be_are_refused_before_the_work(tmp_path, make_store, codec):
    with pytest.raises(RequestError, match=f"codec '?{codec}'?"):
        make_store(tmp_path / "store", codec=codec)


@pytest.mark.parametrize(("crops", "needed"), [(4, 624), (29, 624)])
def test_a_codec_too_large_for_the_data_is_refused_before_the_work(tmp_path, make_store, tiny_teacher, crops, needed):
    """One in nine is held out: of 24 x 29 = 696 targets 619 are left to train on, of 24 x 30 all that are needed."""
    with pytest.raises(RequestError, match=rf"codec PQ4x4 needs at least {needed} targets for its training; there are"):
        make_store(tmp_path / "store", teacher=tiny_teacher, codec="PQ4x4", crops=crops)
    assert tiny_teacher.calls == 0
    assert not (tmp_path / "store").exists()


def test_a_codec_with_enough_data_goes_on_where_a_part_has_less(tmp_path, make_store):
    make_store(tmp_path / "store", codec="PQ4x4", crops=30)
    subset(open_store(tmp_path / "store"), tmp_path / "part", crops=2)
    assert make_store(tmp_path / "part", codec="PQ4x4", crops=2).column_names == ["tiny"]


def test_a_folder_of_other_things_is_refused_and_left(tmp_path, make_store, tree):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("chapter 1")
    with pytest.raises(RequestError, match=r"mine: holds 'thesis.tex', which is not part of a store; choose another folder"):
        make_store(tmp_path / "mine")
    assert tree(tmp_path / "mine") == {"thesis.tex": b"chapter 1"}


def test_a_folder_that_is_empty_or_hidden_things_is_used(tmp_path, make_store):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".gitkeep").touch()
    assert len(make_store(tmp_path / "mine")) == 24


@pytest.mark.parametrize("name", ["C:.jpg", "a\\b.jpg"])
def test_names_that_no_store_can_hold_are_refused(tmp_path, make_store, pictures, name):
    shutil.copy(pictures / "ash" / "000.jpg", pictures / name)
    with pytest.raises(RequestError, match="begin like a drive of Windows; rename"):
        make_store(tmp_path / "store", images=pictures)


@pytest.mark.parametrize(
    "targets", [torch.full((16, 16), float("nan")), torch.zeros(16, 8), torch.zeros(16, 16, 1), torch.full((16, 16), torch.inf)]
)
def test_a_teacher_that_says_nonsense_is_refused(tmp_path, make_store, tiny_teacher, targets):
    tiny_teacher.embed = lambda views: targets
    with pytest.raises(FkdError, match=r"teacher tiny: gave targets \[16, .*expected finite \[16, 16\]"):
        make_store(tmp_path / "store", teacher=tiny_teacher)


# images that change or cannot be read


def test_an_image_that_changed_since_the_crops_were_made_is_named(tmp_path, make_store, pictures, new_teacher):
    make_store(tmp_path / "store", images=pictures)
    changed = pictures / "birch" / "003.jpg"
    data = bytearray(changed.read_bytes())
    data[-40] ^= 1
    changed.write_bytes(data)
    with pytest.raises(FkdError, match=r"birch/003\.jpg: changed since the store's crops were made; restore it"):
        make_store(tmp_path / "store", images=pictures, teacher=new_teacher(1, "other"), codec="Flat")


def test_an_image_that_changed_while_its_store_was_made_is_named(tmp_path, make_store, pictures, tiny_teacher, smooth):
    def embed(views):
        Image.fromarray(smooth(9, 70, 71)).save(pictures / "cedar" / "007.jpg")
        raise KeyboardInterrupt

    real, tiny_teacher.embed = tiny_teacher.embed, embed
    with pytest.raises(KeyboardInterrupt):
        make_store(tmp_path / "store", images=pictures, teacher=tiny_teacher)
    tiny_teacher.embed = real
    with pytest.raises(ImageError, match=r"cedar/007\.jpg: changed since the store was made \(\d+ x \d+ pixels then\)"):
        make_store(tmp_path / "store", images=pictures, teacher=tiny_teacher)


UNREADABLE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:700]),  # its header can be read
    "text": lambda path: path.write_text("no picture"),
    "empty": lambda path: path.write_bytes(b""),
    "long": lambda path: Image.new("L", (65536, 1)).save(path, format="png"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("rows_per_shard", [5, 1024])
def test_an_unreadable_image_stops_or_is_skipped(
    tmp_path, make_store, pictures, new_teacher, tree, monkeypatch, kind, rows_per_shard
):
    monkeypatch.setattr(manifest, "ROWS_PER_SHARD", rows_per_shard)
    make_store(tmp_path / "good", images=pictures)
    UNREADABLE[kind](pictures / "birch" / "002.jpg")  # row 10
    with pytest.raises(ImageError, match=r"birch/002\.jpg: "):
        make_store(tmp_path / "stopped", images=pictures)
    store = make_store(tmp_path / "store", images=pictures, skip_unreadable=True)
    assert len(store) == 23
    assert 10 not in store.rows
    assert list(store.rows) == [row for row in range(24) if row != 10]
    assert store.skipped(10 // store.manifest.rows_per_shard) == [10]
    good = open_store(tmp_path / "good")
    for row in (9, 11, 23):
        np.testing.assert_array_equal(store.crops(row, slice(None)), good.crops(row, slice(None)))
        assert (store.targets("tiny", row, slice(None)) * good.targets("tiny", row, slice(None))).sum(axis=1).min() > 0.999
    assert verify(store, images.scan(pictures), new_teacher()).problems == []
    second = make_store(tmp_path / "store", images=pictures, teacher=new_teacher(1, "other"), skip_unreadable=True)
    assert len(second) == 23
    before = tree(tmp_path / "store")
    make_store(tmp_path / "store", images=pictures)  # what is there needs no flag
    assert tree(tmp_path / "store") == before


@pytest.mark.parametrize("target", ["gone.jpg", "/proc/self/mem"], ids=["missing", "failing disk"])
def test_an_image_that_cannot_be_opened_always_stops(tmp_path, make_store, pictures, target):
    """It may be sound, so it must not be left out of the store for ever."""
    picture = pictures / "birch" / "002.jpg"
    picture.unlink()
    picture.symlink_to(target)
    with pytest.raises(ImageAccessError, match=r"birch/002\.jpg: cannot be read: (No such file|Input/output error)"):
        make_store(tmp_path / "store", images=pictures, skip_unreadable=True)
    assert not (tmp_path / "store" / manifest.MANIFEST).exists()


def test_no_image_at_all_can_be_read(tmp_path, make_store, pictures):
    for path in pictures.rglob("*.jpg"):
        path.write_bytes(b"nothing")
    with pytest.raises(ImageError, match="none of the images in the codec's sample can be read"):
        make_store(tmp_path / "store", images=pictures, skip_unreadable=True)


def test_a_refused_request_touches_nothing(tmp_path, make_store):
    precious = tmp_path / "store" / "docs" / ".tmp-precious"
    precious.mkdir(parents=True)
    (precious / "a").write_text("mine")
    os.utime(precious, (0, 0))
    with pytest.raises(RequestError, match="which is not part of a store"):
        make_store(tmp_path / "store")
    assert (precious / "a").read_text() == "mine"
    for options, message in (({"codec": "nosuch"}, "not supported"), ({"crops": 10**7}, "--crops 10000000")):
        with pytest.raises(RequestError, match=message):
            make_store(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_old_leftovers_of_killed_processes_are_swept(tmp_path, make_store):
    store = make_store(tmp_path / "store")
    old, young = (store.folder / "crops" / f".tmp-00000.npy-{k * 12}" for k in "ab")
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    make_store(tmp_path / "store")
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("name", ["tiny/.work-codes-00000", ".work-tiny-sample"])
def test_a_forged_journal_leaves_no_damaged_shard(tmp_path, make_store, new_teacher, tree, name, cut):
    """It claims crops that its file does not hold, or rows that it has no checksums of."""
    make_store(tmp_path / "whole")

    class Dies(type(new_teacher())):
        def embed(self, crops):
            if self.calls == (2 if "sample" in name else 9):
                raise KeyboardInterrupt
            return super().embed(crops)

    with pytest.raises(KeyboardInterrupt):
        make_store(tmp_path / "store", teacher=Dies())
    work = tmp_path / "store/targets" / name
    journal = work.with_name(f"{work.name}.json")
    values = files.read_json(journal)
    assert values["crops"] > 0
    if cut:
        work.write_bytes(b"")
        values |= {"codes": files.sha256(b""), "crops": 96}
    journal.write_bytes(files.with_checksum({**values, "images": values["images"][:1]}))
    make_store(tmp_path / "store")
    assert tree(tmp_path / "store") == tree(tmp_path / "whole")
