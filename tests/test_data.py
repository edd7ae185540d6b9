"""Data sets of crops, from a store or fresh."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fkd_ssl.crops import RECIPES, draw, replay
from fkd_ssl.crops.device import CropPlan
from fkd_ssl.data import (
    Batch,
    Crops,
    FreshCrops,
    Loader,
    PassSampler,
    StoredCrops,
    memory,
    replay_on_device,
    scaled,
    whole_batch,
)
from fkd_ssl.errors import ImageAccessError, ImageError, RequestError, StoreError
from fkd_ssl.images import Folder, read_image, scan
from fkd_ssl.images.shrinking import shrink
from fkd_ssl.store import Store

MakeStore = Callable[..., Store]


def index_of(data: StoredCrops, pass_: int, i: int) -> list[int]:
    """Returns which crops of image `i` a pass reads, found by their records."""
    records = data._records(pass_, i, 0, 0)
    return [next(k for k in range(data.store.crops_per_image) if data.store.crops(i, slice(k, k + 1))[0] == r) for r in records]


def read(data: Crops, batches: list[list[tuple[int, int]]], workers: int = 0) -> list[Batch]:
    return list(Loader(data, batches, workers=workers, collate=whole_batch))


def same(a: Batch, b: Batch) -> bool:
    tensors = [key for key in a if isinstance(a[key], torch.Tensor)]
    return a.keys() == b.keys() and a["paths"] == b["paths"] and all(torch.equal(a[key], b[key]) for key in tensors)


@pytest.fixture
def images(image_folder: Path) -> Folder:
    return scan(image_folder)


@pytest.fixture
def own_folder(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the images that a test may change."""
    return Path(shutil.copytree(image_folder, tmp_path / "own"))


@pytest.fixture
def store(make_store: MakeStore, tmp_path: Path) -> Store:
    """Lossless, C = 4."""
    return make_store(tmp_path / "store", codec="Flat")


def fresh(images: Folder, **options: Any) -> FreshCrops:
    return FreshCrops(images, RECIPES["mocov2"], **{"crops_per_image": 2, "pixels": 24, **options})


