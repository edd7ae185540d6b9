"""Untrusted stores: flipped bytes, truncated files, JSON and headers rewritten with correct checksums, links, pipes, holes.

Each gives a StoreError or is read correctly, with bounded memory, without opening files outside the store or running code.
300 examples, or as many as the variable FKD_SSL_FUZZ says.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from fkd_ssl import fetching, files
from fkd_ssl.commands import inspect
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.store import open_store, remote
from fkd_ssl.store.maintain.recode import recode
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.remote import INDEX, FileList
from fkd_ssl.targets import faiss_codecs
from fkd_ssl.targets.label_codecs import is_label
from tests.store import made

EXAMPLES = int(os.environ.get("FKD_SSL_FUZZ", "300"))
LARGEST = 2**25  # bytes of a file that a test reads
ROOM = 2**30  # bytes of address space that a hostile store may take
SPECS = (
    "Flat",
    "SQfp16",
    "SQ8",
    "PQ4x4",
    "OPQ4_8,PQ4x4",
    "PCA8,SQ4",
    "hard",
    "marginal_smoothing_k5",
    "full",
    "marginal_quantised_k3",
)
NAMES = [made.name_of(spec) for spec in SPECS]
RUNS = {
    "pickle.find_class",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "ctypes.dlopen",
    "marshal.loads",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.truncate",
}
watched: list[Path] = []
outputs: list[Path] = []  # where a command may write
seen: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not watched:
        return
    if outputs and event in ("open", "os.listdir", "os.scandir", "os.link", "os.remove", "os.rename", "os.mkdir", "os.rmdir"):
        paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, (str, os.PathLike)) and "/" in str(path)]
        if paths and all(Path(os.path.normpath(path)).is_relative_to(outputs[0]) for path in paths):
            return
    if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.normpath(Path.cwd() / os.fsdecode(arguments[0]))  # not resolved: the link's own location counts
        if not path.startswith(f"{watched[0]}/") and path != str(watched[0]):
            seen.append(f"{event} {path}")
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            seen.append(f"writes {path}")
    elif event in RUNS:
        seen.append(f"{event} {arguments}")


sys.addaudithook(watch)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("original") / "store"
    made.make(folder, SPECS)
    outside = (
        folder.parent / "outside"
    )  # the targets of links are correct files, so that only the link can be the reason for an error
    shutil.copytree(folder, outside)
    interval, tqdm.monitor_interval = tqdm.monitor_interval, 0
    read(folder)  # triggers late imports
    np.unique(np.zeros(1))  # likewise: NumPy imports numpy.ma at the first call
    yield folder
    tqdm.monitor_interval = interval
    fsspec.filesystem("memory").store.clear()


@contextlib.contextmanager
def guarded(folder: Path, *out: Path) -> Iterator[None]:
    """Limits the address space, and fails if a file outside `folder` and `out` is opened or a program is run."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else None
    seen.clear()
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    outputs.extend(out)
    watched.append(folder)
    try:
        yield
    finally:
        watched.clear()
        outputs.clear()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert not seen, seen


