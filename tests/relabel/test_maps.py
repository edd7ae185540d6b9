"""Reading label maps: targets compared with RoIAlign written out, and damaged files."""

import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fkd_ssl import files
from fkd_ssl.crops import RECIPES, box_record, draw
from fkd_ssl.crops.operations import FLIP
from fkd_ssl.errors import ImageError, StoreError
from fkd_ssl.images import scan
from fkd_ssl.relabel import LabelMaps, generate, layout

Array = npt.NDArray[np.float64]


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def full(folder: Path, row: int) -> Array:
    """The map of an image with all classes, float64 [K, h, w], read by NumPy alone; classes that are not kept are 0."""
    record = np.load(folder / "maps/00000.npy", allow_pickle=False)[row]
    whole = np.zeros((12, 5, 5))
    for k, y, x in np.ndindex(5, 5, 5):
        whole[record["classes"][k, y, x], y, x] = record["logits"][k, y, x]
    return whole


def roi_align(whole: Array, left: float, top: float, right: float, bottom: float) -> Array:
    """RoIAlign (arXiv 1703.06870, section 3) to one place, [K]. The box is in places, whose centres are at halves.

    The number of samples along each side is the box's length in places, rounded up. They are evenly spaced, and each is
    interpolated between the centres of four places, clamped at the outermost ones. In float32 a box of exactly two places may
    be slightly larger and have three samples, so the number of samples is computed from float32 edges.
    """
    _, height, width = whole.shape
    x0, y0, x1, y1 = np.array([left, top, right, bottom], dtype=np.float32) - np.float32(0.5)
    columns, lines = math.ceil(x1 - x0), math.ceil(y1 - y0)
    total = np.zeros(len(whole))
    for i in range(lines):
        for j in range(columns):
            y = min(max(top + (i + 0.5) * (bottom - top) / lines - 0.5, 0), height - 1)
            x = min(max(left + (j + 0.5) * (right - left) / columns - 0.5, 0), width - 1)
            r, c = min(int(y), height - 2), min(int(x), width - 2)
            v, u = y - r, x - c
            total += (1 - v) * ((1 - u) * whole[:, r, c] + u * whole[:, r, c + 1])
            total += v * ((1 - u) * whole[:, r + 1, c] + u * whole[:, r + 1, c + 1])
    return total / (lines * columns)


def test_targets_are_the_softmax_of_roi_align(maps: LabelMaps, maps_folder: Path) -> None:
    for row in (0, 11):
        height, width = int(maps.sizes["height"][row]), int(maps.sizes["width"][row])
        drawn = draw(RECIPES["fkd"], b"0" * 16, height, width, 0, 12)
        edges = [box_record(0, 0, height, 9), box_record(height - 11, width - 30, 11, 30), box_record(30, 20, 3, 2)]
        records = np.concatenate([drawn, *edges])
        found = maps.targets(row, records)
        assert (found.dtype, found.shape) == (torch.float32, (15, 12))
        for target, record in zip(found, records, strict=True):
            left, top = int(record["left"]), int(record["top"])
            right, bottom = left + int(record["width"]), top + int(record["height"])
            x, y = 5 / width, 5 / height
            expected = softmax(roi_align(full(maps_folder, row), left * x, top * y, right * x, bottom * y))
            np.testing.assert_allclose(target, expected, rtol=2e-4, atol=1e-6)
        assert found.std(dim=0).max() > 0.01  # else any box would do


def test_rows_sum_to_1(maps: LabelMaps) -> None:
    records = draw(RECIPES["mocov2"], b"1" * 16, int(maps.sizes["height"][4]), int(maps.sizes["width"][4]), 0, 20)
    targets = maps.targets(4, records)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(20))
    assert (targets > 0).all()


def test_the_whole_image_has_the_mean_of_the_map(maps: LabelMaps, maps_folder: Path) -> None:
    for row in range(len(maps)):
        record = box_record(0, 0, int(maps.sizes["height"][row]), int(maps.sizes["width"][row]))
        expected = softmax(full(maps_folder, row).mean(axis=(1, 2)))
        np.testing.assert_allclose(maps.targets(row, record)[0], expected, rtol=1e-5)