class TestStored:
    def test_one_image(self, store: Store, image_folder: Path) -> None:
        data = StoredCrops(store, image_folder, crops_per_image=3, pixels=24, column="tiny")
        item = data[5]
        assert len(data) == 24
        assert set(item) == {"images", "targets", "label", "path"}
        assert (item["images"].dtype, item["images"].shape) == (torch.uint8, (3, 3, 24, 24))
        assert (item["targets"].dtype, item["targets"].shape) == (torch.float32, (3, 16))
        assert (item["label"], item["path"]) == (0, "ash/005.jpg")
        assert data[23]["label"] == 2

    def test_a_batch_lists_crops_of_an_image_side_by_side_in_channels_last(self, store: Store, image_folder: Path) -> None:
        data = StoredCrops(store, image_folder, crops_per_image=2, pixels=24)
        batch = data.__getitems__([(0, 3), (1, 20)]).batch
        assert batch["images"].shape == (4, 3, 24, 24)
        assert batch["images"].is_contiguous(memory_format=torch.channels_last)
        assert batch["labels"].tolist() == [0, 2]
        assert batch["paths"] == ["ash/003.jpg", "cedar/004.jpg"]
        alone = [data[0, 3], data[1, 20]]
        assert torch.equal(batch["images"], torch.cat([item["images"] for item in alone]))
        assert torch.equal(batch["targets"], torch.cat([item["targets"] for item in alone]))

    def test_crops_are_replayed_from_the_stores_records(self, store: Store, image_folder: Path) -> None:
        data = StoredCrops(store, image_folder, crops_per_image=4, pixels=40)
        pixels = replay(read_image(image_folder / "birch/001.jpg"), store.crops(9, np.array(index_of(data, 0, 9))), 40)
        assert torch.equal(data[9]["images"], torch.from_numpy(pixels))

    def test_targets_belong_to_their_crops(self, store: Store, image_folder: Path, tiny_teacher: Any) -> None:
        data = StoredCrops(store, image_folder, crops_per_image=2, pixels=32)
        batch = data.__getitems__([(p, i) for p in range(3) for i in range(24)]).batch
        torch.testing.assert_close(batch["targets"], tiny_teacher.embed(batch["images"]), rtol=1e-4, atol=1e-5)
        assert batch["targets"].std(dim=0).mean() > 0.01  # else any order would do

    @pytest.mark.parametrize(("c", "m"), [(4, 1), (4, 4), (6, 4), (5, 2), (7, 3), (3, 2)])
    def test_every_crop_is_used_before_any_twice(
        self, make_store: MakeStore, tmp_path: Path, images: Folder, c: int, m: int
    ) -> None:
        data = StoredCrops(
            make_store(tmp_path / "cm", images=images.subset(range(3)), crops=c), images, crops_per_image=m, pixels=8
        )
        for i in range(3):
            seen = [k for pass_ in range(2 * c) for k in index_of(data, pass_, i)]
            for first in range(0, len(seen) - c + 1, c):
                assert sorted(seen[first : first + c]) == list(range(c))

    @pytest.mark.parametrize(("c", "m", "steps"), [(4, 2, 9), (6, 4, 7), (5, 2, 8), (7, 3, 11)])
    def test_a_training_uses_the_crops_of_an_image_equally_often(
        self, make_store: MakeStore, tmp_path: Path, images: Folder, c: int, m: int, steps: int
    ) -> None:
        """Also if M does not divide C, and if the training ends in the middle of a pass."""
        data = StoredCrops(
            make_store(tmp_path / "cm", images=images.subset(range(5)), crops=c), images, crops_per_image=m, pixels=8
        )
        used = np.zeros((5, c), dtype=int)
        for batch in PassSampler(5, 3, steps, seed=0):
            for pass_, i in batch:
                used[i, index_of(data, pass_, i)] += 1
        assert (used.max(axis=1) - used.min(axis=1)).max() <= 1
        assert used.sum() == 3 * m * steps

    def test_the_first_crop_depends_on_seed_and_image(self, make_store: MakeStore, tmp_path: Path, images: Folder) -> None:
        store = make_store(tmp_path / "many", images=images.subset(range(8)), crops=16)

        def starts(seed: int) -> list[int]:
            data = StoredCrops(store, images, crops_per_image=1, pixels=8, seed=seed)
            return [index_of(data, 0, i)[0] for i in range(8)]

        assert starts(0) == starts(0)
        assert starts(0) != starts(1)
        assert len(set(starts(0))) > 2

    @pytest.mark.parametrize("index", [24, -1, (0, 24), (3, -1)])
    def test_an_index_beyond_the_set_is_an_index_error(self, store: Store, image_folder: Path, index: Any) -> None:
        data = StoredCrops(store, image_folder, pixels=24)
        with pytest.raises(IndexError, match=r"image (24|-1) of 24"):
            data[index]

    def test_iteration_ends(self, store: Store, image_folder: Path) -> None:
        data = StoredCrops(store, image_folder, crops_per_image=1, pixels=8)
        assert [data[i]["path"] for i in range(24)] == [item["path"] for item in iter(data)]  # type: ignore[attr-defined]

    def test_without_targets_there_are_none(self, store: Store, image_folder: Path) -> None:
        data = StoredCrops(store, image_folder, pixels=24, with_targets=False)
        assert set(data[0]) == {"images", "label", "path"}

    def test_a_teacher_may_see_the_same_crops_at_another_size(
        self, store: Store, image_folder: Path, tiny_teacher: Any
    ) -> None:
        data = StoredCrops(store, image_folder, pixels=24, teacher_pixels=32)
        item = data[2]
        assert item["images"].shape[-1] == 24
        assert item["teacher_images"].shape == (4, 3, 32, 32)
        torch.testing.assert_close(item["targets"], tiny_teacher.embed(item["teacher_images"]), rtol=1e-4, atol=1e-5)

    def test_teacher_images_are_not_made_twice_at_one_size(self, store: Store, image_folder: Path) -> None:
        assert "teacher_images" not in StoredCrops(store, image_folder, pixels=24, teacher_pixels=24)[0]

    def test_more_images_than_the_store_has_are_fine(self, make_store: MakeStore, tmp_path: Path, images: Folder) -> None:
        store = make_store(tmp_path / "part", images=images.subset([2, 9, 23]))
        data = StoredCrops(store, images, pixels=8)
        assert [data[i]["path"] for i in range(3)] == ["ash/002.jpg", "birch/001.jpg", "cedar/007.jpg"]
        assert [data[i]["label"] for i in range(3)] == [0, 1, 2]

    def test_a_missing_image_is_named(self, store: Store, own_folder: Path) -> None:
        (own_folder / "birch/004.jpg").unlink()
        with pytest.raises(StoreError, match=r"lacks 1 of the 24 images of .*store, for instance 'birch/004\.jpg'"):
            StoredCrops(store, own_folder)

    def test_a_parent_of_the_stores_folder_is_pointed_out(self, store: Store, own_folder: Path) -> None:
        with pytest.raises(StoreError, match=rf"the store was made from; did you mean {re.escape(str(own_folder))}\?"):
            StoredCrops(store, own_folder.parent)

    def test_an_image_that_vanishes_later_is_named(self, store: Store, own_folder: Path) -> None:
        data = StoredCrops(store, own_folder, pixels=8)
        (own_folder / "ash/001.jpg").unlink()
        with pytest.raises(ImageAccessError, match=r"ash/001\.jpg: cannot be read: No such file"):
            data[1]

    def test_an_image_of_another_size_in_bytes_is_refused(self, store: Store, own_folder: Path) -> None:
        path = own_folder / "ash/001.jpg"
        path.write_bytes(path.read_bytes() + b"\0")
        data = StoredCrops(store, own_folder, pixels=8)
        with pytest.raises(ImageError, match=r"ash/001\.jpg: changed since the store was made: \d+ bytes now"):
            data[1]
        assert data[0]["path"] == "ash/000.jpg"

    @pytest.mark.parametrize("suffix", ["bmp", "ppm", "tif", "jpg"])
    def test_images_swapped_among_their_names_are_found(
        self, make_store: MakeStore, tmp_path: Path, smooth: Callable[..., npt.NDArray[np.uint8]], suffix: str
    ) -> None:
        """Uncompressed images of one shape have the same number of bytes; JPEGs may by chance."""
        a, b = tmp_path / f"set/a.{suffix}", tmp_path / f"set/b.{suffix}"
        a.parent.mkdir()
        for k, path in enumerate((a, b)):
            Image.fromarray(smooth(k, 40, 50)).save(path)
        longest = max(a.stat().st_size, b.stat().st_size)
        for path in (a, b):  # decoders ignore what follows a JPEG's end
            path.write_bytes(path.read_bytes().ljust(longest, b"\0"))
        store = make_store(tmp_path / "swapped", images=a.parent)
        assert len(StoredCrops(store, a.parent, pixels=8)[1]["images"]) == 4
        one, other = a.read_bytes(), b.read_bytes()
        a.write_bytes(other)
        b.write_bytes(one)
        data = StoredCrops(store, a.parent, pixels=8)
        for _ in range(2):  # again, if it is read again
            with pytest.raises(ImageError, match=rf"a\.{suffix}: changed since .*: other content of the same {longest} bytes"):
                data[0]
        data = StoredCrops(store, a.parent, pixels=8, scale_boxes=True)  # other files on purpose: nothing to compare
        assert len(data[0]["images"]) == 4

    def test_a_smaller_image_of_the_same_bytes_is_refused(self, store: Store, own_folder: Path) -> None:
        path = own_folder / "ash/001.jpg"
        size = path.stat().st_size
        Image.new("RGB", (6, 6)).save(path)
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        data = StoredCrops(store, own_folder, pixels=8)
        with pytest.raises(ImageError, match=r"ash/001\.jpg: changed since the store was made: other content of the same"):
            data[1]

    def test_more_crops_than_are_stored_are_refused(self, store: Store, image_folder: Path) -> None:
        with pytest.raises(RequestError, match=r"crops_per_image 5: .*store holds 4 crops of each image"):
            StoredCrops(store, image_folder, crops_per_image=5)

    @pytest.mark.parametrize("wrong", [{"crops_per_image": 0}, {"pixels": 0}])
    def test_numbers_below_one_are_refused(self, store: Store, image_folder: Path, wrong: dict[str, int]) -> None:
        with pytest.raises(RequestError, match="must be at least 1"):
            StoredCrops(store, image_folder, **wrong)  # type: ignore[arg-type]

    def test_an_unknown_column_is_refused(self, store: Store, image_folder: Path) -> None:
        with pytest.raises(StoreError, match=r"no targets of 'swav'; there are \['tiny'\]"):
            StoredCrops(store, image_folder, column="swav")

    def test_an_unfinished_column_is_refused(self, store: Store, image_folder: Path) -> None:
        (store.folder / "targets/tiny/codes-00000.json").unlink()
        with pytest.raises(StoreError, match=r"1 of 1 shard missing .*run the same fkd-ssl precompute again"):
            StoredCrops(store, image_folder)

    def test_skipped_images_are_left_out(self, make_store: MakeStore, tmp_path: Path, own_folder: Path) -> None:
        (own_folder / "ash/002.jpg").write_bytes(b"no picture")
        store = make_store(tmp_path / "skipped", images=own_folder, skip_unreadable=True)
        data = StoredCrops(store, own_folder, pixels=8)
        assert len(data) == 23
        assert "ash/002.jpg" not in [data[i]["path"] for i in range(23)]
        assert data[2]["path"] == "ash/003.jpg"


