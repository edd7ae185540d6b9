"""Opening and reading: errors name files that are missing, damaged, foreign, newer or altered."""

import json
import multiprocessing
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fkd_ssl
from fkd_ssl import files
from fkd_ssl.errors import StoreError
from fkd_ssl.images import Names
from fkd_ssl.store import Store, column, listing, manifest, open_store


@pytest.fixture(scope="module")
def template(tmp_path_factory, image_folder, new_teacher):
    """A store of 24 rows in five shards; tests copy it."""
    from fkd_ssl import images
    from fkd_ssl.crops import RECIPES
    from fkd_ssl.store.write.precompute import precompute

    folder = tmp_path_factory.mktemp("template") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "ROWS_PER_SHARD", 5)
        precompute(
            images.scan(image_folder), folder, new_teacher(), crops=4, recipe=RECIPES["mocov2"], pixels=32, chunk_size=16
        )
    return folder


@pytest.fixture
def folder(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def resign(path: Path, **changes: object) -> None:
    """Rewrites a JSON file with a correct sha256, as an attacker or another program would."""
    values = {**files.read_json(path), **changes}
    path.unlink()
    files.write_json(path, {key: value for key, value in values.items() if value is not ...})


# reading


def test_slices_and_arrays_give_the_same_crops_and_targets(folder):
    store = open_store(folder)
    for row in (0, 4, 5, 23):
        crops, targets = store.crops(row, slice(None)), store.targets("tiny", row, slice(None))
        assert crops.shape == (4,)
        assert targets.shape == (4, 16)
        np.testing.assert_array_equal(store.crops(row, slice(1, 3)), crops[1:3])
        np.testing.assert_array_equal(store.targets("tiny", row, slice(1, 3)), targets[1:3])
        index = np.array([3, 0, 3])
        np.testing.assert_array_equal(store.crops(row, index), crops[index])
        np.testing.assert_array_equal(store.targets("tiny", row, index), targets[index])
        np.testing.assert_allclose(np.linalg.norm(targets, axis=1), 1, atol=1e-6)


def test_the_public_name_opens_a_store(folder):
    assert isinstance(fkd_ssl.open_store(str(folder)), Store)


def test_reading_changes_nothing(folder, tree):
    before = tree(folder)
    store = open_store(folder)
    with pytest.raises(ValueError, match="read-only"):
        store.crops(0, slice(None))["top"] = 1
    with pytest.raises(ValueError, match="read-only"):
        store.column().shard(0)[:] = 1
    assert tree(folder) == before


class Targets(Dataset):
    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.store.targets("tiny", int(self.store.rows[index]), slice(None)))


def test_a_store_pickles_as_its_folder(folder):
    store = open_store(folder)
    store.targets("tiny", 3, slice(None))  # maps are open
    data = pickle.dumps(store)
    assert len(data) < 300
    copy = pickle.loads(data)  # noqa: S301
    np.testing.assert_array_equal(copy.targets("tiny", 3, slice(None)), store.targets("tiny", 3, slice(None)))


def test_a_store_reads_the_same_in_a_worker(folder):
    store = open_store(folder)
    loaded = torch.cat(list(DataLoader(Targets(store), batch_size=6, num_workers=1)))
    here = np.stack([store.targets("tiny", row, slice(None)) for row in range(24)])
    np.testing.assert_array_equal(loaded.numpy(), here)


def test_a_store_goes_to_a_spawned_process(folder):
    store = open_store(folder)
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        there = pool.apply(Store.targets, (store, "tiny", 7, slice(0, 2)))
    np.testing.assert_array_equal(there, store.targets("tiny", 7, slice(0, 2)))


# not a store