def read(folder: Path | str) -> dict[str, Any]:
    """Reads everything in a store through every function; verify's problems are under `problems`."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        store = open_store(folder)
        rows = store.rows[:8].tolist()
        said: dict[str, Any] = {"crops": [np.array(store.crops(row, slice(0, 3))) for row in rows], "paths": list(store.paths)}
        for name in store.column_names:
            column = store.column(name)
            column.require_complete()
            for array in column.meta.arrays:
                assert np.asarray(column.array(array)).dtype == np.float32
            said[name] = []
            for row in rows:
                decoded = store.targets(name, row, np.array([1, 0]))
                assert decoded.shape == (2, column.meta.target.size)
                assert np.isfinite(decoded).all()
                norms = decoded.sum(axis=1) if column.meta.target.kind == "distribution" else np.linalg.norm(decoded, axis=1)
                assert column.meta.codec == "Flat" or (np.isclose(norms, 1, atol=1e-4) | (norms == 0)).all()
                said[name].append(decoded)
        assert inspect.run(inspect.Config(store=str(folder))) == bool(store.broken_columns())
        said["problems"] = verify(store).problems
    return said


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(len(a[k]) == len(b[k]) and all(map(np.array_equal, a[k], b[k])) for k in a)


# checksums


def sign(folder: Path, path: Path) -> None:
    """Corrects the checksums of a changed file and of the files that refer to it, as an attacker would."""
    if path.name in ("images.txt", "images.npy"):
        key = "images_sha256" if path.suffix == ".txt" else "sizes_sha256"
        rewrite(folder / "manifest.json", lambda values: {**values, key: files.sha256(path.read_bytes())})
        sign(folder, folder / "manifest.json")
    elif path.suffix == ".npy" and (path.parent.name == "crops" or path.name.startswith("codes-")):
        rewrite(path.with_suffix(".json"), lambda values: {**values, "file": files.sha256(path.read_bytes())})
    elif path.suffix == ".npy":
        digest = files.sha256(path.read_bytes())
        rewrite(path.parent / "meta.json", lambda v: {**v, "arrays": {**v["arrays"], path.stem: digest}})
        sign(folder, path.parent / "meta.json")
    elif path.name == "manifest.json":
        values = json.loads(path.read_bytes())
        values.pop("sha256", None)
        digest = files.sha256(files.canonical(values))
        for sidecar in [*folder.glob("crops/*.json"), *folder.glob("targets/*/codes-*.json")]:
            rewrite(sidecar, lambda v: {**v, "manifest": digest})
    elif path.name == "meta.json":
        values = json.loads(path.read_bytes())
        values.pop("sha256", None)
        for sidecar in path.parent.glob("*-*.json"):
            rewrite(sidecar, lambda v: {**v, "column": files.sha256(files.canonical(values))})


def rewrite(path: Path, change: Any) -> None:
    """Changes a JSON file and corrects its checksums."""
    if path.stat().st_size >= LARGEST:
        return
    values = json.loads(path.read_bytes())
    values.pop("sha256", None)
    values = change(values)
    text = files.canonical({**values, "sha256": files.sha256(files.canonical(values))}) if isinstance(values, dict) else b"[]"
    path.write_bytes(text)


# mutations: each changes a store, and returns whether the checksums are correct

VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    15,
    17,
    64,
    2**16,
    2**20,
    2**31,
    2**63,
    2**64 + 1,
    10**400,
    -(10**400),
    0.5,
    16.0,
    1e308,
    1e-320,
    "",
    "16",
    "..",
    "../outside",
    "/etc/passwd",
    "a/b",
    "\ud800",
    "\0",
    "x" * 5000,
    "Flat",
    "SQ4",
    "SQ8",
    "PQ4x12",
    "PQ16x4",
    "OPQ4,PQ4x4",
    "PCA8,SQ4",
    "PCA9999,Flat",
    "IVF1,Flat",
    "0" * 64,
    [],
    {},
    [0],
    [[0]],
    {"a": 1},
    ["0" * 64] * 3,
    [0.5] * 3,
]
HEADERS = [
    "{{'descr': '{d}', 'fortran_order': {f}, 'shape': {s}, }}",
    "{{'descr': '{d}', 'fortran_order': {f}, 'shape': {s}, 'more': 1}}",
    "{{'descr': [('top', '{d}'), ('left', '{d}')], 'fortran_order': {f}, 'shape': {s}, }}",
    "{{'descr': '{d}', 'shape': {s}}}",
    "__import__('os').system('touch ran')",
]
DTYPES = ["<f4", ">f4", "<f8", "|u1", "|O", "|V20", "|S5", "<U9", "|b1", "<M8[ns]", "<c8", "4<f4", "(2,)<f4", "?"]
SHAPES = [
    "(2, 16)",
    "(2, 8)",
    "(4, 3)",
    "(2, 3)",
    "(6,)",
    "(4, 3, 16)",
    "()",
    "(0,)",
    "(-1,)",
    "(4611686018427387904, 4)",
    "(10000000000000000000000, 0)",
    "(4, 3, 0)",
    "(True, 16)",
    "(1000000000,)",
    "((2,), 16)",
    "(" * 90 + ")" * 90,
]


def store_files(folder: Path) -> list[Path]:
    """Returns the files that a mutation can read; `cut` can make a file with a terabyte of holes."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size < LARGEST)