class TestSeveralTeachers:
    @pytest.fixture
    def two(self, make_store: MakeStore, new_teacher: Any, tmp_path: Path) -> Store:
        """Columns `a` and `b` over the same crops, lossless."""
        for seed, name in enumerate("ab"):
            store = make_store(tmp_path / "two", codec="Flat", teacher=new_teacher(seed=seed, name=name))
        return store

    def test_targets_come_by_name_in_the_order_asked(self, two: Store, image_folder: Path) -> None:
        options: dict[str, Any] = {"crops_per_image": 2, "pixels": 32, "seed": 5}
        both = StoredCrops(two, image_folder, column=["b", "a"], **options)[3, 7]
        assert list(both["targets"]) == ["b", "a"]
        for name in "ab":
            alone = StoredCrops(two, image_folder, column=name, **options)[3, 7]
            assert both["targets"][name].shape == (2, 16)
            assert torch.equal(both["targets"][name], alone["targets"])
            assert torch.equal(both["images"], alone["images"])
        assert not torch.allclose(both["targets"]["a"], both["targets"]["b"])

    def test_a_list_of_one_is_a_dict_too(self, two: Store, image_folder: Path) -> None:
        targets = StoredCrops(two, image_folder, column=["a"], crops_per_image=1, pixels=8)[0]["targets"]
        assert list(targets) == ["a"]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches_are_whole(self, two: Store, image_folder: Path, workers: int) -> None:
        data = StoredCrops(two, image_folder, column=["a", "b"], crops_per_image=2, pixels=8)
        (batch,) = read(data, [[(0, 4), (1, 2)]], workers)
        for name in "ab":
            rows = torch.cat([data[0, 4]["targets"][name], data[1, 2]["targets"][name]])
            assert torch.equal(batch["targets"][name], rows)

    def test_a_plain_data_loader_stacks_them(self, two: Store, image_folder: Path) -> None:
        data = StoredCrops(two, image_folder, column=["a", "b"], crops_per_image=2, pixels=8)
        batch = next(iter(DataLoader(data, batch_size=3)))
        assert batch["targets"]["b"].shape == (3, 2, 16)

    def test_one_must_be_named_where_there_are_several(self, two: Store, image_folder: Path) -> None:
        with pytest.raises(StoreError, match=r"has the columns a, b; choose one with --column"):
            StoredCrops(two, image_folder)

    def test_a_column_named_twice_is_refused(self, two: Store, image_folder: Path) -> None:
        with pytest.raises(RequestError, match=r"column a,a: a column is named twice"):
            StoredCrops(two, image_folder, column=["a", "a"])

    def test_every_column_must_be_finished(self, two: Store, image_folder: Path) -> None:
        (two.folder / "targets" / "b" / "codes-00000.json").unlink()
        with pytest.raises(StoreError, match=r"targets/b: 1 of 1 shard missing"):
            StoredCrops(Store(two.folder), image_folder, column=["a", "b"])


