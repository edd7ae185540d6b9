"""Copies of images in tars: the same set, from any interruption."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkd_ssl.errors import ImageError, RequestError
from fkd_ssl.images import ImageSource, open_images, scan
from fkd_ssl.images.packing import TarWriter
from fkd_ssl.images.shrinking import shrink_set


class Renamed(ImageSource):
    """The images of a folder under other names, with other labels."""

    def __init__(self, folder: Path, names: list[str], labels: list[int], classes: list[str]) -> None:
        super().__init__("renamed", names, labels, classes)
        self._folder = scan(folder)

    def read(self, index: int) -> bytes:
        return self._folder.read(index)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("tars", [1, 7, 24])
def test_the_tars_are_the_same_set(image_folder: Path, tmp_path: Path, tars: int) -> None:
    images = scan(image_folder)
    done = shrink_set(images, tmp_path / "tars", short_side=0, tars=tars)
    assert (done.written, done.unreadable, done.bytes) == (24, [], done.source_bytes)
    assert [path.name for path in sorted((tmp_path / "tars").iterdir())] == [f"{k:05d}.tar" for k in range(tars)]
    copy = open_images(tmp_path / "tars")
    assert (copy.names, copy.classes, copy.labels.tolist()) == (images.names, images.classes, images.labels.tolist())
    assert [copy.read(k) for k in range(24)] == [images.read(k) for k in range(24)]
    assert [copy.group(k) for k in range(24)] == [next(n for n in range(tars) if k < 24 * (n + 1) // tars) for k in range(24)]
    shrink_set(images, tmp_path / "again", short_side=0, tars=tars)
    assert tree(tmp_path / "again") == tree(tmp_path / "tars")


def test_a_store_of_the_tars_has_the_same_bytes(image_folder: Path, tmp_path: Path, make_store: Any) -> None:
    shrink_set(scan(image_folder), tmp_path / "tars", short_side=0, tars=5)
    for name, images in (("a", image_folder), ("b", tmp_path / "tars")):
        make_store(tmp_path / name, images=images)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_shrunk_images_are_those_of_a_copy_in_files(image_folder: Path, tmp_path: Path) -> None:
    for tars in (None, 3):
        shrink_set(scan(image_folder), tmp_path / f"{tars}", short_side=40, tars=tars)
    files, packed = open_images(tmp_path / "None"), open_images(tmp_path / "3")
    assert files.names == packed.names
    assert [files.read(k) for k in range(24)] == [packed.read(k) for k in range(24)]


def test_members_follow_webdataset(image_folder: Path, tmp_path: Path) -> None:
    """An image and its .cls are neighbours, and .cls is a number."""
    shrink_set(scan(image_folder), tmp_path / "tars", short_side=0, tars=2)
    with tarfile.open(tmp_path / "tars" / "00001.tar") as tar:
        found = [(member.name, member.mtime, member.uid) for member in tar]
        labels = [tar.extractfile(name) for name, _, _ in found[1::2]]
        assert [int(label.read()) for label in labels if label is not None] == scan(image_folder).labels[12:].tolist()
    assert [name.removesuffix("jpg") for name, _, _ in found[::2]] == [name.removesuffix("cls") for name, _, _ in found[1::2]]
    assert {(time, user) for _, time, user in found} == {(0, 0)}


def test_webdataset_reads_them(image_folder: Path, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    images = scan(image_folder)
    shrink_set(images, tmp_path / "tars", short_side=0, tars=3)
    urls = [str(path) for path in sorted((tmp_path / "tars").iterdir())]
    found = [(one["__key__"], one["jpg"], one["cls"]) for one in wds.WebDataset(urls, shardshuffle=False)]
    assert found == [(images.names[k].removesuffix(".jpg"), images.read(k), str(images.labels[k]).encode()) for k in range(24)]
    assert [label for (label,) in wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("cls")] == images.labels.tolist()


def test_odd_names_and_labels(image_folder: Path, tmp_path: Path) -> None:
    """Names that are long or not ASCII, several images of one key, classes that are not folders, no class."""
    some = ["a.jpg", "a.large.jpg", f"{'deep/' * 60}b.jpg", "c/ü.b.jpg", "d.jpg"]
    names = sorted([*some, *(f"z/{k:03d}.jpg" for k in range(19))])
    labels = [2, 2, -1, 0, 1, *([1] * 19)]
    shrink_set(Renamed(image_folder, names, labels, ["x", "y", "z"]), tmp_path / "tars", short_side=0, tars=3)
    copy = open_images(tmp_path / "tars")
    assert (list(copy.names), copy.labels.tolist(), copy.classes) == (names, labels, ["0", "1", "2"])
    assert [copy.read(k) for k in range(24)] == [scan(image_folder).read(k) for k in range(24)]


def test_names_that_tars_cannot_hold(image_folder: Path, tmp_path: Path) -> None:
    names = [f"{k:03d}.jpg" for k in range(24)]
    with pytest.raises(RequestError, match=r"1 names begin with a dot.*\n  'a/\.hidden\.jpg'"):
        shrink_set(
            Renamed(image_folder, [*names[:-1], "a/.hidden.jpg"], [0] * 24, ["x"]), tmp_path / "tars", short_side=0, tars=2
        )
    with pytest.raises(
        RequestError, match=r"1 names have the same part before the first dot as an image of another class.*\n  '000\.a\.jpg'"
    ):
        shrink_set(
            Renamed(image_folder, ["000.a.jpg", "000.b.jpg", *names[2:]], [0, 1, *[0] * 22], ["x", "y"]),
            tmp_path / "tars",
            short_side=0,
            tars=2,
        )
    assert not (tmp_path / "tars").exists()


@pytest.mark.parametrize("tars", [0, -1, 25])
def test_the_number_of_tars(image_folder: Path, tmp_path: Path, tars: int) -> None:
    with pytest.raises(RequestError, match=f"--tars {tars}: must be between 1 and 24"):
        TarWriter(scan(image_folder), tmp_path, tars)


def test_unreadable_images(image_folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(image_folder, tmp_path / "own"))
    name = scan(own).names[9]
    (own / name).write_bytes(b"damaged")
    with pytest.raises(ImageError, match=rf"{name}: not a readable image.*--on_unreadable skip"):
        shrink_set(scan(own), tmp_path / "tars", short_side=0, tars=4, threads=1)
    assert sorted(tree(tmp_path / "tars")) == ["00000.tar"]
    for written in (17, 0):  # the second call finds the tars finished
        done = shrink_set(scan(own), tmp_path / "tars", short_side=0, tars=4, skip_unreadable=True)
        assert (done.written, done.unreadable) == (written, [name])
        assert done.bytes == done.source_bytes == sum(map(len, tree(own).values())) - len(b"damaged")
    assert list(open_images(tmp_path / "tars").names) == [other for other in scan(own).names if other != name]


def test_other_tars_are_kept(image_folder: Path, tmp_path: Path) -> None:
    shrink_set(scan(image_folder), tmp_path / "tars", short_side=0, tars=3)
    before = tree(tmp_path / "tars")
    with pytest.raises(RequestError, match=r"00000\.tar: holds 'ash/006\.jpg', which is not in this part"):
        shrink_set(scan(image_folder), tmp_path / "tars", short_side=0, tars=4)
    assert tree(tmp_path / "tars") == before


@pytest.mark.slow
def test_killed_and_continued(image_folder: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys; from fkd_ssl.cli import main; n = 0; fsync = os.fsync\n"
        "def stop(handle):\n    global n; n += 1; fsync(handle)\n    if n == int(sys.argv[1]): os.kill(os.getpid(), 9)\n"
        "os.fsync = stop; sys.exit(main(sys.argv[2:]))"
    )
    line = ["cache", "--images", str(image_folder), "--out", str(tmp_path / "tars"), "--short_side", "0", "--tars", "4"]
    codes = []
    for call in (9, 11, 15, 0):
        done = subprocess.run(
            [sys.executable, "-c", script, str(call), *line], env={**os.environ, "TQDM_DISABLE": "1"}, check=False
        )
        codes.append(done.returncode)
    assert codes[0] == -signal.SIGKILL
    assert codes[-1] == 0
    shrink_set(scan(image_folder), tmp_path / "whole", short_side=0, tars=4)
    assert tree(tmp_path / "tars") == tree(tmp_path / "whole")
    assert np.array_equal(open_images(tmp_path / "tars").labels, scan(image_folder).labels)


@pytest.mark.parametrize("tail", [b"x", bytes(2 * 2**20) + b"x", None])
def test_data_after_the_end_of_a_tar_are_named(image_folder: Path, tmp_path: Path, tail: bytes | None) -> None:
    """Of tars that were joined with cat, tarfile reads the first only."""
    shrink_set(scan(image_folder), tmp_path / "tars", short_side=0, tars=2)
    first, second = sorted((tmp_path / "tars").iterdir())
    (tmp_path / "joined.tar").write_bytes(first.read_bytes() + (second.read_bytes() if tail is None else tail))
    with pytest.raises(RequestError, match=r"joined\.tar: data follow the end of the tar at byte [\d,]+; .* tar --concatenate"):
        open_images(tmp_path / "joined.tar")
    padded = tmp_path / "padded.tar"
    padded.write_bytes(first.read_bytes() + bytes(3 * 2**20))
    assert len(open_images(padded)) == 12
