"""Images in tars, in tables and in lists of files: the same images are the same set."""

import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fkd_ssl.errors import ImageAccessError, ImageError, RequestError
from fkd_ssl.images import ImageSource, absolute, open_images, scan
from fkd_ssl.images import tars as tars_module
from fkd_ssl.images.decoding import read_bytes

INVALID_TEXT = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(bytes(4) + b"\1\0\0\0"), pa.py_buffer(b"\xff")])
HUGGING_FACE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FKD_SSL_CACHE", str(folder))
    return folder


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in dict(members).items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    os.utime(path, (time.time() - 100, time.time() - 100))
    return path


def contents(source: ImageSource) -> dict[str, bytes]:
    return {name: source.read(k) for k, name in enumerate(source.names)}


def table(source: ImageSource, rows: Iterable[int], **columns: Any) -> pa.Table:
    images = [{"bytes": source.read(k), "path": source.names[k]} for k in rows]
    return pa.table({"image": pa.array(images, type=HUGGING_FACE), **columns})


def as_tars(source: ImageSource, folder: Path) -> str:
    """Three tars, with the images dealt out in turn."""
    for k in range(3):
        write_tar(
            folder / f"{k:02d}.tar", {name: data for i, (name, data) in enumerate(contents(source).items()) if i % 3 == k}
        )
    return f"{folder}/{{00..02}}.tar"


def as_parquet(source: ImageSource, folder: Path) -> str:
    for k in range(2):
        pq.write_table(table(source, range(k, len(source), 2)), folder / f"train-{k:05d}-of-00002.parquet", row_group_size=5)
    return str(folder)


def as_arrow(source: ImageSource, folder: Path) -> str:
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file:
        rows = table(source, reversed(range(len(source))))
        with pa.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=7)
    (folder / "state.json").write_text("{}")
    return str(folder)


def as_list(source: ImageSource, folder: Path) -> str:
    (folder / "all.txt").write_text("".join(f"{source.where(k)}\n" for k in reversed(range(len(source)))))
    return f"{folder}/all.txt"


FORMS = {"tars": as_tars, "parquet": as_parquet, "arrow": as_arrow, "list": as_list}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_images_are_the_same_set(image_folder: Path, tmp_path: Path, form: str) -> None:
    folder = scan(image_folder)
    source = open_images(FORMS[form](folder, tmp_path))
    assert source.names == folder.names
    assert (source.labels.tolist(), source.classes) == (folder.labels.tolist(), folder.classes)
    assert contents(source) == contents(folder)
    assert source.digest() == folder.digest()
    assert source.identity() == folder.identity()
    assert [source.size(k) for k in range(len(source))] == [folder.size(k) for k in range(len(source))]
    assert source.names[4] in source.where(4)


@pytest.mark.parametrize("form", ["tars", "parquet", "arrow"])
def test_forked_workers_read(image_folder: Path, tmp_path: Path, form: str) -> None:
    source = open_images(FORMS[form](scan(image_folder), tmp_path))
    first = source.read(3)
    loader = torch.utils.data.DataLoader(_Bytes(source), batch_size=None, num_workers=2)  # type: ignore[arg-type,var-annotated]
    assert list(loader) == [source.read(k) for k in range(len(source))]
    assert source.read(3) == first


class _Bytes(torch.utils.data.Dataset[bytes]):
    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> bytes:
        return self.source.read(index)


def test_groups_are_the_tars_and_the_row_groups(image_folder: Path, tmp_path: Path) -> None:
    folder = scan(image_folder)
    source = open_images(as_tars(folder, tmp_path))
    assert [source.group(k) for k in range(6)] == [0, 1, 2, 0, 1, 2]
    source = open_images(as_parquet(folder, tmp_path))
    assert len({source.group(k) for k in range(24)}) == 6  # 12 rows in each file, in groups of 5, 5, 2


# tars ------------------------------------------------------------------------------------------------------------------


def test_labels_of_webdataset(image_folder: Path, tmp_path: Path) -> None:
    data = scan(image_folder).read(0)
    members = {"0001.jpg": data, "0001.cls": b"7\n", "0002.v2.png": data, "0002.cls": b"3", "0003.jpg": data}
    source = open_images(write_tar(tmp_path / "a.tar", members))
    assert source.names == ["0001.jpg", "0002.v2.png", "0003.jpg"]
    assert source.labels.tolist() == [7, 3, -1]  # numbers stay what they are
    assert source.classes == [str(k) for k in range(8)]