def test_what_is_no_store_is_named(tmp_path, image_folder):
    with pytest.raises(StoreError, match=r"nowhere: not a store \(no such folder\); make one with fkd-ssl precompute"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"train: not a store \(no manifest\.json in it\)"):
        open_store(image_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"format 2; this version of fkd_ssl reads 1: update fkd_ssl"),
        ({"version": ...}, r"format None; this version"),
        ({"format": "another thing"}, "not the manifest of a store"),
        ({"seed": ...}, "keys are missing or unknown: .*'seed'"),
        ({"colour": "red"}, "keys are missing or unknown: .*'colour'"),
        ({"recipe": ...}, "keys are missing or unknown: 'recipe'"),
        ({"recipe": [1, 2]}, "not a crop recipe"),
        ({"recipe": {"name": "mocov2"}}, "not a crop recipe"),
        ({"recipe": {"name": 5}}, r"manifest\.json: not a crop recipe"),
        ({"crops_per_image": 10**6 + 1}, "are impossible"),
        ({"seed": True}, "seed True or counts"),
        ({"count": 0}, "are impossible"),
        ({"count": 2**40}, "are impossible"),
        ({"crops_per_image": -4}, "are impossible"),
        ({"rows_per_shard": 2.5}, "are impossible"),
        ({"seed": "0"}, "seed '0' or counts"),
        ({"count": 23}, r"images\.txt: 24 lines, the manifest says 23"),
        ({"images_sha256": None}, r"images\.txt: damaged: its sha256 differs"),
        ({"sizes_sha256": "0" * 64}, r"images\.npy: damaged: its sha256 differs"),
    ],
)
def test_manifests_of_others_are_refused(folder, changes, message):
    resign(folder / "manifest.json", **changes)
    with pytest.raises(StoreError, match=message):
        open_store(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../evil.jpg", "escapes the image folder"),
        ("a/../../evil.jpg", "escapes the image folder"),
        ("a/..", "escapes the image folder"),
        ("..", "escapes the image folder"),
        ("/etc/passwd.jpg", "absolute"),
        ("a//b.jpg", "a path is empty, absolute or escapes"),
        ("a/./b.jpg", "a path is empty, absolute or escapes"),
        ("", "a path is empty, absolute or escapes"),
        ("C:\\evil.jpg", "absolute"),
        ("c:evil.jpg", "absolute"),
        ("a\\..\\b.jpg", "a path is empty, absolute or escapes"),
        ("a\0.jpg", "a path is empty, absolute or escapes"),
        (b"\xff.jpg".decode("latin-1"), None),
        (b"\xff.jpg", r"images\.txt: not UTF-8"),
        ("..hidden/a..jpg", None),
    ],
)
@pytest.mark.parametrize("position", [0, 11, 23])
def test_paths_that_lead_out_of_the_folder_are_refused(folder, line, message, position):
    lines = (folder / "images.txt").read_bytes().split(b"\n")
    lines[position] = line if isinstance(line, bytes) else line.encode()
    (folder / "images.txt").write_bytes(b"\n".join(lines))
    resign(folder / "manifest.json", images_sha256=files.sha256(b"\n".join(lines)))
    if message is None:
        assert open_store(folder).paths[position] == line
        return
    with pytest.raises(StoreError, match=message):
        open_store(folder)


def test_a_list_without_its_last_newline_is_refused(folder):
    data = (folder / "images.txt").read_bytes() + b"more.jpg"
    (folder / "images.txt").write_bytes(data)
    resign(folder / "manifest.json", images_sha256=files.sha256(data))
    with pytest.raises(StoreError, match=r"images\.txt: 24 lines, the manifest says 24"):
        open_store(folder)


@pytest.mark.parametrize("name", ["images.txt", "images.npy"])
def test_missing_lists_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(StoreError, match=rf"{name}: cannot be read: No such file"):
        open_store(folder)


def test_paths_are_a_list_in_all_but_memory(folder):
    store = open_store(folder)
    assert len(store.paths) == 24
    assert [store.paths[k] for k in range(24)] == list(store.paths) == (folder / "images.txt").read_text().split()


# shards


def test_a_missing_shard_is_named_and_the_others_read(folder):
    for path in folder.rglob("*00002.*"):
        path.unlink()
    store = open_store(folder)
    assert len(store) == 19
    assert not {10, 11, 12, 13, 14} & set(store.rows)
    assert store.targets("tiny", 3, slice(None)).shape == (4, 16)
    with pytest.raises(StoreError, match=r"crops/00002\.npy: this shard is not finished; run the same fkd-ssl precompute"):
        store.crops(12, slice(None))
    with pytest.raises(StoreError, match=r"codes-00002\.npy: this shard is not finished"):
        store.targets("tiny", 12, slice(None))
    with pytest.raises(StoreError, match=r"1 of 5 shards missing \(the first is 2\): run the same fkd-ssl precompute again"):
        store.column().require_complete()
    open_store(folder)