class TestFresh:
    def test_one_image(self, images: Folder) -> None:
        item = fresh(images)[5]
        assert set(item) == {"images", "label", "path"}
        assert (item["images"].dtype, item["images"].shape) == (torch.uint8, (2, 3, 24, 24))
        assert (item["label"], item["path"]) == (0, "ash/005.jpg")

    def test_every_pass_draws_other_crops(self, images: Folder) -> None:
        data = fresh(images)
        crops = torch.cat([data[p, 4]["images"] for p in range(4)])
        assert len({crop.numpy().tobytes() for crop in crops}) == 8

    def test_crops_are_a_function_of_seed_pass_and_image(self, images: Folder) -> None:
        a, b, c = fresh(images), fresh(images), fresh(images, seed=1)
        assert torch.equal(a[3, 4]["images"], b[3, 4]["images"])
        assert not torch.equal(a[3, 4]["images"], c[3, 4]["images"])
        assert not torch.equal(a[3, 4]["images"], a[3, 5]["images"])

    def test_crops_do_not_depend_on_the_batch(self, images: Folder) -> None:
        data = fresh(images)
        batch = data.__getitems__([(2, 7), (0, 1), (2, 3)]).batch
        assert torch.equal(batch["images"][2:4], data[0, 1]["images"])
        assert torch.equal(
            batch["images"],
            data.__getitems__([(2, 3), (0, 1), (2, 7)]).batch["images"].view(3, 2, 3, 24, 24).flip(0).flatten(0, 1),
        )

    def test_m_changes_only_how_many_are_read_at_once(self, images: Folder) -> None:
        one, two = fresh(images, crops_per_image=1), fresh(images, crops_per_image=2)
        assert torch.equal(
            torch.cat([one[p, 4]["images"] for p in range(4)]), torch.cat([two[p, 4]["images"] for p in range(2)])
        )

    def test_no_store_draws_the_same_crops(self, images: Folder) -> None:
        from fkd_ssl.crops import image_key

        fresh_records = fresh(images, seed=0)._records(0, 0, 100, 100)
        stored = draw(RECIPES["mocov2"], image_key(0, images.names[0]), 100, 100, 0, 2)
        assert not np.array_equal(fresh_records, stored)

    def test_teacher_pixels_give_the_same_boxes_larger(self, images: Folder) -> None:
        plain, twice = fresh(images), fresh(images, teacher_pixels=48)
        item = twice[1, 3]
        assert item["teacher_images"].shape == (2, 3, 48, 48)
        assert torch.equal(item["images"], plain[1, 3]["images"])
        halved = torch.nn.functional.avg_pool2d(item["teacher_images"].float(), 2)
        assert (halved - item["images"].float()).abs().mean() < 6

    def test_a_corrupt_image_is_named(self, own_folder: Path) -> None:
        (own_folder / "ash/002.jpg").write_bytes(b"\xff\xd8\xff no picture")
        with pytest.raises(ImageError, match=r"ash/002\.jpg: not a readable image"):
            fresh(scan(own_folder))[2]

    def test_an_index_beyond_the_set_is_an_index_error(self, images: Folder) -> None:
        with pytest.raises(IndexError, match="image 24 of 24"):
            fresh(images)[0, 24]