def flip(draw: Any, folder: Path) -> bool:
    path = draw(st.sampled_from(store_files(folder)))
    data = bytearray(path.read_bytes())
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    path.write_bytes(data)
    return False


def flip_and_sign(draw: Any, folder: Path) -> bool:
    path = draw(st.sampled_from([path for path in store_files(folder) if path.suffix != ".json"]))
    data = bytearray(path.read_bytes())
    for _ in range(draw(st.integers(1, 8))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    path.write_bytes(data)
    sign(folder, path)
    return True


def cut(draw: Any, folder: Path) -> bool:
    path = draw(st.sampled_from(store_files(folder)))
    os.truncate(path, draw(st.integers(0, 2 * path.stat().st_size) | st.sampled_from([2**26, 2**34, 2**40])))
    return False


def remove(draw: Any, folder: Path) -> bool:
    path = draw(st.sampled_from(sorted(folder.rglob("*"))))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return False


def swap(draw: Any, folder: Path) -> bool:
    first, second = (draw(st.sampled_from(store_files(folder))) for _ in range(2))
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b), second.write_bytes(a)
    return False


def mutate_json(draw: Any, folder: Path) -> bool:
    path = draw(st.sampled_from([path for path in store_files(folder) if path.suffix == ".json"]))

    def change(values: Any) -> Any:
        place = values
        while True:
            keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
            what = draw(st.sampled_from(["replace", "replace", "delete", "add", "deeper"]))
            if not keys or what == "add":
                value = draw(st.sampled_from(VALUES))
                if isinstance(place, list):
                    place.append(value)
                else:
                    place[draw(st.sampled_from(["more", "..", "../x", "teacher-x", "ranges", "\ud800"]))] = value
                return values
            key = draw(st.sampled_from(keys))
            if what == "deeper" and isinstance(place[key], (dict, list)):
                place = place[key]
                continue
            if what == "delete":
                del place[key]
            else:
                value = draw(st.sampled_from(VALUES))
                place[key] = value
            return values

    rewrite(path, change)
    sign(folder, path)
    return True


def raw_json(draw: Any, folder: Path) -> bool:
    path = draw(st.sampled_from([path for path in store_files(folder) if path.suffix == ".json"]))
    depth = draw(st.sampled_from([10, 900, 1100, 20_000, 3_000_000]))
    text = draw(
        st.sampled_from(
            [
                "[" * depth,
                "[" * depth + "]" * depth,
                '{"a":' * depth + "1" + "}" * depth,
                "9" * depth,
                f"[{'9' * depth}]",
                '{"a":' + "9" * depth + "}",
                '{"a":NaN}',
                '{"a":1e999}',
                '{"a":-Infinity,"sha256":"0"}',
                '{"a":[' + "{}," * depth + "1]}",
                '"' + "x" * depth + '"',
                "",
                "\0",
                "nul",
                '{"a":1,"a":2}',
            ]
        )
    )
    path.write_text(text)
    return False


