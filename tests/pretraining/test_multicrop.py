from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from fkd_ssl import images
from fkd_ssl.errors import ImageError
from fkd_ssl.pretraining import multicrop
from fkd_ssl.pretraining.multicrop import LARGE, SMALL, MultiCrops, small_side


def gradient(height: int = 100, width: int = 120) -> npt.NDArray[np.uint8]:
    """Red is the row and green the column, so that the mean of a crop gives its position."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 2, columns * 2, np.zeros_like(rows)], axis=2).astype(np.uint8)


@pytest.fixture
def found(tmp_path: Path) -> images.Folder:
    for k in range(3):
        Image.fromarray(gradient()).save(tmp_path / f"{k}.png")
    return images.scan(tmp_path)


def test_shapes_and_sides(found: images.Folder) -> None:
    data = MultiCrops(found, pixels=32, small_crops=6)
    batch = data.__getitems__([(0, 2), (0, 0)]).batch
    assert len(data) == 3
    assert batch["paths"] == ["2.png", "0.png"]
    assert batch["images"].shape == (4, 3, 32, 32)
    assert batch["small_images"].shape == (12, 3, 14, 14)
    for part in (batch["images"], batch["small_images"]):
        assert part.dtype == torch.uint8
        assert part.is_contiguous(memory_format=torch.channels_last)
    assert [small_side(pixels) for pixels in (224, 64, 1)] == [96, 27, 1]


def test_a_crop_depends_on_pass_image_and_seed_alone(found: images.Folder) -> None:
    data = MultiCrops(found, pixels=16, small_crops=2)
    together, alone = data.__getitems__([(1, 0), (1, 2)]).batch, data.__getitems__([(1, 2)]).batch
    assert torch.equal(together["images"][2:], alone["images"])
    assert torch.equal(together["small_images"][2:], alone["small_images"])
    others = [data.__getitems__([(2, 2)]), MultiCrops(found, pixels=16, small_crops=2, seed=1).__getitems__([(1, 2)])]
    assert all(not torch.equal(other.batch[key], alone[key]) for other in others for key in ("images", "small_images"))
    assert not torch.equal(alone["images"][0], alone["images"][1])


def test_large_and_small_crops_cover_what_swavs_cover(found: images.Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales 0.14 to 1 and 0.05 to 0.14 of the area (arXiv 2006.09882, appendix A.3)."""
    areas: dict[str, list[float]] = {"swav": [], "swav_small": []}
    draw = multicrop.draw

    def recording(recipe: Any, *rest: Any) -> Any:
        records = draw(recipe, *rest)
        areas[recipe.name] += (records["height"].astype(int) * records["width"].astype(int) / 12000).tolist()
        return records

    monkeypatch.setattr(multicrop, "draw", recording)
    data = MultiCrops(found, pixels=8, small_crops=6)
    for pass_ in range(60):
        data.__getitems__([(pass_, i) for i in range(3)])
    assert len(areas["swav"]) == 360
    assert len(areas["swav_small"]) == 1080
    assert 0.13 < min(areas["swav"]) < 0.2
    assert max(areas["swav"]) > 0.85
    assert 0.045 < min(areas["swav_small"]) < 0.055
    assert 0.13 < max(areas["swav_small"]) < 0.15
    assert {**SMALL.__dict__, "name": "", "scale": ()} == {**LARGE.__dict__, "name": "", "scale": ()}


def test_an_unreadable_image_is_named(found: images.Folder) -> None:
    found.file(1).write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"1\.png: not a readable image"):
        MultiCrops(found, pixels=8, small_crops=0).__getitems__([(0, 1)])


def test_a_damaged_image_is_replaced_by_another_one_of_its_batch(found: images.Folder) -> None:
    found.file(1).write_bytes(b"no picture")
    batch = MultiCrops(found, pixels=16, small_crops=2, skip_unreadable=True).__getitems__([(3, 0), (3, 1)]).batch
    alone = MultiCrops(found, pixels=16, small_crops=2).__getitems__([(3, 0)]).batch
    for key in ("images", "small_images"):
        assert torch.equal(batch[key], torch.cat([alone[key], alone[key]]))
    assert batch["paths"] == ["0.png", "0.png"]
    assert batch["unreadable"] == [f"{found.file(1)}: not a readable image: unknown image format"]