@pytest.mark.parametrize("part", ["crops/00002.json", "targets/tiny/codes-00002.json"])
def test_a_column_is_complete_with_codes_and_crops(folder, part):
    (folder / part).unlink()
    assert open_store(folder).column().missing_shards == [2]
    with pytest.raises(StoreError, match=r"1 of 5 shards missing \(the first is 2\)"):
        open_store(folder).column().require_complete()


def test_a_complete_column_needs_nothing(folder):
    open_store(folder).column().require_complete()


@pytest.mark.parametrize("name", ["crops/00001.npy", "targets/tiny/codes-00001.npy"])
def test_a_truncated_shard_is_named(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    store = open_store(folder)
    with pytest.raises(StoreError, match=rf"{Path(name).name}: {len(data) - 1} bytes, expected {len(data)}: truncated"):
        (store.crops if name.startswith("crops") else store.column().codes)(7, slice(None))


@pytest.mark.parametrize("name", ["crops/00001.npy", "targets/tiny/codes-00001.npy"])
def test_a_shard_of_another_shape_is_named(folder, name):
    shutil.copy(folder / name.replace("00001", "00004"), folder / name)  # four rows, not five
    store = open_store(folder)
    with pytest.raises(StoreError, match=r"holds .* \[4, 4.*\], expected .* \[5, 4"):
        (store.crops if name.startswith("crops") else store.column().codes)(7, slice(None))


def test_a_shard_that_is_a_pickle_is_not_loaded(folder, tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    for name in ("crops/00000.npy", "targets/tiny/codes-00000.npy"):
        np.save(folder / name, np.array([[Bomb()] * 4] * 5, dtype=object), allow_pickle=True)
    np.save(folder / "targets/tiny/ranges.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    resign(folder / "targets/tiny/meta.json", arrays={"ranges": files.sha256_file(folder / "targets/tiny/ranges.npy")})
    store = open_store(folder)
    with pytest.raises(StoreError, match="holds object"):
        store.crops(0, slice(None))
    with pytest.raises(StoreError, match=r"ranges\.npy: holds object \[1\], expected float32 \[2, 16\]"):
        store.column()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["0"]}, "expected 5 strings; the file is damaged"),
        ({"images": [1, 2, 3, 4, 5]}, "expected 5 strings"),
        ({"images": ...}, "keys are missing or unknown"),
        ({"file": ...}, "keys are missing or unknown"),
        ({"file": "z" * 64}, "a checksum is missing or is not a hexadecimal sha256"),
        ({"images": ["z" * 64, *["0" * 64] * 4]}, "a checksum is missing or is not a hexadecimal sha256"),
        ({"skipped": ...}, "keys are missing or unknown"),
        ({"skipped": [3]}, "invalid list of skipped rows"),
        ({"skipped": ["7"]}, "invalid list of skipped rows"),
        ({"skipped": [True]}, "invalid list of skipped rows"),
    ],
)
def test_sidecars_that_cannot_be_are_refused(folder, changes, message):
    resign(folder / "crops" / "00001.json", **changes)
    with pytest.raises(StoreError, match=rf"00001\.json: {message}"):
        open_store(folder).crops_sidecar(1)


@pytest.mark.parametrize("changes", [{"file": ...}, {"file": 7}, {"file": "0" * 63}, {"column": ...}])
def test_sidecars_of_codes_that_lack_a_checksum_are_refused(folder, changes):
    resign(folder / "targets" / "tiny" / "codes-00001.json", **changes)
    column = open_store(folder).column()
    with pytest.raises(
        StoreError, match=r"codes-00001\.json: (a checksum is missing or is not a hexadecimal sha256|keys are missing)"
    ):
        column.sidecar(1)


# columns