@pytest.mark.parametrize(
    ("member", "text", "label"),
    [
        ("json", '{"label": 2, "other": [1]}', "2"),
        ("json", '{"cls": "fox"}', "fox"),
        ("json", '{"width": 3}', ""),
        ("json", "5", "5"),
        ("cls", "wolf", "wolf"),
        ("cls", "-1", ""),
        ("json", '{"label": -1}', ""),
        ("json", '{"label": "\\ud800"}', ""),  # a lone surrogate, which no file can store
        ("json", '{"label": "007"}', "7"),
        ("txt", "-1", ""),
        ("txt", "two\rlines", ""),
        ("txt", "a dog", "a dog"),
        ("txt", "a long caption " * 20, ""),
    ],
)
def test_a_member_that_holds_the_class(image_folder: Path, tmp_path: Path, member: str, text: str, label: str) -> None:
    images = {"a/x.jpg": scan(image_folder).read(0), f"a/x.{member}": text.encode(), "y.jpg": b"", "y.cls": b"0"}
    source = open_images(write_tar(tmp_path / "a.tar", images))
    assert source.class_of(source.names.positions(["a/x.jpg"])[0]) == label


def test_the_index_is_kept_until_the_tar_changes(
    image_folder: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars_module, "_SETTLED", -10)
    path = write_tar(tmp_path / "a.tar", contents(scan(image_folder)))
    made: list[str] = []
    monkeypatch.setattr(tars_module, "_read_index", _recording(tars_module._read_index, made))
    first = open_images(path)
    second = open_images(path)
    assert (made, second.names) == ([str(path)], first.names)
    assert contents(second) == contents(first)
    [kept] = (cache / "tars").iterdir()
    whole, other = kept.read_bytes(), io.BytesIO()
    np.savez(other, spans=np.zeros((len(first), 2)), **{key: np.zeros(0, dtype=np.uint8) for key in ("names", "labels")})
    damages = (b"", b"damaged", whole[:-30], whole[:200] + bytes([whole[200] ^ 255]) + whole[201:], other.getvalue())
    for k, damage in enumerate(damages):
        kept.write_bytes(damage)
        assert contents(open_images(path)) == contents(first)
        assert len(made) == k + 2
    kept.unlink()
    os.mkfifo(kept)  # reading it would never end
    assert contents(open_images(path)) == contents(first)
    made.clear()
    write_tar(path, dict(list(contents(first).items())[:3]))
    assert len(open_images(path)) == 3
    assert len(made) == 1


def _recording(function: Callable[[Any], Any], calls: list[str]) -> Callable[[Any], Any]:
    def call(shard: Any) -> Any:
        calls.append(shard.name)
        return function(shard)

    return call


