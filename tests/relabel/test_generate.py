"""Making label maps: their contents, resume after a kill, and errors."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fkd_ssl import files
from fkd_ssl.crops import box_record, replay
from fkd_ssl.errors import FkdError, ImageError, RequestError, StoreError
from fkd_ssl.images import Folder, scan
from fkd_ssl.relabel import LabelMaps, generate, layout
from fkd_ssl.store.write import work

NewDense = Callable[..., Any]


@pytest.fixture
def images(image_folder: Path) -> Folder:
    return scan(image_folder)


@pytest.fixture
def own_images(image_folder: Path, tmp_path: Path) -> Folder:
    """A copy of the images that a test may change."""
    return scan(shutil.copytree(image_folder, tmp_path / "own"))


def make(images: Folder, folder: Path, dense: Any, **options: Any) -> Any:
    return generate(images, folder, dense, **{"batch_size": 7, "progress": False, **options})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_largest_logits_of_the_whole_image_are_kept(maps_folder: Path, images: Folder, new_dense: NewDense) -> None:
    """The oracle sorts the teacher's logits of one image with NumPy, and reads the file with numpy.load only."""
    stored = np.load(maps_folder / "maps/00000.npy", allow_pickle=False)
    dense = new_dense()
    assert (stored.shape, stored.dtype["classes"].shape, stored.nbytes) == ((24,), (5, 5, 5), 24 * 5 * 5 * 5 * 4)
    for row in (0, 6, 7, 23):
        image = images.pixels(row)
        view = replay(image, box_record(0, 0, *image.shape[:2]), 48)
        logits = dense(torch.from_numpy(view))[0].numpy()
        order = np.argsort(-logits, axis=0)[:5]
        np.testing.assert_array_equal(stored["classes"][row], order)
        values = np.take_along_axis(logits, order, axis=0)
        np.testing.assert_allclose(stored["logits"][row], values, rtol=2e-3, atol=2e-3)
    assert len({stored[row].tobytes() for row in range(24)}) == 24


def test_the_manifest_says_what_they_are_made_of(maps_folder: Path, images: Folder) -> None:
    about = json.loads((maps_folder / "manifest.json").read_text())
    assert (about["format"], about["version"]) == ("fkd_ssl label maps", 1)
    teacher = {key: about["teacher"][key] for key in ("name", "network", "licence", "checkpoint_sha256")}
    assert teacher == {"name": "small", "network": "convolutions", "licence": "none", "checkpoint_sha256": "0" * 64}
    assert (about["teacher"]["pixels"], about["teacher"]["shape"]) == (48, [12])
    assert [about[key] for key in ("k", "height", "width", "count", "batch_size")] == [5, 5, 5, 24, 7]
    assert (maps_folder / "images.txt").read_text().splitlines() == images.names


def test_size_and_place_are_announced(images: Folder, tmp_path: Path, new_dense: NewDense) -> None:
    said: list[str] = []
    made = make(images, tmp_path / "maps", new_dense(), log=said.append)
    assert said[0].startswith("24 images, 5 of 12 logits at each of 5 x 5 positions: 500 bytes per image, 12.0 kB in all")
    assert (made.images, made.made, made.busy) == (24, 24, [])


def test_the_same_again_asks_nobody(maps_folder: Path, images: Folder, new_dense: NewDense) -> None:
    before, dense = tree(maps_folder), new_dense()
    assert make(images, maps_folder, dense).made == 0
    assert dense.calls == 0
    assert tree(maps_folder) == before


@pytest.mark.parametrize("rows_per_shard", [10, 100])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_killed_job_continues(
    images: Folder, tmp_path: Path, new_dense: NewDense, monkeypatch: Any, rows_per_shard: int, calls: int
) -> None:
    """The files are bit-identical, and no finished batch is run again."""
    monkeypatch.setattr(layout, "ROWS_PER_SHARD", rows_per_shard)
    whole, dense = tmp_path / "whole", new_dense()
    make(images, whole, dense)
    stopped = new_dense()
    stopped.stop_at = calls
    with pytest.raises(KeyboardInterrupt):
        make(images, tmp_path / "maps", stopped)
    with pytest.raises(StoreError, match=r"shards? missing: run the same fkd-ssl label-maps again"):
        LabelMaps(tmp_path / "maps")
    again = new_dense()
    make(images, tmp_path / "maps", again)
    assert again.calls == dense.calls - calls
    assert tree(tmp_path / "maps") == tree(whole)