def header(draw: Any, folder: Path) -> bool:
    path = draw(st.sampled_from([path for path in store_files(folder) if path.suffix == ".npy"]))
    data = path.read_bytes()
    template, kind, shape = (draw(st.sampled_from(choices)) for choices in (HEADERS, DTYPES, SHAPES))
    text = template.format(d=kind, f=draw(st.sampled_from(["False", "True", "1"])), s=shape)
    text = text.ljust(draw(st.sampled_from([118, 118, 70, 6000, 65000]))) + "\n"
    body = data[10 + int.from_bytes(data[8:10], "little") :]
    version = draw(st.sampled_from([b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\7\7"]))
    path.write_bytes(b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode() + body)
    sign(folder, path)
    return True


def numbers(draw: Any, folder: Path) -> bool:
    """NaN, infinities and huge values in a codec's parameters or codes."""
    path = draw(st.sampled_from(sorted(folder.glob("targets/*/*.npy"))))
    data = bytearray(path.read_bytes())
    value = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0, 1e-45]))
    for position in draw(st.lists(st.integers(0, (len(data) - 128) // 4 - 1), min_size=1, max_size=30)):
        start = len(data) % 4 + 128 + 4 * position
        data[start : start + 4] = np.float32(value).tobytes()[: len(data) - start]
    path.write_bytes(data)
    sign(folder, path)
    return True


def lines(draw: Any, folder: Path) -> bool:
    path = folder / "images.txt"
    rows = path.read_bytes().split(b"\n")
    line = draw(
        st.sampled_from([b"..", b"../outside/images.txt", b"/etc/passwd", b"", b".", b"a//b", b"C:x", b"a\\b", b"\xff", b"a\0"])
    )
    rows[draw(st.integers(0, len(rows) - 1))] = line
    path.write_bytes(b"\n".join(rows))
    sign(folder, path)
    return True


def replace(draw: Any, folder: Path) -> bool:
    """A link to the correct file elsewhere, a pipe without a writer, a device, a folder."""
    path = draw(st.sampled_from(sorted(folder.rglob("*"))))
    outside = folder.parent.parent / "outside" / path.relative_to(folder)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    what = draw(st.sampled_from(["link", "link", "relative", "pipe", "device", "folder", "loop", "dangling"]))
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        to = {
            "link": outside,
            "device": "/dev/zero",
            "loop": path,
            "dangling": "/nowhere",
            "relative": os.path.relpath(outside, path.parent),
        }
        path.symlink_to(to[what])
    return False


def holes(draw: Any, folder: Path) -> bool:
    """A million crops per image, as headers and holes."""
    rewrite(folder / "manifest.json", lambda values: {**values, "crops_per_image": 10**6})
    sign(folder, folder / "manifest.json")
    for path in [*folder.glob("crops/*.npy"), *folder.glob("targets/*/codes-*.npy")]:
        found = np.load(path, mmap_mode="r")
        shape = (found.shape[0], 10**6, *found.shape[2:])
        data = files.npy_header(found.dtype, shape)
        path.write_bytes(data)
        os.truncate(path, len(data) + int(np.prod(shape)) * found.dtype.itemsize)
    return True


MUTATIONS = [
    flip,
    flip_and_sign,
    cut,
    remove,
    swap,
    mutate_json,
    mutate_json,
    mutate_json,
    raw_json,
    header,
    header,
    numbers,
    lines,
    replace,
]


FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=EXAMPLES <= 300,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


def mutated(original: Path, data: Any) -> tuple[Path, list[bool]]:
    """Returns a copy of the store with one or two changes, and which of them have correct checksums."""
    folder = original.parent / "examples" / "store"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(original, folder)
    signed = [data.draw(st.sampled_from(MUTATIONS), label="mutation")(data.draw, folder)]
    if data.draw(st.integers(0, 3)) == 0:
        with contextlib.suppress(IndexError, ValueError, OSError, KeyError, TypeError, RecursionError):  # unusable
            signed.append(data.draw(st.sampled_from(MUTATIONS), label="another")(data.draw, folder))
    return folder, signed


@FUZZ
@given(st.data())
def test_every_store_is_refused_or_reads_right(original: Path, data: Any) -> None:
    folder, signed = mutated(original, data)
    said = None
    with guarded(folder), contextlib.suppress(StoreError):
        said = read(folder)
    if said is not None and not any(signed) and not said.pop("problems"):
        whole = read(original)
        whole.pop("problems")
        for name in set(whole) - set(said):  # a whole column that was removed is no longer there
            whole.pop(name)
        assert same(said, whole)


@FUZZ
@given(st.data())
def test_a_part_of_every_store_is_refused_or_right(original: Path, data: Any) -> None:
    """Subset, and recode into a new store: they check everything that they copy."""
    folder, signed = mutated(original, data)
    name = data.draw(st.sampled_from(NAMES))  # not guarded: hypothesis reads the sources of modules
    out = folder.parent / "out"
    out.mkdir()
    done = []
    with (
        guarded(folder, out),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        patch.setattr(
            faiss_codecs, "threadpool_limits", lambda _: contextlib.nullcontext()
        )  # it lists the libraries of the process
        with contextlib.suppress(StoreError, RequestError):
            done.append(subset(open_store(folder), out / "part", crops=2))
        with contextlib.suppress(StoreError, RequestError):
            done.append(
                recode(open_store(folder), "smoothing" if is_label(name) else "SQ6", column=name, out=out / "small").store
            )
    for store in done:
        with contextlib.suppress(StoreError), guarded(store.folder):
            read(store.folder)
        # from a store without columns only the crops are copied, and verify reports that there is no teacher
        assert any(signed) or not store.column_names or not verify(open_store(store.folder)).problems


def test_a_million_crops_in_holes_are_read_one_by_one(original: Path) -> None:
    folder = original.parent / "examples" / "store"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(original, folder)
    holes(None, folder)
    with guarded(folder):
        store = open_store(folder)
        assert store.crops(5, np.array([999_999, 0, 1])).shape == (3,)
        assert store.targets("flat", 5, np.array([999_999, 0])).tolist() == [[0.0] * made.DIM] * 2


@pytest.mark.parametrize(
    ("action", "seen_as"),
    [
        (lambda folder: Path("/etc/passwd").read_bytes(), "open /etc/passwd"),
        (lambda folder: list(Path("/etc").iterdir()), "(listdir|scandir) /etc"),
        (lambda folder: (folder / "new").write_bytes(b""), "writes .*new"),
        (lambda folder: os.system("true"), "os.system"),  # noqa: S605, S607
    ],
)
def test_the_guard_sees_what_is_opened_outside_and_what_is_run(tmp_path: Path, action: Any, seen_as: str) -> None:
    with pytest.raises(AssertionError, match=seen_as), guarded(tmp_path):
        action(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_the_guard_bounds_memory(tmp_path: Path) -> None:
    with pytest.raises(MemoryError), guarded(tmp_path):
        np.ones(2 * ROOM, dtype=np.uint8)


def listed(draw: Any, text: bytes) -> bytes:
    """A list of files with other sizes, digests, paths or lines."""
    first, *lines, _ = text.decode().split("\n")
    k = draw(st.integers(0, len(lines) - 1))
    digest, size, path = lines[k].split()
    size = draw(st.sampled_from([size, size, "0", str(int(size) + 1), str(2**27), str(2**50), "9" * 40, "-1", "x"]))
    digest = draw(st.sampled_from([digest, digest, "0" * 64, "", "x" * 64]))
    other = draw(st.sampled_from(lines)).split()[2]
    path = draw(st.sampled_from([path, path, other, "../evil", "/evil", "crops", "crops/../evil", f"{other}/x", "a" * 300, ""]))
    lines[k : k + 1] = [f"{digest} {size} {path}"] * draw(st.sampled_from([1, 1, 0, 2]))
    total = sum(int(line.split()[1]) for line in lines if line.split()[1:2] and line.split()[1].isdecimal())
    if draw(st.booleans()):
        first = f"fkd_ssl files 1 {len(lines)} {total}"
    return "\n".join([first, *lines, ""]).encode()


def read_published(place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any] | None, Path]:
    """Reads the store at memory://set with an empty cache; None if it is refused. Also returns the cache."""
    cache = place / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    (cache / "fetched").mkdir(parents=True)
    monkeypatch.setenv("FKD_SSL_CACHE", str(cache))
    monkeypatch.setenv("FKD_SSL_CACHE_BYTES", str(2**28))
    monkeypatch.setattr(fetching, "PAUSE", 0)
    monkeypatch.setattr(remote, "_FETCHERS", 2)  # each thread takes address space
    with guarded(cache, cache), contextlib.suppress(StoreError, RequestError):
        return read("memory://set"), cache
    return None, cache


@settings(FUZZ, max_examples=max(30, EXAMPLES // 5))
@given(st.data())
def test_every_published_store_is_refused_or_reads_right(original: Path, monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    """A server with a mutated store and a list of its files, which an attacker made."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    folder, signed = mutated(original, data) if data.draw(st.integers(0, 3)) else (original, [])
    there = [path for path in store_files(folder) if not path.is_symlink()]
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in there}
    text = FileList({path: (len(text), files.sha256(text)) for path, text in contents.items()}).encode()
    if folder == original or not data.draw(st.integers(0, 3)):
        text = listed(data.draw, text)
        signed = [True]
    for path, content in {**contents, INDEX: text}.items():
        memory.pipe_file(f"/set/{path}", content)
    said, _ = read_published(original.parent, monkeypatch)
    if said is not None and not any(signed) and not said.pop("problems"):
        whole = read(original)
        whole.pop("problems")
        for name in set(whole) - set(said):
            whole.pop(name)
        assert same(said, whole)


INVENTED = [
    *("images-00001.json", "images-00001.txt", "images-00001.npy", "images-00001.exe", "images-99999.json", "images-1.json"),
    *("images.txt.json", "images", "IMAGES.TXT", "manifest.json.part", "manifest", "crops/00002.npy", "crops/00002.json"),
    *("crops/99999999999999999999.npy", "crops/00000", "crops/00000.npy.json", "crops/1/2.npy", "CROPS/00000.npy", "crops"),
    *("targets/evil/meta.json", "targets/evil/codes-00000.npy", "targets/flat/codes-00009.json", "targets/flat/codes-x.npy"),
    *("targets/flat/a/b.npy", "targets/a/b/c/d/e.npy", "targets/flat/meta.json/x", "targets/.work-flat-sample", "targets"),
    *("..", ".", "../evil", "crops/../../evil", "/etc/passwd", "//evil", "./manifest.json", "crops//00000.npy", "~/evil"),
    *("%2e%2e/evil", "..%2fevil", "crops/%2e%2e/evil", "a%00b", "C:evil", "a\\b", "a b", "a\tb", "a\rb", "\u202etxt", "ä.npy"),
    *("a" * 119, "a" * 120, "a" * 121, "a" * 300, "/".join("a" * 100 for _ in range(4)), "a/" * 3000 + "a", "x.lock", "x.part"),
    *("files.txt", "files.txt/a", "README.md", "bytes", "bytes/a", ".bytes", ".hidden", "-rf", "con", "nul.json", "a.", "a..b"),
]
"""Names of files that no store has, or that are no paths inside it."""


@settings(FUZZ, max_examples=max(60, EXAMPLES // 3))
@given(st.data())
def test_every_name_that_a_server_invents_is_refused_or_ignored(
    original: Path, monkeypatch: pytest.MonkeyPatch, data: Any
) -> None:
    """The other files are intact, so that a store that opens reads right."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    contents = {path.relative_to(original).as_posix(): path.read_bytes() for path in store_files(original)}
    known = data.draw(st.sampled_from(sorted(contents)), label="content of")
    names = data.draw(st.lists(st.sampled_from(INVENTED), min_size=1, max_size=3, unique=True), label="names")
    invented = dict.fromkeys(names, data.draw(st.sampled_from([contents[known], b"", b"{}", b"x" * 2**20]), label="content"))
    text = FileList({path: (len(text), files.sha256(text)) for path, text in {**contents, **invented}.items()})
    for path, content in {**contents, INDEX: text.encode()}.items():
        memory.pipe_file(f"/set/{path}", content)
    for path, content in invented.items():
        memory.store.setdefault(f"/set/{path}", type(memory.store[f"/set/{INDEX}"])(memory, f"/set/{path}", content))
    said, cache = read_published(original.parent, monkeypatch)
    assert not (original.parent / "evil").exists()
    kept = {path.name for path in cache.rglob("*") if path.is_file() and path.suffix not in (".lock", ".part")}
    assert not kept & {"images-00001.exe", "IMAGES.TXT", "manifest", "images", "README.md", "con", "a" * 119, "2.npy", "b.npy"}
    if said is not None and not said.pop("problems"):
        whole = read(original)
        whole.pop("problems")
        assert same(said, whole)