def test_columns_that_are_not_there_are_named(folder):
    with pytest.raises(StoreError, match=r"no targets of 'mocov2'; there are \['tiny'\]"):
        open_store(folder).targets("mocov2", 0, slice(None))
    shutil.rmtree(folder / "targets" / "tiny")
    with pytest.raises(StoreError, match="has no targets yet; run fkd-ssl precompute"):
        open_store(folder).column()
    with pytest.raises(StoreError, match="no targets of 'tiny'; there are none yet"):
        open_store(folder).column("tiny")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "distribution"}, "its codec is invalid"),
        ({"kind": "maps"}, "kind 'maps': expected embedding or distribution or tokens"),
        ({"kind": "tokens"}, r"targets of shape \[16\]: tokens are grids \[h, w, D\]"),
        ({"kind": "tokens", "shape": [1, 2, 8]}, r"ranges\.npy: holds float32 \[2, 16\], expected float32 \[2, 8\]"),
        ({"kind": "tokens", "shape": [1, 2, 16]}, "code size 16, but SQ8 has 32"),
        ({"kind": ["embedding"]}, "the file is damaged or newer"),
        ({"network": 5}, "name, network, licence, source and checksum are strings; the file is damaged or newer"),
        ({"colour": 5}, "unexpected keyword argument 'colour'; the file is damaged or newer"),
        ({"temperature": 0.1}, "unexpected keyword argument 'temperature'; the file is damaged or newer"),
        ({"shape": [0]}, r"targets of shape \[0\]: expected positive lengths"),
        ({"shape": ["16"]}, r"targets of shape \['16'\]: expected positive lengths"),
        ({"shape": []}, r"targets of shape \[\]: expected positive lengths"),
        ({"shape": [2**20, 2**20]}, "at most 1048576 numbers"),
        ({"shape": [4, 4]}, r"targets of shape \[4, 4\]: embeddings are vectors"),
        ({"shape": 16}, "shape 16"),
        ({"shape": [32]}, r"ranges\.npy: holds float32 \[2, 16\], expected float32 \[2, 32\]"),
        ({"precision": "int3"}, "precision 'int3': expected fp32 or bf16 or fp16"),
        ({"code_size": 15}, "code size 15, but SQ8 has 16"),
        ({"codec": "SQ4"}, "code size 16, but SQ4 has 8"),
        ({"codec": "IVF10,Flat"}, "codec 'IVF10,Flat': not supported"),
        ({"codec": "Flat"}, r"codec Flat: has arrays \['ranges'\], expected \[\]"),
        ({"codec": 8}, "is invalid; the file is damaged or newer"),
        ({"arrays": {}}, r"codec SQ8: has arrays \[\], expected \['ranges'\]"),
        ({"arrays": []}, "is invalid; the file is damaged or newer"),
        ({"arrays": {"../../images": "0" * 64}}, "its arrays is invalid"),
        ({"arrays": {"images": "0" * 64}}, r"codec SQ8: has arrays \['images'\], expected \['ranges'\]"),
        ({"pixels": 10**9}, "pixels 1000000000: expected 1 to 4096"),
        ({"chunk_size": True}, "its chunk_size is invalid"),
        ({"code_size": 16.0}, "its code_size is invalid"),
        ({"fidelity": {"cosine_mean": 1.0}}, "its fidelity is invalid"),
        ({"fidelity": {"cosine_mean": 10**400, "cosine_min": 1, "sample": 1}}, "its fidelity is invalid"),
        ({"teacher": {"name": "x"}}, "shape None; the file is damaged or newer"),
        ({"teacher": None}, "the file is damaged or newer"),
        ({"mean": [0.5]}, "expected three numbers"),
        ({"replay_digest": 5}, "its replay_digest is invalid"),
        ({"codec": "PCA9999,Flat", "shape": [60000]}, "parameters for 60000 dimensions, over"),
        ({"arrays": {"ranges": "0"}}, "its arrays is invalid"),
    ],
)
def test_metas_of_others_are_refused(folder, changes, message):
    path = folder / "targets" / "tiny" / "meta.json"
    known = files.read_json(path)
    own = {key: value for key, value in changes.items() if key in known or key == "temperature"}
    of_teacher = {key: value for key, value in changes.items() if key not in own}
    resign(path, **({"teacher": {**known["teacher"], **of_teacher}} if of_teacher else {}), **own)
    with pytest.raises(StoreError, match=message):
        open_store(folder).column("tiny")


def test_parameters_of_a_codec_are_checked(folder):
    path = folder / "targets" / "tiny" / "ranges.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"ranges\.npy: damaged: its sha256 differs from the one in meta\.json; restore it"):
        open_store(folder).column()
    path.unlink()
    with pytest.raises(StoreError, match=r"ranges\.npy: cannot be read: No such file"):
        open_store(folder).column()


def test_codes_of_another_column_are_not_read(folder):
    resign(folder / "targets" / "tiny" / "codes-00001.json", column="0" * 64)
    column = open_store(folder).column()
    column.codes(3, slice(None))
    with pytest.raises(StoreError, match=r"codes-00001\.npy: belongs to another column: files were swapped"):
        column.codes(7, slice(None))