class TestUnreadable:
    """Two damaged files in the middle of a batch."""

    @pytest.fixture
    def spoilt(self, own_folder: Path) -> Path:
        (own_folder / "ash/002.jpg").write_bytes((own_folder / "ash/002.jpg").read_bytes()[:400])
        (own_folder / "ash/004.jpg").write_bytes(b"text")
        return own_folder

    def test_they_stop_by_default_and_are_named(self, own_folder: Path) -> None:
        images = scan(own_folder)
        (own_folder / "ash/004.jpg").unlink()
        with pytest.raises(ImageAccessError, match=r"ash/004\.jpg: cannot be read: No such file"):
            fresh(images).__getitems__([(0, 3), (0, 4)])

    def test_one_that_cannot_be_opened_stops_though_others_are_skipped(
        self, store: Store, own_folder: Path, images: Folder
    ) -> None:
        data = StoredCrops(store, own_folder, crops_per_image=2, pixels=24, skip_unreadable=True)
        (own_folder / "ash/004.jpg").unlink()
        for dataset in (data, fresh(scan(own_folder).subset([0, 1]), skip_unreadable=True)):
            assert dataset[0]["path"] == "ash/000.jpg"
        with pytest.raises(ImageAccessError, match=r"ash/004\.jpg: cannot be read: No such file"):
            data.__getitems__([(0, 3), (0, 4)])
        with pytest.raises(StoreError, match="lacks 1 of the 24 images"):
            StoredCrops(store, own_folder, skip_unreadable=True)

    def test_skipped_ones_are_replaced_by_others_of_the_batch_with_their_targets(
        self, store: Store, image_folder: Path, spoilt: Path, images: Folder
    ) -> None:
        there = Folder(spoilt, images.names)
        data = StoredCrops(store, there, crops_per_image=2, pixels=24, teacher_pixels=32, skip_unreadable=True)
        whole = StoredCrops(store, image_folder, crops_per_image=2, pixels=24, teacher_pixels=32)
        found = data.__getitems__([(0, 2), (0, 5), (1, 4), (1, 9)]).batch
        expected = whole.__getitems__([(0, 5), (0, 5), (1, 9), (1, 9)]).batch
        for key in ("images", "teacher_images", "targets", "labels"):
            assert torch.equal(found[key], expected[key]), key
        assert found["paths"] == expected["paths"]
        assert expected["unreadable"] == []
        first, second = found["unreadable"]
        assert "ash/002.jpg: changed since the store was made: 400 bytes now" in first
        assert "ash/004.jpg: changed since the store was made: 4 bytes now" in second

    def test_a_batch_of_none_but_unreadable_ones_stops(self, spoilt: Path, images: Folder) -> None:
        there = Folder(spoilt, images.names)
        with pytest.raises(ImageError, match=r"ash/002\.jpg: not a readable image.*none of the 2 images of this batch"):
            fresh(there, skip_unreadable=True).__getitems__([(0, 2), (0, 4)])


