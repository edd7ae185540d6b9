import hashlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fkd_ssl import files
from fkd_ssl.errors import RequestError, StoreError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text().filter(lambda key: key != "sha256"), JSON, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# canonical JSON


def test_canonical_has_one_spelling():
    assert files.canonical({"b": 1, "a": [1.5, "é", None]}) == b'{"a":[1.5,"\\u00e9",null],"b":1}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical({"a": float("nan")})


@settings(max_examples=60, deadline=None)
@given(OBJECTS)
def test_json_comes_back(folder, value):
    path = folder / "value.json"
    path.unlink(missing_ok=True)
    files.write_json(path, value)
    assert files.read_json(path) == value
    assert path.read_bytes() == files.canonical(json.loads(path.read_bytes()))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_found(folder, data):
    path = folder / "flipped.json"
    if not path.exists():
        files.write_json(path, {"count": 12, "names": ["ä", "b"], "share": 0.25, "none": None, "nested": {"deep": True}})
    whole = path.read_bytes()
    position, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    damaged = folder / "damaged.json"
    damaged.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
    with pytest.raises(StoreError, match=r"damaged\.json: (not JSON|altered|a JSON)"):
        files.read_json(damaged)


@pytest.mark.parametrize("change", [lambda b: b + b" ", lambda b: b[:-1], lambda b: b.replace(b",", b", "), lambda b: b[:40]])
def test_another_spelling_of_the_same_json_is_found(tmp_path, change):
    files.write_json(tmp_path / "a.json", {"one": 1, "two": 2})
    (tmp_path / "a.json").write_bytes(change((tmp_path / "a.json").read_bytes()))
    with pytest.raises(StoreError, match=r"a\.json: (altered|not JSON)"):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1]", "a JSON list, expected an object"),
        (b'{"a":1}\n', "altered: its sha256 is [0-9a-f]{64}, but it states None; restore"),
        (b'{"a":NaN,"sha256":"0"}\n', "altered"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_json_that_nobody_signed_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StoreError, match=rf"a\.json: {message}"):
        files.read_json(tmp_path / "a.json")


def test_missing_and_huge_json_are_refused(tmp_path, monkeypatch):
    with pytest.raises(StoreError, match=r"a\.json: cannot be read: No such file"):
        files.read_json(tmp_path / "a.json")
    files.write_json(tmp_path / "a.json", {"a": 1})
    monkeypatch.setattr(files, "MAX_JSON", 10)
    with pytest.raises(StoreError, match="and at most 10 are expected"):
        files.read_json(tmp_path / "a.json")


# publication