def test_x_runs_along_the_width(maps_folder: Path, tmp_path: Path) -> None:
    """Only the upper right place of the map has a class: the crop of that corner gets it, no other one does."""
    folder = Path(shutil.copytree(maps_folder, tmp_path / "maps"))
    path = folder / "maps/00000.npy"
    stored = np.load(path)
    stored["logits"] = 0
    stored["classes"][0] = np.arange(5)[:, None, None]
    stored["classes"][0, 0, 0, 4], stored["logits"][0, 0, 0, 4] = 9, 8
    np.save(path, stored)
    maps = LabelMaps(folder)
    height, width = int(maps.sizes["height"][0]), int(maps.sizes["width"][0])
    h, w = height // 5, width // 5
    corners = [box_record(t, left, h, w) for t in (0, height - h) for left in (0, width - w)]
    assert (maps.targets(0, np.concatenate(corners))[:, 9] > 0.5).tolist() == [False, True, False, False]


def test_nothing_but_the_box_counts(maps: LabelMaps) -> None:
    records = np.repeat(box_record(5, 6, 30, 40), 2)
    records["flags"][1], records["hue"][1] = FLIP, 0.1
    targets = maps.targets(3, records)
    assert torch.equal(targets[0], targets[1])
    assert torch.equal(targets, maps.targets(3, records))
    assert torch.equal(targets[:1], maps.targets(3, records[:1]))
    assert maps.targets(3, records[:0]).shape == (0, 12)


def test_a_box_outside_the_image_is_refused(maps: LabelMaps) -> None:
    with pytest.raises(ImageError, match="is outside an image"):
        maps.targets(0, box_record(0, 0, 200, 5))
    with pytest.raises(IndexError, match="row 24 of 24"):
        maps.read(24)


def test_rows_are_found_by_path(maps: LabelMaps, image_folder: Path, tmp_path: Path) -> None:
    images = scan(image_folder)
    assert maps.rows(images).tolist() == list(range(24))
    assert maps.rows(images.subset([20, 3])).tolist() == [20, 3]
    folder = Path(shutil.copytree(image_folder, tmp_path / "more"))
    for name in ("oak", "birch"):
        (folder / name).mkdir(exist_ok=True)
        shutil.copy(folder / "ash/000.jpg", folder / name / "100.jpg")
    with pytest.raises(StoreError, match=r"no label maps of 2 of the 26 images of .*, for instance 'birch/100.jpg'"):
        maps.rows(scan(folder))


def test_pickled_they_are_the_folder_and_not_its_bytes(maps: LabelMaps) -> None:
    maps.read(0)
    data = pickle.dumps(maps)
    assert len(data) < 12000  # the maps have 12,000 bytes; only paths and sizes are pickled
    assert torch.equal(pickle.loads(data).targets(2, box_record(0, 0, 50, 50)), maps.targets(2, box_record(0, 0, 50, 50)))  # noqa: S301


