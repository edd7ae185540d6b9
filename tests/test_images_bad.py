"""Damaged and hostile sets of images are named, and nothing is lost."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from fkd_ssl.errors import FkdError, ImageAccessError, RequestError
from fkd_ssl.images import ImageSource, open_images, scan
from fkd_ssl.store import open_store
from fkd_ssl.store.maintain.verify import verify
from tests.test_images_shards import contents, write_tar


class OwnSource(ImageSource):
    def read(self, index: int) -> bytes:
        return b""


@pytest.mark.parametrize("name", ["../a.jpg", "a/../../b.jpg", "/etc/a.jpg", "a/./b.jpg", "a//b.jpg", ".././a.jpg"])
def test_names_that_lead_out_of_a_tar(tmp_path: Path, name: str) -> None:
    tar = write_tar(tmp_path / "a.tar", {"good.jpg": b"1", name: b"2"})
    with pytest.raises(RequestError, match=rf"1 names are absolute, or have an empty part or one that is .*\n  '{name}'"):
        open_images(tar)


@pytest.mark.parametrize("labels", [[], [0], [0, 1, 0]])
def test_labels_of_another_length(labels: list[int]) -> None:
    with pytest.raises(RequestError, match=rf"own: {len(labels)} labels of 2 images"):
        OwnSource("own", ["a.jpg", "b.jpg"], labels, ["x", "y"])


@pytest.mark.parametrize("names", [["a.jpg", "a.jpg"], ["é.jpg", "é.jpg", "b.jpg"]])
def test_names_of_several_images(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    source = OwnSource("own", names, [0] * len(names), ["x"])
    monkeypatch.setattr("fkd_ssl.images.opening.scan", lambda spec: source)
    with pytest.raises(RequestError, match="1 names are used by several images; give each image its own name"):
        open_images("anything")


def test_a_tar_without_permission(
    tmp_path: Path,
    image_folder: Path,
    unprivileged: Callable[[], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tar = write_tar(tmp_path / "a.tar", contents(scan(image_folder)))
    monkeypatch.setenv("FKD_SSL_CACHE", str(tmp_path / "cache"))
    tar.chmod(0o200)
    with unprivileged(), pytest.raises(ImageAccessError, match=r"a\.tar: cannot be read: Permission denied"):
        open_images(tar)
    tar.chmod(0o644)
    assert len(open_images(tar)) == 24


def test_a_tar_that_changed_after_the_store_was_made(
    tmp_path: Path, image_folder: Path, make_store: Any, new_teacher: Any
) -> None:
    """One byte of an image differs, at the same size. The store stays as it is."""
    images = contents(scan(image_folder))
    tar = write_tar(tmp_path / "a.tar", images)
    store = make_store(tmp_path / "store", images=tar)
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    name = list(images)[5]
    data = bytearray(images[name])
    data[-20] ^= 1
    write_tar(tar, {**images, name: bytes(data)})
    os.utime(tar, (1, 1))  # another time, as of another copy
    changed = open_images(tar)
    (problem,) = verify(store, changed).problems
    assert problem.startswith(f"row 5: {tar}: {name}: changed since its crops were made")
    with pytest.raises(FkdError, match=rf"{name}: changed since the store's crops were made"):
        make_store(tmp_path / "store", images=changed, teacher=new_teacher(2, "other"))
    assert {path: path.read_bytes() for path in before} == before
    assert open_store(tmp_path / "store").column("tiny").missing_shards == []