@pytest.mark.parametrize("journals", ["always", "never"])
def test_a_process_that_dies_at_once_continues(
    images: Folder, tmp_path: Path, new_dense: NewDense, monkeypatch: Any, maps_folder: Path, journals: str
) -> None:
    """It cannot save anything: the work counted in a journal is kept, the rest is repeated."""
    monkeypatch.setattr(work, "SECONDS_BETWEEN_JOURNALS", -1 if journals == "always" else 1000)
    process = multiprocessing.get_context("fork").Process(target=_make_and_die, args=(images, tmp_path / "maps", new_dense()))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    again = new_dense()
    make(images, tmp_path / "maps", again)
    assert again.calls == (2 if journals == "always" else 4)
    assert tree(tmp_path / "maps") == tree(maps_folder)


def _make_and_die(images: Folder, folder: Path, dense: Any) -> None:
    def mortal(batch: torch.Tensor) -> torch.Tensor:
        if dense.calls == 2:
            os._exit(9)
        found: torch.Tensor = dense(batch)
        return found

    mortal.__dict__.update(teacher=dense.teacher, pixels=dense.pixels, height=dense.height, width=dense.width)
    make(images, folder, mortal)


def test_a_kill_between_a_file_and_its_sidecar(maps_folder: Path, images: Folder, tmp_path: Path, new_dense: NewDense) -> None:
    folder = Path(shutil.copytree(maps_folder, tmp_path / "maps"))
    (folder / "maps/00000.json").unlink()
    assert make(images, folder, new_dense()).made == 24
    assert tree(folder) == tree(maps_folder)
    (folder / "maps/.work-00000").write_bytes(b"left")  # left by a process that was killed before it could remove it
    make(images, folder, new_dense())
    assert tree(folder) == tree(maps_folder)


def test_half_written_progress_does_not_count(images: Folder, tmp_path: Path, new_dense: NewDense, maps_folder: Path) -> None:
    stopped = new_dense()
    stopped.stop_at = 2
    with suppress(KeyboardInterrupt):
        make(images, tmp_path / "maps", stopped)
    path = tmp_path / "maps/maps/.work-00000"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    make(images, tmp_path / "maps", new_dense())
    assert tree(tmp_path / "maps") == tree(maps_folder)


def test_what_another_process_writes_is_left_to_it(images: Folder, tmp_path: Path, new_dense: NewDense) -> None:
    stopped = new_dense()
    stopped.stop_at = 0
    with suppress(KeyboardInterrupt):
        make(images, tmp_path / "maps", stopped)
    digest = layout.read_manifest(tmp_path / "maps").digest
    with work.open_work(tmp_path / "maps/maps/.work-00000", digest, unit=1, crops=1):
        assert make(images, tmp_path / "maps", new_dense()).busy == [0]
    assert make(images, tmp_path / "maps", new_dense()).busy == []


@pytest.mark.parametrize(
    ("options", "about", "what"),
    [
        ({"k": 4}, {}, "its k is 5, not 4"),
        ({"batch_size": 8}, {}, "its batch_size is 7, not 8"),
        ({}, {"seed": 1}, "its checkpoint_sha256 is 0+, not 0+1"),
        ({}, {"pixels": 56}, "its pixels is 48, not 56"),
        ({}, {"precision": "bf16"}, "its precision is fp32, not bf16"),
    ],
)
def test_maps_made_otherwise_are_left_alone(
    maps_folder: Path, images: Folder, new_dense: NewDense, options: Any, about: Any, what: str
) -> None:
    before = tree(maps_folder)
    with pytest.raises(RequestError, match=f"{what}.*choose another --out"):
        make(images, maps_folder, new_dense(**about), **options)
    assert tree(maps_folder) == before


def test_maps_of_other_images_are_left_alone(maps_folder: Path, images: Folder, new_dense: NewDense) -> None:
    with pytest.raises(RequestError, match=r"was made from other images: it lists 24, .* has 23; .* lacks 'ash/000.jpg'"):
        make(images.subset(range(1, 24)), maps_folder, new_dense())