@pytest.mark.parametrize("name", ["crops", "targets", "targets/tiny"])
def test_links_to_folders_are_not_followed(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"(a symbolic link, which is not followed inside a store|no targets of 'tiny')"):
        open_store(folder).column("tiny")


def test_the_folder_of_a_store_may_be_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert open_store(tmp_path / "link").targets("tiny", 3, slice(None)).shape == (4, 16)


def test_arrays_of_a_teacher_that_are_too_large_are_not_read(folder, monkeypatch):
    path = folder / "targets" / "tiny" / "teacher-prototypes.npy"
    digest = files.write_npy(path, np.zeros((3, 16), dtype=np.float32))
    arrays = files.read_json(folder / "targets/tiny/meta.json")["arrays"]
    resign(folder / "targets" / "tiny" / "meta.json", arrays={**arrays, "teacher-prototypes": digest})
    assert open_store(folder).column().array("teacher-prototypes").shape == (3, 16)
    digest = files.write_npy(path.with_name("teacher-more.npy"), np.zeros((3, 16), dtype=np.float32))
    resign(folder / "targets/tiny/meta.json", arrays={**arrays, "teacher-prototypes": digest, "teacher-more": digest})
    assert open_store(folder).column().info.arrays.keys() == {"prototypes", "more"}
    monkeypatch.setattr(column, "MAX_ARRAY", 600)  # either fits, and both together do not
    with pytest.raises(StoreError, match=r"targets/tiny: arrays of its teacher have 640 bytes in all, over 600"):
        open_store(folder).column().info.arrays.keys()


def test_skipped_rows_are_found_without_parsing_and_with(folder, monkeypatch):
    values = files.read_json(folder / "crops" / "00001.json")
    resign(folder / "crops" / "00001.json", images=["", *values["images"][1:4], ""], skipped=[5, 9])
    fast = open_store(folder).rows
    assert fast.tolist() == [row for row in range(24) if row not in (5, 9)]
    monkeypatch.setattr(files, "match_with_checksum", lambda *_: None)
    np.testing.assert_array_equal(open_store(folder).rows, fast)


def test_hidden_and_unfinished_columns_are_not_listed(folder):
    shutil.copytree(folder / "targets" / "tiny", folder / "targets" / ".tmp-other-1")
    (folder / "targets" / "begun").mkdir()
    assert open_store(folder).column_names == ["tiny"]


def test_json_of_a_store_is_signed(folder):
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values["seed"] = 5
    path.write_bytes(files.canonical(values))
    with pytest.raises(StoreError, match=r"manifest\.json: altered: its sha256 is "):
        open_store(folder)


def opening(folder):
    """Returns the peak memory of opening a store, and the error."""
    error = None
    tracemalloc.start()
    try:
        open_store(folder)
    except StoreError as caught:
        error = str(caught)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, error


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"\n" * 2**23, "a path is empty, absolute or escapes the image folder"),
        (b"a\n" * 2**22, None),
        (b"a\n" * 2**22 + b"\n", "4194305 lines, the manifest says 4194304"),
        (b"x" * (2**23 - 1) + b"\n", "8388608 bytes, and at most 4097 are expected"),
        ("ä".encode() * 2000 + b"\n" + b"a\n" * 2**22 + b"\xff\n", "not UTF-8"),
    ],
)
def test_a_list_of_images_takes_little_more_than_its_bytes(folder, lines, message):
    count = 2**22 if message is not None and message.startswith("4194305") else lines.count(b"\n")
    (folder / "images.txt").write_bytes(lines)
    (folder / "images.npy").unlink()
    sizes = files.write_npy(folder / "images.npy", np.zeros(count, dtype=listing.SIZE_DTYPE))
    resign(folder / "manifest.json", count=count, images_sha256=files.sha256(lines), sizes_sha256=sizes)
    peak, error = opening(folder)
    assert (error is None) == (message is None)
    assert message is None or message in str(error)
    assert peak < 3.5 * len(lines) + 2**21


def test_paths_of_a_long_list_are_found(folder):
    """Longer than the pieces in which newlines are searched."""
    names = [f"{'x' * (k % 90)}{k}" for k in range(150_000)]
    text = "".join(f"{name}\n" for name in names).encode()
    assert len(text) > 2**18
    assert list(Names(text)) == names
    assert Names(text) == Names(names)
    np.testing.assert_array_equal(Names(text).positions([names[7], "gone", names[-1]]), [7, -1, len(names) - 1])