class TestDamage:
    @pytest.fixture
    def own(self, maps_folder: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(maps_folder, tmp_path / "own"))

    def rewrite(self, folder: Path, **changed: Any) -> None:
        path = folder / "manifest.json"
        values = files.read_json(path)
        path.unlink()
        files.write_json(path, {**values, **changed})

    def test_whole_maps_are_found_whole(self, own: Path) -> None:
        LabelMaps(own).verify()

    def test_no_maps(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"not a folder of label maps .no such folder.; make one with fkd-ssl label-maps"):
            LabelMaps(tmp_path / "none")
        with pytest.raises(StoreError, match=r"no manifest.json in it"):
            LabelMaps(tmp_path)

    @pytest.mark.parametrize(
        ("changed", "what"),
        [
            ({"format": "fkd_ssl store"}, "not the manifest of a folder of label maps"),
            ({"version": 2}, "format 2; this version of fkd_ssl reads 1: update fkd_ssl"),
            ({"colour": "red"}, "keys are missing or unknown"),
            ({"k": 13}, "impossible numbers"),
            ({"height": 0}, "impossible numbers"),
            ({"count": True}, "impossible numbers"),
            ({"k": 12, "height": 4096, "width": 4096}, "impossible numbers"),
            ({"teacher": "x"}, "keys are missing or unknown, or a value is invalid"),
            ({"teacher": {"name": "x"}}, "keys are missing or unknown, or a value is invalid"),
            ({"count": 23}, "24 lines, the manifest says 23"),
            ({"images_sha256": "0"}, "images.txt: damaged: its sha256 differs"),
            ({"sizes_sha256": "0"}, "images.npy: damaged: its sha256 differs"),
        ],
    )
    def test_another_manifest(self, own: Path, changed: Any, what: str) -> None:
        self.rewrite(own, **changed)
        with pytest.raises(StoreError, match=what):
            LabelMaps(own)

    def test_an_altered_manifest(self, own: Path) -> None:
        path = own / "manifest.json"
        path.write_text(path.read_text().replace('"k":5', '"k":4'))
        with pytest.raises(StoreError, match="altered: its sha256 is"):
            LabelMaps(own)

    def test_paths_that_lead_out(self, own: Path) -> None:
        lines = (own / "images.txt").read_bytes().replace(b"ash/000.jpg", b"../000.jpg.")
        (own / "images.txt").write_bytes(lines)
        self.rewrite(own, images_sha256=files.sha256(lines))
        with pytest.raises(StoreError, match="a path is empty, absolute or escapes the image folder"):
            LabelMaps(own)

    def test_links_are_not_followed(self, own: Path, tmp_path: Path) -> None:
        (own / "maps").rename(tmp_path / "elsewhere")
        (own / "maps").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StoreError, match="a symbolic link, which is not followed inside a store"):
            LabelMaps(own)

    def test_a_shorter_file(self, own: Path) -> None:
        os.truncate(own / "maps/00000.npy", 5000)
        with pytest.raises(StoreError, match="truncated, or still being written"):
            LabelMaps(own).read(0)

    def test_another_array(self, own: Path) -> None:
        np.save(own / "maps/00000.npy", np.zeros(24))
        with pytest.raises(StoreError, match=r"holds float64 .24., expected"):
            LabelMaps(own).read(0)

    def test_pickles_are_refused_unread(self, own: Path) -> None:
        np.save(own / "maps/00000.npy", np.array([{}] * 24, dtype=object))
        with pytest.raises(StoreError, match=r"holds object .24., expected"):
            LabelMaps(own).read(0)

    @pytest.mark.parametrize(("field", "value"), [("classes", 12), ("logits", np.nan)])
    def test_impossible_values(self, own: Path, field: str, value: float) -> None:
        stored = np.load(own / "maps/00000.npy")
        stored[field][5, 2, 1, 0] = value
        np.save(own / "maps/00000.npy", stored)
        maps = LabelMaps(own)
        maps.read(4)
        with pytest.raises(StoreError, match="row 5 has invalid classes or logits"):
            maps.targets(5, box_record(0, 0, 20, 20))

    def test_a_changed_bit_is_found_by_verify(self, own: Path) -> None:
        path = own / "maps/00000.npy"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"00000.npy: damaged: .*delete both files and run the same"):
            LabelMaps(own).verify()

    def test_maps_of_another_folder_are_found_by_verify(self, own: Path) -> None:
        path = own / "maps/00000.json"
        values = files.read_json(path)
        path.unlink()
        files.write_json(path, {**values, "manifest": "0"})
        with pytest.raises(StoreError, match=r"belongs to another folder"):
            LabelMaps(own).verify()
        assert json.loads(path.read_text())["manifest"] == "0"

    def test_swapped_shards_are_found_when_they_are_read_and_by_verify(
        self, tmp_path: Path, image_folder: Path, new_dense: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(layout, "ROWS_PER_SHARD", 12)
        generate(scan(image_folder), tmp_path / "maps", new_dense(), batch_size=7, progress=False)
        LabelMaps(tmp_path / "maps").read(20)
        for suffix in ("npy", "json"):
            one, two = (tmp_path / f"maps/maps/0000{shard}.{suffix}" for shard in (0, 1))
            data = one.read_bytes()
            one.write_bytes(two.read_bytes())
            two.write_bytes(data)
        maps = LabelMaps(tmp_path / "maps")
        for row, shard in ((3, 1), (20, 0)):
            with pytest.raises(StoreError, match=rf"belongs to shard {shard}: files were swapped"):
                maps.read(row)
        with pytest.raises(StoreError, match="belongs to shard 1"):
            maps.verify()

    def test_maps_that_take_much_memory_are_refused_before_a_file_is_read(self, own: Path) -> None:
        """With one logit per place and many places, the array for pooling has all classes at each place."""
        self.rewrite(own, k=1, height=3000, width=3000)
        with pytest.raises(StoreError, match="impossible numbers"):
            LabelMaps(own)
