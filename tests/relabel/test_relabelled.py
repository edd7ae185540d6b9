"""Fresh crops with the targets of label maps."""

import hashlib
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fkd_ssl.crops import RECIPES, draw, image_key
from fkd_ssl.data import Batch, FreshCrops, Loader, RelabelledCrops, replay_on_device, whole_batch
from fkd_ssl.errors import ImageError, StoreError
from fkd_ssl.images import Folder, scan
from fkd_ssl.relabel import LabelMaps, generate

PAIRS = [(0, 3), (0, 20), (2, 3), (1, 8)]


@pytest.fixture
def images(image_folder: Path) -> Folder:
    return scan(image_folder)


@pytest.fixture
def own_images(image_folder: Path, tmp_path: Path) -> Folder:
    """A copy of the images that a test may change."""
    return scan(shutil.copytree(image_folder, tmp_path / "own"))


def crops(images: Folder, maps: LabelMaps, **options: Any) -> RelabelledCrops:
    return RelabelledCrops(images, maps, RECIPES["fkd"], **{"crops_per_image": 3, "pixels": 24, **options})


def read(data: RelabelledCrops, batches: list[list[tuple[int, int]]], workers: int = 0) -> list[Batch]:
    return list(Loader(data, batches, workers=workers, collate=whole_batch))


def test_they_are_fresh_crops_with_targets(images: Folder, maps: LabelMaps) -> None:
    data = crops(images, maps, seed=5, teacher_pixels=32)
    plain = FreshCrops(images, RECIPES["fkd"], crops_per_image=3, pixels=24, seed=5, teacher_pixels=32)
    batch, expected = data.__getitems__([*PAIRS]).batch, plain.__getitems__([*PAIRS]).batch
    assert set(batch) == set(expected) | {"targets"}
    for key in ("images", "teacher_images", "labels"):
        assert torch.equal(batch[key], expected[key])
    assert (batch["targets"].dtype, batch["targets"].shape) == (torch.float32, (12, 12))
    assert torch.equal(data[2, 3]["targets"], batch["targets"][6:9])


def test_targets_are_those_of_the_very_boxes(images: Folder, maps: LabelMaps) -> None:
    data = crops(images, maps)
    batch = data.__getitems__([*PAIRS]).batch
    for k, (pass_, i) in enumerate(PAIRS):
        height, width = images.pixels(i).shape[:2]
        records = draw(RECIPES["fkd"], image_key(data._draw_seed, images.names[i]), height, width, pass_ * 3, 3)
        assert torch.equal(batch["targets"][3 * k : 3 * k + 3], maps.targets(i, records))
    assert batch["targets"].std(dim=0).max() > 0.01


def test_rows_are_found_by_path(images: Folder, maps: LabelMaps) -> None:
    some = crops(images.subset([20, 3]), maps)
    assert torch.equal(some[1]["targets"], crops(images, maps)[3]["targets"])
    assert torch.equal(some[0]["targets"], crops(images, maps)[20]["targets"])


def test_an_image_without_a_map(own_images: Folder, maps: LabelMaps) -> None:
    shutil.copy(own_images.file(0), own_images.root / "cedar/900.jpg")
    with pytest.raises(StoreError, match=r"no label maps of 1 of the 25 images .*'cedar/900.jpg'"):
        crops(scan(own_images.root), maps)


def test_an_image_that_changed_is_refused(own_images: Folder, maps: LabelMaps) -> None:
    shutil.copy(own_images.file(0), own_images.file(20))
    data = crops(own_images, maps)
    with pytest.raises(ImageError, match=r"cedar/004.jpg: changed since its label map was made: .* bytes now"):
        data[20]


def test_images_swapped_among_their_names_are_found(tmp_path: Path, new_dense: Any, smooth: Any) -> None:
    """Uncompressed images of one shape have the same number of bytes."""
    first, second = tmp_path / "set/a.bmp", tmp_path / "set/b.bmp"
    first.parent.mkdir()
    for k, path in enumerate((first, second)):
        Image.fromarray(smooth(k, 60, 70)).save(path)
    dense = new_dense()
    dense.stop_at = 1
    with suppress(KeyboardInterrupt):  # images that were read before keep their state
        generate(scan(first.parent), tmp_path / "maps", dense, batch_size=1, progress=False)
    generate(scan(first.parent), tmp_path / "maps", new_dense(), batch_size=1, progress=False)
    maps = LabelMaps(tmp_path / "maps")
    expected = [hashlib.sha256(path.read_bytes()).digest() for path in (first, second)]
    assert [row.tobytes() for row in maps.image_checksums()] == expected
    assert len(crops(scan(first.parent), maps)[1]["images"])
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(ImageError, match=r"a\.bmp: changed since its label map was made: other content of the same"):
        crops(scan(first.parent), maps)[0]


def test_where_an_image_is_skipped_its_stand_in_brings_its_own_targets(own_images: Folder, maps: LabelMaps) -> None:
    own_images.file(20).write_bytes(b"no picture")
    data = crops(own_images, maps, skip_unreadable=True)
    batch = data.__getitems__([(0, 3), (0, 20), (0, 8)]).batch
    assert batch["paths"] == [own_images.names[i] for i in (3, 3, 8)]
    assert len(batch["unreadable"]) == 1
    assert torch.equal(batch["targets"][:3], batch["targets"][3:6])
    assert torch.equal(batch["images"][:3], batch["images"][3:6])
    assert torch.equal(batch["targets"][6:], data[8]["targets"])


def test_decoded_images_bring_the_same_targets(images: Folder, maps: LabelMaps) -> None:
    expected = crops(images, maps).__getitems__([*PAIRS]).batch
    batch = replay_on_device(crops(images, maps, decode_only=True).__getitems__([*PAIRS]).batch)
    assert torch.equal(batch["targets"], expected["targets"])
    assert torch.equal(batch["images"], expected["images"])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_the_same(images: Folder, maps: LabelMaps, workers: int) -> None:
    data = crops(images, maps)
    batches = [PAIRS[:2], PAIRS[2:]]
    for found, pairs in zip(read(data, batches, workers), batches, strict=True):
        expected = crops(images, maps).__getitems__([*pairs]).batch
        assert torch.equal(found["targets"], expected["targets"])
        assert torch.equal(found["images"], expected["images"])