class TestScaledBoxes:
    @pytest.fixture
    def halved(self, image_folder: Path, tmp_path: Path) -> Path:
        for path in sorted(image_folder.rglob("*.jpg")):
            picture = Image.open(path)
            copy = tmp_path / "halved" / path.relative_to(image_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            picture.resize((round(picture.width / 2), round(picture.height / 2)), Image.Resampling.BOX).save(copy, quality=98)
        return tmp_path / "halved"

    def test_a_resized_copy_is_refused_unless_asked_for(self, store: Store, halved: Path) -> None:
        with pytest.raises(ImageError, match=r"ash/000\.jpg: changed since the store was made.*pass --scale_boxes"):
            StoredCrops(store, halved, crops_per_image=2, pixels=24)[0]

    def test_crops_of_a_copy_are_near_those_of_the_originals(self, store: Store, image_folder: Path, halved: Path) -> None:
        common: dict[str, Any] = {"crops_per_image": 4, "pixels": 24}
        exact, near = StoredCrops(store, image_folder, **common), StoredCrops(store, halved, scale_boxes=True, **common)
        distances = np.zeros((24, 24))
        for i in range(24):
            assert torch.equal(exact[i]["targets"], near[i]["targets"])
            for k in range(24):
                distances[i, k] = (exact[i]["images"].float() - near[k]["images"].float()).abs().mean()
        assert (distances.argmin(axis=1) == range(24)).all()
        assert distances.diagonal().mean() < 5  # boxes of 20 to 60 pixels, rounded to whole ones

    def test_crops_of_larger_pictures_are_nearer(self, smooth: Callable[..., Any]) -> None:
        image, records = smooth(0, 375, 500), draw(RECIPES["mocov2"], b"k" * 16, 375, 500, 0, 50)
        copy = shrink(image, 128)
        a, b = replay(image, records, 48), replay(copy, scaled(records, (375, 500), copy.shape[:2]), 48)
        assert np.abs(a.astype(float) - b).mean() < 1.5

    def test_the_originals_themselves_are_read_exactly(self, store: Store, image_folder: Path) -> None:
        exact = StoredCrops(store, image_folder, crops_per_image=2, pixels=24)
        asked = StoredCrops(store, image_folder, crops_per_image=2, pixels=24, scale_boxes=True)
        assert torch.equal(exact[7]["images"], asked[7]["images"])

    def test_a_picture_of_another_shape_is_refused(self, store: Store, halved: Path) -> None:
        Image.new("RGB", (40, 90)).save(halved / "ash/001.jpg")
        data = StoredCrops(store, halved, crops_per_image=2, pixels=24, scale_boxes=True)
        with pytest.raises(ImageError, match=r"ash/001\.jpg: 40 x 90 pixels: not a scaled"):
            data[1]

    @pytest.mark.parametrize("found", [(50, 67), (1, 1), (375, 500), (750, 1000), (128, 171)])
    def test_boxes_stay_within_the_copy_and_keep_their_share(self, found: tuple[int, int]) -> None:
        records = draw(RECIPES["fkd"], b"k" * 16, 375, 500, 0, 200)
        boxes = scaled(records, (375, 500), found)
        for first, length, before, now in (("top", "height", 375, found[0]), ("left", "width", 500, found[1])):
            start, extent = boxes[first].astype(int), boxes[length].astype(int)
            assert (extent >= 1).all()
            assert (start + extent <= now).all()
            assert np.abs(start - records[first] / before * now).max() <= 1
            assert np.abs(extent - records[length] / before * now).max() <= 1
        for name in ("flags", "order", "brightness", "sigma"):
            np.testing.assert_array_equal(boxes[name], records[name])


BATCHES = [[(0, 3), (0, 21)], [(0, 7), (1, 3)], [(1, 0), (5, 11)]]


class TestWorkers:
    def test_stored_batches_are_the_same_from_workers(self, store: Store, image_folder: Path) -> None:
        data = StoredCrops(store, image_folder, crops_per_image=2, pixels=24, teacher_pixels=32)
        alone, workers = read(data, BATCHES), read(data, BATCHES, workers=2)
        assert len(alone) == len(workers) == 3
        assert all(same(a, b) for a, b in zip(alone, workers, strict=True))

    def test_fresh_batches_are_the_same_from_workers(self, images: Folder) -> None:
        data = fresh(images)
        pairs = zip(read(data, BATCHES), read(data, BATCHES, workers=2), strict=True)
        assert all(same(a, b) for a, b in pairs)

    def test_workers_write_into_shared_memory(self, images: Folder) -> None:
        """They send the block, not the tensor, which would be copied into other shared memory."""

        def collate(samples: Any) -> bool:
            return bool(memory._leases[samples.batch["images"].data_ptr()].block.is_shared())

        for workers in (0, 1):
            assert list(Loader(fresh(images), [[0, 1], [2, 3]], workers=workers, collate=collate)) == [workers > 0] * 2

    def test_an_error_in_a_worker_keeps_its_type_and_names_the_file(self, own_folder: Path) -> None:
        (own_folder / "birch/003.jpg").write_bytes(b"\xff\xd8\xff no picture")
        with pytest.raises(ImageError, match=r"birch/003\.jpg: not a readable image"):
            read(fresh(scan(own_folder)), [[(0, i)] for i in range(24)], workers=2)


def test_workers_start_after_the_parent_has_replayed(image_folder: Path) -> None:
    """The parent has replayed crops before; a worker forked while OpenCV's thread pool runs would hang."""
    script = (
        "import sys\n"
        "from fkd_ssl.crops import RECIPES, replay_digest\n"
        "from fkd_ssl.data import FreshCrops, Loader, whole_batch\n"
        "from fkd_ssl.images import scan\n"
        "replay_digest()\n"
        "data = FreshCrops(scan(sys.argv[1]), RECIPES['mocov2'], crops_per_image=2, pixels=224)\n"
        "batches = [[4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3] for k in range(6)]\n"
        "loader = Loader(data, batches, workers=2, collate=whole_batch)\n"
        "print(sum(len(batch['images']) for batch in loader))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(image_folder)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * 24


def test_a_plain_data_loader_stacks_images(image_folder: Path) -> None:
    data = FreshCrops(scan(image_folder), RECIPES["fkd"], crops_per_image=2, pixels=16)
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert batch["images"].shape == (4, 2, 3, 16, 16)
    assert torch.equal(batch["images"].flatten(0, 1), data.__getitems__([(0, i) for i in range(4)]).batch["images"])
    assert list(batch["path"]) == [data[i]["path"] for i in range(4)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow_over_passes(store: Store, image_folder: Path) -> None:
    data = StoredCrops(store, image_folder, crops_per_image=4, pixels=64)

    def resident_after(passes: range) -> int:
        for p in passes:
            read(data, [[(p, i) for i in range(k, k + 8)] for k in range(0, 24, 8)])
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_after(range(10))
    assert resident_after(range(10, 40)) - before < 3e6  # a leak of every batch would be 35 MB


class TestDecodeOnly:
    """Batches of decoded images, whose crops are made later, give the same crops."""

    @pytest.mark.parametrize("workers", [0, 2])
    def test_made_later_they_are_the_same_batch(self, store: Store, images: Folder, workers: int) -> None:
        common: dict[str, Any] = {"crops_per_image": 2, "pixels": 32, "teacher_pixels": 40}
        batches = [[(0, 3), (0, 1)], [(1, 0)]]
        usual = read(StoredCrops(store, images, **common), batches)
        later = read(StoredCrops(store, images, decode_only=True, **common), batches, workers)
        assert all(isinstance(batch[key], CropPlan) for batch in later for key in ("images", "teacher_images"))
        assert all(same(a, replay_on_device(b)) for a, b in zip(usual, later, strict=True))

    def test_a_batch_that_has_its_crops_stays_as_it_is(self, store: Store, images: Folder) -> None:
        (batch,) = read(StoredCrops(store, images, crops_per_image=2, pixels=32), [[(0, 3)]])
        assert same(replay_on_device(batch), batch)

    def test_unreadable_ones_are_replaced_alike(self, store: Store, own_folder: Path) -> None:
        path = own_folder / store.paths[1]
        path.write_bytes(b"no picture".ljust(path.stat().st_size))
        common: dict[str, Any] = {"crops_per_image": 2, "pixels": 32, "skip_unreadable": True}
        (usual,) = read(StoredCrops(store, own_folder, **common), [[(0, 0), (0, 1), (0, 2)]])
        (later,) = read(StoredCrops(store, own_folder, decode_only=True, **common), [[(0, 0), (0, 1), (0, 2)]])
        assert later["unreadable"] == usual["unreadable"] != []
        assert same(usual, replay_on_device(later))

    def test_single_images_of_it_are_refused(self, store: Store, images: Folder) -> None:
        with pytest.raises(RequestError, match="decode_only gives whole batches"):
            StoredCrops(store, images, decode_only=True)[0]