def test_create_leaves_nothing_where_the_block_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), files.create(tmp_path / "a") as file:  # noqa: PT012
        file.write(b"half")
        file.write(bytes([1 // 0]))
    assert names(tmp_path) == []


def test_create_shows_the_file_only_when_it_is_whole(tmp_path):
    with files.create(tmp_path / "a") as file:
        file.write(b"half")
        file.flush()
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"half"
    assert names(tmp_path) == ["a"]


def test_create_twice(tmp_path):
    for _ in range(2):
        with files.create(tmp_path / "a") as file:
            file.write(b"same")
    with pytest.raises(StoreError, match="a: exists with other content; delete it"), files.create(tmp_path / "a") as file:
        file.write(b"else")
    assert (tmp_path / "a").read_bytes() == b"same"
    assert names(tmp_path) == ["a"]


def test_create_keeps_a_link_to_a_missing_file(tmp_path):
    (tmp_path / "a").symlink_to("elsewhere")
    with pytest.raises(StoreError, match="a: exists with other content; delete it"), files.create(tmp_path / "a") as file:
        file.write(b"new")
    assert str((tmp_path / "a").readlink()) == "elsewhere"
    assert names(tmp_path) == ["a"]


def test_create_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    with files.create(tmp_path / "a") as file:
        file.write(b"bytes")
    assert (tmp_path / "a").read_bytes() == b"bytes"
    assert names(tmp_path) == ["a"]


def test_many_processes_create_one_file(tmp_path):
    code = (
        "import sys, pathlib; from fkd_ssl import files\n"
        "for k in range(40):\n    files.write_json(pathlib.Path(sys.argv[1]) / f'{k}.json', {'k': k})"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert names(tmp_path) == sorted(f"{k}.json" for k in range(40))
    assert all(files.read_json(tmp_path / f"{k}.json") == {"k": k} for k in range(40))


def test_replace_replaces_whole_files(tmp_path):
    files.replace(tmp_path / "a", b"one")
    files.replace(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert names(tmp_path) == ["a"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are Unix's")
@pytest.mark.parametrize("write", ["replace", "create"])
def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path, write):
    """A limit on the file size simulates a full disk, whose error does not name the file."""
    import resource

    (tmp_path / "kept").write_bytes(b"one")
    path = tmp_path / ("kept" if write == "replace" else "new")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as raised:
            files.replace(path, b"x" * 5000) if write == "replace" else files.write_json(path, {"x": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(path)
    assert names(tmp_path) == ["kept"]
    assert (tmp_path / "kept").read_bytes() == b"one"


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 300_000)
    assert files.sha256_file(tmp_path / "a") == files.sha256(b"x" * 300_000) == hashlib.sha256(b"x" * 300_000).hexdigest()
    with pytest.raises(StoreError, match="gone: cannot be read: No such file"):
        files.sha256_file(tmp_path / "gone")


# arrays


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (5,)])
@pytest.mark.parametrize("dtype", ["u1", "<f4", [("a", "<u2"), ("b", "<f2")]])
def test_npy_comes_back_and_numpy_alone_reads_it(tmp_path, shape, dtype):
    array = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8).astype(np.dtype(dtype))
    assert files.write_npy(tmp_path / "a.npy", array) == files.sha256_file(tmp_path / "a.npy")
    mapped = files.map_npy(tmp_path / "a.npy", np.dtype(dtype), tuple(None for _ in shape))
    for found in (mapped, np.load(tmp_path / "a.npy", allow_pickle=False)):
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_map_is_read_only(tmp_path):
    files.write_npy(tmp_path / "a.npy", np.zeros(3, dtype=np.uint8))
    mapped = files.map_npy(tmp_path / "a.npy", np.dtype(np.uint8), (3,))
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("<f8", (3, 4)), (">f4", (3, 4)), ("<f4", (4, 3)), ("<f4", (3, None, 1)), ("<f4", (12,)), ("u1", (3, 4))],
)
def test_another_dtype_or_shape_is_refused(tmp_path, dtype, shape):
    files.write_npy(tmp_path / "a.npy", np.zeros((3, 4), dtype=np.float32))
    with pytest.raises(StoreError, match=r"a\.npy: holds float32 \[3, 4\], expected "):
        files.map_npy(tmp_path / "a.npy", np.dtype(dtype), shape)


@pytest.mark.parametrize("cut", [-1, 1])
def test_another_length_is_refused(tmp_path, cut):
    files.write_npy(tmp_path / "a.npy", np.zeros((3, 4), dtype=np.float32))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:cut] if cut < 0 else whole + b"\0")
    with pytest.raises(StoreError, match=rf"a\.npy: {len(whole) + cut} bytes, expected {len(whole)}: truncated"):
        files.map_npy(tmp_path / "a.npy", np.dtype(np.float32), (3, 4))


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    np.save(tmp_path / "a.npy", np.array([Bomb()] * 3, dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match=r"a\.npy: holds object \[3\], expected uint8 \[3\]"):
        files.map_npy(tmp_path / "a.npy", np.dtype(np.uint8), (3,))
    assert not (tmp_path / "ran").exists()


def test_fortran_order_and_version_2_are_refused(tmp_path):
    np.save(tmp_path / "f.npy", np.asfortranarray(np.zeros((3, 4), dtype=np.float32)))
    with pytest.raises(StoreError, match=r"f\.npy: holds float32 \[3, 4\], expected float32 \[3, 4\]"):
        files.map_npy(tmp_path / "f.npy", np.dtype(np.float32), (3, 4))
    with (tmp_path / "v2.npy").open("wb") as file:
        np.lib.format.write_array(file, np.zeros(3, dtype=np.uint8), version=(2, 0))
    with pytest.raises(StoreError, match=r"v2\.npy: no \.npy header \(not version 1\.0"):
        files.map_npy(tmp_path / "v2.npy", np.dtype(np.uint8), (3,))


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff", b"plain words", b"\x93NUMPY\x01\x00\x10\x00(((((((((((((((("]
)
def test_no_npy_at_all_is_refused(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(StoreError, match=r"a\.npy: no \.npy header"):
        files.map_npy(tmp_path / "a.npy", np.dtype(np.uint8), (3,))
    with pytest.raises(StoreError, match=r"b\.npy: cannot be read"):
        files.map_npy(tmp_path / "b.npy", np.dtype(np.uint8), (3,))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_headers_raise_nothing_else(folder, data):
    path = folder / "header.npy"
    whole = files.npy_header(np.dtype(np.float32), (3, 4)) + bytes(48)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with suppress(StoreError):
        assert files.map_npy(path, np.dtype(np.float32), (3, None)).shape == (3, 4)


def test_without_hard_links_a_file_is_still_not_replaced(tmp_path, monkeypatch):
    def refuse(*names):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for _ in range(2):
        with files.create(tmp_path / "a") as file:
            file.write(b"one")
    with pytest.raises(StoreError, match="exists with other content"), files.create(tmp_path / "a") as file:
        file.write(b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_many_threads_map_at_once(tmp_path):
    """Python 3.11's parser, which NumPy reads headers with, fails in some of two hundred such calls."""
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    files.write_npy(tmp_path / "a.npy", array)
    with ThreadPoolExecutor(16) as pool:
        for found in pool.map(lambda _: files.map_npy(tmp_path / "a.npy", np.dtype(np.uint8), (3, 4)), range(2000)):
            np.testing.assert_array_equal(found, array)


# regular files only


READERS = [
    files.read_json,
    files.sha256_file,
    lambda path: files.read_regular(path, 100),
    lambda path: files.map_npy(path, np.dtype(np.uint8), (3,)),
    lambda path: files.match_with_checksum(path, re.compile(rb".*")),
]


@pytest.mark.parametrize("read", READERS)
def test_links_pipes_and_folders_are_not_read(tmp_path, read):
    files.write_npy(tmp_path / "real", np.zeros(3, dtype=np.uint8))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "loop"):
        with pytest.raises(
            StoreError, match=rf"{name}: a symbolic link, which is not followed inside a store; replace it with the file"
        ):
            read(tmp_path / name)
    for name in ("pipe", "folder"):
        with pytest.raises(StoreError, match=rf"{name}: not a regular file; the store is damaged"):
            read(tmp_path / name)


def test_a_folder_of_ones_own_is_no_link(tmp_path):
    assert files.reject_symlink(tmp_path / "missing") == tmp_path / "missing"
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(
        StoreError, match="link: a symbolic link, which is not followed inside a store; replace it with the folder"
    ):
        files.reject_symlink(tmp_path / "link")


def test_files_that_are_too_large_are_not_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(StoreError, match="a: 1099511627776 bytes, and at most 100 are expected"):
        files.read_regular(tmp_path / "a", 100)


def test_json_that_is_read_but_too_deep_to_be_written_is_refused(tmp_path):
    for depth in (500, 900, 1500, 5000, 50_000):
        (tmp_path / "a.json").write_text('{"a":' + "[" * depth + "]" * depth + "}")
        with pytest.raises(StoreError, match=r"a\.json: (altered|not JSON)"):
            files.read_json(tmp_path / "a.json")


PATTERN = re.compile(rb'\{"count":(?P<count>\d+),"sha256":"(?P<sha256>[0-9a-f]{64})","z":"[a-z]*"\}\n')


def test_signed_files_are_matched_without_being_parsed(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"count": 12, "z": "word"})
    match = files.match_with_checksum(path, PATTERN)
    assert match is not None
    assert match["count"] == b"12"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert files.match_with_checksum(path, PATTERN) is None


def test_total_bytes_leaves_out_what_is_being_written(tmp_path, monkeypatch):
    for name in ("a", "b/c", ".tmp-a-0", ".tmp-b-0/c", "b/.work-d", "gone"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    real = Path.stat

    def stat(path, **options):
        if path.name == "gone":  # by another process, since the folder was listed
            raise FileNotFoundError
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert files.total_bytes(tmp_path) == 10


def test_any_shape_of_an_array(tmp_path):
    files.write_npy(tmp_path / "a.npy", np.zeros((2, 3, 4), dtype=np.float32))
    assert files.map_npy(tmp_path / "a.npy", np.dtype(np.float32), None).shape == (2, 3, 4)


# .npy files that a user names


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "|u1", "<i8", ">u2"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_users_npy_is_what_numpy_saved(tmp_path, dtype, version, order):
    array = np.arange(12).reshape(3, 4).astype(dtype, order=order)
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, array, version=version)
    (tmp_path / "link.npy").symlink_to("a.npy")
    np.testing.assert_array_equal(files.map_user_npy(tmp_path / "link.npy"), array)
    np.save(tmp_path / "none.npy", array[:0])
    assert files.map_user_npy(tmp_path / "none.npy").shape == (0, 4)


def npy(shape: str, descr: str = "<f4") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(450) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "not a .npy file of numbers"),
        (npy("(" * 200 + ")" * 200), "not a .npy file of numbers"),
        (npy("(-2, 8)"), "not a .npy file of numbers"),
        (npy("(2, 1000000000000)"), "not a .npy file of numbers (mmap length is greater than file size)"),
        (npy("(2, 8)", "|O"), "not a .npy file of numbers (Array can't be memory-mapped: Python objects in dtype.)"),
        (npy("(2, 8)", "|b1"), "holds bool [2, 8], expected numbers in one or two dimensions"),
        (npy(f"({'1, ' * 100})"), "not a .npy file of numbers"),
        (None, "not a regular file"),
        ("folder", "f.npy: not a regular file"),
    ],
)
def test_other_files_of_a_user_are_refused(tmp_path, content, message):
    path = tmp_path / "f.npy"
    if content is None:
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=re.escape(message)):
        files.map_user_npy(path)


def test_a_clock_that_is_hours_ahead_sweeps_nothing_that_is_being_written(tmp_path, monkeypatch):
    """The clock of this machine; ages are measured by that of the file system."""
    live, future = tmp_path / f".tmp-codes-{'a' * 12}", tmp_path / f".tmp-codes-{'b' * 12}"
    old, folder = tmp_path / f".tmp-codes-{'c' * 12}", tmp_path / f".tmp-column-{'d' * 12}"
    for path in (live, future, old, folder / "ranges.npy"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    now = live.stat().st_mtime
    os.utime(future, (now + 7200, now + 7200))  # written by a machine whose clock is ahead
    for path in (old, folder):
        os.utime(path, (now - 7200, now - 7200))
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    files.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == [live, future]
    monkeypatch.setattr(time, "time", lambda: now - 7200)
    files.remove_leftovers(tmp_path, seconds=0)
    assert list(tmp_path.iterdir()) == [future]


def test_a_folder_without_temporary_files_is_not_written_to(tmp_path):
    (tmp_path / "codes.npy").touch()
    before = tmp_path.stat().st_mtime_ns
    files.remove_leftovers(tmp_path, seconds=0)
    assert tmp_path.stat().st_mtime_ns == before