def test_a_tar_that_changes_while_it_is_used(image_folder: Path, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", contents(scan(image_folder)))
    source = open_images(path)
    os.utime(path)
    with pytest.raises(ImageAccessError, match=r"a\.tar: the tar changed while it was in use; run the command again"):
        source.read(0)


def _cut(path: Path, size: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:size])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: _cut(path, 700), "truncated|ends within"),  # in the data of the first member
        (lambda path: _cut(path, path.stat().st_size // 2), "truncated|ends within"),
        (lambda path: _cut(path, _offset(path, 9) + 100), "truncated or damaged at byte"),
        (lambda path: _cut(path, _offset(path, 9)), "truncated or damaged at byte"),
        (lambda path: _overwrite(path, _offset(path, 9)), "truncated or damaged at byte"),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(600)), "a compressed tar cannot be read by position; decompress"),
        (lambda path: path.write_bytes(b"no tar" * 200), "not a readable tar"),
        (lambda path: path.write_bytes(b""), "not a readable tar"),
        (lambda path: write_tar(path, {"a.txt": b"b"}), "no images in this tar"),
        (lambda path: write_tar(path, [("a.jpg", b"1"), ("./a.jpg", b"2")]), r"1 names are used by several .*\n.*a\.jpg in"),
        (lambda path: write_tar(path, {"../a.jpg": b""}), "are absolute, or have"),
        (lambda path: write_tar(path, {"/a.jpg": b""}), "are absolute, or have"),
        (lambda path: write_tar(path, {"a\nb.jpg": b""}), "control characters"),
        (lambda path: write_tar(path, {"a\udcff.jpg": b""}), "invalid UTF-8; rename them:\n.*udcff"),
        (lambda path: _huge(path, "x.jpg", tarfile.XHDTYPE), r"not a readable tar \(a header of 17,179,869,184 bytes"),
        (lambda path: _huge(path, "x.jpg", tarfile.GNUTYPE_LONGNAME), r"not a readable tar \(a header of 17,179,869,184 bytes"),
        (lambda path: write_tar(path, {"a.jpg": b"", "a.cls": b"\xff"}), r"a\.cls: not readable as the class of an image"),
        (lambda path: write_tar(path, {"a.jpg": b"", "a.json": b"{"}), r"a\.json: not readable as the class of an image"),
    ],
)
def test_a_bad_tar_is_named(image_folder: Path, tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    path = write_tar(tmp_path / "a.tar", contents(scan(image_folder)))
    harm(path)
    with pytest.raises(RequestError, match=message) as caught:
        open_images(path)
    assert str(path) in str(caught.value)


def _huge(path: Path, name: str, kind: bytes = tarfile.REGTYPE) -> Path:
    """Writes a tar whose member claims 16 GiB, as a sparse file."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, 2**34
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 2**34 + 10_240)
    return path


def test_a_member_that_is_too_large_for_an_image(tmp_path: Path) -> None:
    source = open_images(_huge(tmp_path / "a.tar", "x.jpg"))
    with pytest.raises(ImageError, match=r"a\.tar: x\.jpg: 17,179,869,184 bytes; an image may have 2,147,479,552 at most"):
        source.read(0)
    (tmp_path / "large.jpg").touch()
    os.truncate(tmp_path / "large.jpg", 2**34)
    with pytest.raises(ImageError, match=r"large\.jpg: 17,179,869,184 bytes"):
        read_bytes(tmp_path / "large.jpg")


def _offset(path: Path, member: int) -> int:
    with tarfile.open(path) as tar:
        return tar.getmembers()[member].offset


def _overwrite(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"x" * 512)


def test_members_of_two_tars_with_one_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"x/1.jpg": b"1", f"x/{name}.jpg": b"2"})
    with pytest.raises(RequestError, match=r"1 names are used by several images.*\n.*x/1\.jpg in .*b\.tar"):
        open_images(str(tmp_path / "*.tar"))


def test_links_and_folders_in_a_tar_are_no_images(tmp_path: Path, image_folder: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(image_folder, arcname=".")
        link = tarfile.TarInfo("ash/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert open_images(tmp_path / "a.tar").names == scan(image_folder).names


# patterns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("{0..2}.tar", "0 1 2"),
        ("0{0..1}.tar", "00 01"),
        ("{08..10}.tar", "08 09 10"),
        ("{a,b}.tar", "a b"),
        ("?.tar", "0 1 2 a b"),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, found: str) -> None:
    for name in ["0", "1", "2", "00", "01", "08", "09", "10", "a", "b"]:
        write_tar(tmp_path / f"{name}.tar", {f"{name}.jpg": b""})
    assert open_images(f"{tmp_path}/{pattern}").names == [f"{name}.jpg" for name in found.split()]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..3}.tar", r"0\.tar: no such file"),
        ("*.tar", r"\*\.tar: matches no file"),
        ("{0..99999999}.tar", "more than 1,000,000 files"),
        ("{5..2}.tar", "names no files"),
        ("{0..2000}{0..2000}.tar", "more than 1,000,000 files"),
        ("a.tar", "no such file"),
        ("a.txt", "cannot be read: No such file"),
    ],
)
def test_a_pattern_without_files(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises((RequestError, ImageAccessError), match=message):
        open_images(f"{tmp_path}/{pattern}")


def test_a_pattern_longer_than_a_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"00\.tar: no such file"):
        open_images(f"{tmp_path}/{{{','.join(f'{k:02d}' for k in range(100))}}}.tar")
    with pytest.raises(RequestError, match="no such folder of images"):
        open_images("x" * 5000)
    with pytest.raises(RequestError, match="the name of the folder is empty"):
        open_images("")


def test_absolute_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for spec in ("a", "x/{0..9}.tar", "x/*.parquet#image=a"):
        assert absolute(spec) == f"{tmp_path}/{spec}"
    for spec in ("cifar10:train:data", "module:function", "imagenet:val:x.tar", f"{tmp_path}/a"):
        assert absolute(spec) == spec


def test_a_folder_of_images_beside_tars_is_a_folder_of_images(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ash").symlink_to(image_folder / "ash")
    write_tar(tmp_path / "a.tar", {"a.jpg": b""})
    assert len(open_images(tmp_path)) == 8
    (tmp_path / "ash").unlink()
    assert open_images(tmp_path).names == ["a.jpg"]


# tables ----------------------------------------------------------------------------------------------------------------


def test_columns_of_a_table(image_folder: Path, tmp_path: Path) -> None:
    source, path = scan(image_folder), tmp_path / "a.parquet"
    ids, kinds = [f"id{k:02d}.jpg" for k in range(6)], [f"kind {k % 2}" for k in range(6)]
    pq.write_table(table(source, range(6), id=ids, kind=kinds, label=[9, 5, -1, None, 5, 5]), path)
    plain = open_images(path)
    assert plain.names == source.names[:6]
    assert plain.labels.tolist() == [9, 5, -1, -1, 5, 5]
    chosen = open_images(f"{path}#name=id,label=kind,image=image")
    assert (chosen.names, chosen.labels.tolist(), chosen.classes) == (ids, [0, 1] * 3, ["kind 0", "kind 1"])
    assert chosen.read(2) == source.read(2)


def test_a_binary_column_has_names_by_position(image_folder: Path, tmp_path: Path) -> None:
    source = scan(image_folder)
    pq.write_table(pa.table({"jpg": [source.read(0), source.read(1)]}), tmp_path / "b.parquet")
    found = open_images(tmp_path / "b.parquet")
    assert (found.names, found.labels.tolist()) == (["b/00000000", "b/00000001"], [0, 0])
    assert found.pixels(1).shape == source.pixels(1).shape


def test_class_names_of_hugging_face(image_folder: Path, tmp_path: Path) -> None:
    rows = table(scan(image_folder), range(3), label=[2, 0, 2])
    features = {"label": {"names": ["zebra", "ant", "cow"], "_type": "ClassLabel"}}
    rows = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(rows, tmp_path / "a.parquet")
    found = open_images(tmp_path / "a.parquet")
    assert (found.labels.tolist(), found.classes) == ([2, 0, 2], ["zebra", "ant", "cow"])


@pytest.mark.parametrize(
    ("columns", "spec", "message"),
    [
        ({"a": [1]}, "", r"no column has images \(\['a'\]\)"),
        ({"a": [b"1"], "b": [b"2"]}, "", r"several columns can hold images \(a, b\); choose one with #image=COLUMN"),
        ({"a": [b"1"], "c": [2]}, "#image=c", "column 'c' is int64; expected encoded images as binary"),
        ({"a": [b"1"]}, "#image=b", "no column 'b'.*; it has a"),
        ({"a": [b"1"]}, "#label=b", "no column 'b'.*; it has a"),
        ({"a": [b"1"]}, "#picture=a", "unknown column option 'picture'.*; known: image, label, name"),
        ({"a": [b"1"]}, "#image", "expected columns as #image=COLUMN"),
        ({"a": [b"1", b"2"], "n": ["x", "x"]}, "#name=n", "1 names are used by several rows"),
        ({"a": [b"1"], "n": ["../x"]}, "#name=n", "are absolute, or have"),
        ({"a": [b"1"], "n": [1.0]}, "#name=n", "column 'n' is double; expected integers or text"),
        ({"a": [b"1"], "n": [[1]]}, "#label=n", "column 'n' is list<.*>; expected integers or text"),
        ({"a": [b"1"], "label": ["x\0"]}, "", "1 names of classes have control characters"),
        ({"a": [{"bytes": 2**40, "path": "x.jpg"}]}, "", r"no column has images \(\['a'\]\)"),
        ({"a": [b"1"], "label": INVALID_TEXT}, "", "not a readable table .*decode"),
        ({"a": [b"1"], "n": ["x\ny"]}, "#name=n", "control characters"),
        ({"a": pa.array([], pa.binary())}, "", "has no rows"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, columns: dict[str, Any], spec: str, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=message):
        open_images(f"{tmp_path}/a.parquet{spec}")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("data", [b"", b"PAR1" * 100, b"ARROW1" * 100])
def test_a_damaged_table_is_named(tmp_path: Path, suffix: str, data: bytes) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(data)
    with pytest.raises(RequestError, match=rf"a\.{suffix}: not a readable table"):
        open_images(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_pipe_is_not_a_table(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"a.{suffix}")  # reading it would never end
    with pytest.raises(ImageAccessError, match=rf"a\.{suffix}: not a regular file"):
        open_images(tmp_path / f"a.{suffix}")


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [bytes(range(256)) * 10, bytes(3000)], "label": [1, 2]}), path, compression="gzip")
    data = path.read_bytes()
    path.write_bytes(data[:60] + b"x" * 100 + data[160:])
    with pytest.raises(ImageError, match=r"a\.parquet: a/00000000: its row group is damaged"):
        open_images(path).read(0)


def test_positions_that_lead_out_of_an_arrow_file(tmp_path: Path) -> None:
    rows = pa.table({"a": [b"first", b"second"]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)
    data = (tmp_path / "a.arrow").read_bytes()
    wanted = np.array([0, 5, 11], dtype=np.int32).tobytes()
    assert data.count(wanted) == 1
    (tmp_path / "a.arrow").write_bytes(data.replace(wanted, np.array([0, 2**30, 2**30 + 6], dtype=np.int32).tobytes()))
    with pytest.raises(RequestError, match=r"a\.arrow: not a readable table"):
        open_images(tmp_path / "a.arrow")


def test_a_label_column_of_floats_is_left_out(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [b"1", b"2"], "label": [10.0, 2.0], "cls": ["x", "y"]}), tmp_path / "a.parquet")
    source = open_images(tmp_path / "a.parquet")
    assert source.classes == ["x", "y"]
    assert source.notes == ["column 'label' is double, and classes are integers or text; it is ignored"]
    repeated = pa.Table.from_arrays([pa.array([b"1"]), pa.array([1]), pa.array([2])], names=["a", "label", "label"])
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_stream(file, repeated.schema) as writer:
        writer.write_table(repeated)
    with pytest.raises(RequestError, match=r"b\.arrow: several columns are named 'label'"):
        open_images(tmp_path / "b.arrow")


def test_a_row_without_an_image(tmp_path: Path, image_folder: Path) -> None:
    images = pa.array([{"bytes": None, "path": "a.jpg"}], type=HUGGING_FACE)
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    with pytest.raises(ImageError, match=r"a\.parquet: a\.jpg: the row has no image bytes"):
        open_images(tmp_path / "a.parquet").read(0)


def test_a_table_that_changes_while_it_is_used(image_folder: Path, tmp_path: Path) -> None:
    pq.write_table(table(scan(image_folder), range(3)), tmp_path / "a.parquet")
    source = open_images(tmp_path / "a.parquet")
    os.utime(tmp_path / "a.parquet", (1, 1))
    with pytest.raises(ImageAccessError, match="the file changed while it was in use"):
        source.read(0)


def test_splits_of_a_folder_are_named(image_folder: Path, tmp_path: Path) -> None:
    for split in ("test", "train"):
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table(scan(image_folder), range(3)), tmp_path / f"data/{split}-00000-of-00001.parquet")
    with pytest.raises(RequestError, match=r"holds files of several splits; give one, such as .*data/test\*\.parquet"):
        open_images(tmp_path)
    assert len(open_images(f"{tmp_path}/data/train*.parquet")) == 3
    (tmp_path / "dataset_dict.json").write_text("{}")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/state.json").write_text("{}")
    with pytest.raises(RequestError, match=r"holds the splits train; give one, such as .*/train"):
        open_images(tmp_path)


# lists -----------------------------------------------------------------------------------------------------------------


def test_a_list_with_classes(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").symlink_to(image_folder)
    lines = ["in/cedar/000.jpg\tred", "./in/ash/../ash/001.jpg\tblue", "", "in/birch/002.jpg\tred\r"]
    (tmp_path / "some.tsv").write_text("\n".join(lines))
    source = open_images(tmp_path / "some.tsv")
    assert source.names == ["in/ash/001.jpg", "in/birch/002.jpg", "in/cedar/000.jpg"]
    assert (source.labels.tolist(), source.classes) == ([0, 1, 1], ["blue", "red"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no images"),
        ("a.jpg\nb.jpg\tc", "entry 2 has 1 tabs"),
        ("a.jpg\tb\tc", "entry 1 has 2 tabs"),
        ("a.jpg 3", r"'.*a\.jpg 3' is not an image by its suffix; a class is separated from the path by a tab"),
        ("a.jpg\nb/../a.jpg", r"1 names are listed more than once"),
        ("a.jpg\tb\0", r"1 names of classes have control characters"),
    ],
)
def test_a_bad_list_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(RequestError, match=message):
        open_images(tmp_path / "a.txt")


def test_a_list_of_missing_images_names_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x/a.jpg\n")
    with pytest.raises(ImageAccessError, match=r"x/a\.jpg: cannot be read: No such file"):
        open_images(tmp_path / "a.txt").identity()