def test_somebody_elses_folder_is_left_alone(images: Folder, tmp_path: Path, new_dense: NewDense) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RequestError, match=r"holds 'thesis.tex', which is not part of label maps; choose another"):
        make(images, tmp_path, new_dense())
    with pytest.raises(RequestError, match="is a file; expected a folder for label maps"):
        make(images, tmp_path / "thesis.tex", new_dense())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "store").mkdir()
    files.write_json(tmp_path / "store/manifest.json", {"format": "fkd_ssl store", "version": 1})
    with pytest.raises(RequestError, match=r"is not a folder of label maps; choose another --out"):
        make(images, tmp_path / "store", new_dense())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"k": 13}, "k 13: teacher small has 12 classes; k must be between 1 and 12"),
        ({"k": 0}, "k 0: .* must be between 1 and 12"),
        ({"batch_size": 0}, "batch_size 0: must be between 1 and 65536"),
        ({"threads": 0}, "threads 0: must be at least 1"),
    ],
)
def test_impossible_settings(images: Folder, tmp_path: Path, new_dense: NewDense, options: Any, what: str) -> None:
    with pytest.raises(RequestError, match=what):
        make(images, tmp_path / "maps", new_dense(), **options)
    assert not (tmp_path / "maps").exists()


def test_all_classes_may_be_kept(images: Folder, tmp_path: Path, new_dense: NewDense) -> None:
    make(images, tmp_path / "maps", new_dense(), k=12)
    classes, _ = LabelMaps(tmp_path / "maps").read(3)
    assert (np.sort(classes, axis=0) == np.arange(12)[:, None, None]).all()


def test_a_full_disk_is_said_before_anything_is_written(
    images: Folder, tmp_path: Path, new_dense: NewDense, monkeypatch: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 5000))  # type: ignore[attr-defined]
    with pytest.raises(FkdError, match=r"needs 12.0 kB more and the disk has 5.0 kB free.*--k"):
        make(images, tmp_path / "maps", new_dense())
    assert not (tmp_path / "maps").exists()


def test_an_image_that_changes_meanwhile_is_refused(own_images: Folder, tmp_path: Path, new_dense: NewDense) -> None:
    stopped = new_dense()
    stopped.stop_at = 1
    with suppress(KeyboardInterrupt):
        make(own_images, tmp_path / "maps", stopped)
    shutil.copy(own_images.file(0), own_images.file(20))
    with pytest.raises(RequestError, match=r"004\.jpg has \d+ bytes, but had \d+ when the maps were begun"):
        make(own_images, tmp_path / "maps", new_dense())


def test_an_unreadable_image_is_named(own_images: Folder, tmp_path: Path, new_dense: NewDense) -> None:
    own_images.file(9).write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"001.jpg: not a readable image: unknown image format$"):
        make(own_images, tmp_path / "maps", new_dense())


@pytest.mark.parametrize("killed", [False, True])
def test_damaged_images_can_be_skipped(own_images: Folder, tmp_path: Path, new_dense: NewDense, killed: bool) -> None:
    """One has a damaged header, one is truncated; the maps of the others are unchanged."""
    make(own_images, tmp_path / "whole", new_dense())
    whole = LabelMaps(tmp_path / "whole")
    own_images.file(9).write_bytes(b"no picture")
    own_images.file(3).write_bytes(own_images.file(3).read_bytes()[:-400])
    dense = new_dense()
    if killed:
        dense.stop_at = 1
        with pytest.raises(KeyboardInterrupt):
            make(own_images, tmp_path / "maps", dense, skip_unreadable=True)
        dense.stop_at = None
    done = make(own_images, tmp_path / "maps", dense, skip_unreadable=True)
    assert done.unreadable == [own_images.names[3], own_images.names[9]]
    assert done.made == len(own_images) - 2 - (6 if killed else 0)
    maps = LabelMaps(tmp_path / "maps")
    maps.verify()
    for row in range(len(own_images)):
        if row in (3, 9):
            with pytest.raises(StoreError, match=rf"no label map of '{own_images.names[row]}', which could not be read"):
                maps.read(row)
        else:
            for a, b in zip(maps.read(row), whole.read(row), strict=True):
                np.testing.assert_array_equal(a, b)
    again = make(own_images, tmp_path / "maps", dense)
    assert (again.made, again.unreadable) == (0, done.unreadable)
    with pytest.raises(ImageError, match=r"001\.jpg: not a readable image"):
        make(own_images, tmp_path / "other", dense)


def test_logits_beyond_float16_are_refused(images: Folder, tmp_path: Path, new_dense: NewDense) -> None:
    dense = new_dense()
    dense.teacher.backbone[-1].bias.data += 1e5
    with pytest.raises(FkdError, match="its logits are not finite or exceed 65,504"):
        make(images, tmp_path / "maps", dense)


def test_the_files_do_not_depend_on_threads(images: Folder, tmp_path: Path, new_dense: NewDense, maps_folder: Path) -> None:
    make(images, tmp_path / "maps", new_dense(), threads=1)
    assert tree(tmp_path / "maps") == tree(maps_folder)
