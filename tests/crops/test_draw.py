"""The draw: what it depends on, its distribution compared with torchvision's, and a golden file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from fkd_ssl.crops import CROP_DTYPE, RECIPES, Recipe, draw, image_key, well_formed
from fkd_ssl.crops.operations import BLUR, FLIP, JITTER, OPERATIONS
from fkd_ssl.crops.records import unpack
from fkd_ssl.errors import RequestError, StoreError

GOLDEN = Path(__file__).with_name("golden_draws.json")
GOLDEN_IMAGES = (("n01440764/tench.JPEG", 375, 500), ("café/x.jpg", 31, 1200))
EXTREMES = [(1, 1), (2, 3000), (3000, 2), (1, 65535), (65535, 65535), (7, 5)]


def key(name: str = "a/1.jpg", seed: int = 0) -> bytes:
    return image_key(seed, name)


def golden() -> dict[str, list[list[float]]]:
    return {
        f"{recipe} {path}": [
            [value.item() for value in record] for record in draw(RECIPES[recipe], image_key(7, path), height, width, 0, 6)
        ]
        for recipe in sorted(RECIPES)
        for path, height, width in GOLDEN_IMAGES
    }


def test_draws_are_those_of_the_golden_file():
    """Changed draws give other stores for the same seed: never change the file without a new format version."""
    assert golden() == json.loads(GOLDEN.read_text())


def test_key_is_blake2b_of_seed_and_path():
    assert image_key(0, "a/1.jpg").hex() == "b2788bb09c0bb08cc135841b96cbf282"
    assert len({image_key(seed, path) for seed in range(5) for path in ("a", "b", "1\na")}) == 15


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_first_crops_of_many_are_the_crops_of_few(name):
    many = draw(RECIPES[name], key(), 200, 300, 0, 400)
    for count in (0, 1, 7, 399):
        np.testing.assert_array_equal(draw(RECIPES[name], key(), 200, 300, 0, count), many[:count])


def test_draws_from_an_offset_are_a_slice_in_any_order():
    many = draw(RECIPES["mocov2"], key(), 200, 300, 0, 60)
    for first in (59, 3, 31, 0):
        np.testing.assert_array_equal(draw(RECIPES["mocov2"], key(), 200, 300, first, 1), many[first : first + 1])
    np.testing.assert_array_equal(draw(RECIPES["mocov2"], key(), 200, 300, 17, 20), many[17:37])


def test_far_crops_can_be_drawn():
    assert len(np.unique(draw(RECIPES["mocov2"], key(), 200, 300, 2**40, 16))) == 16


def test_other_seed_or_path_gives_other_crops():
    base = draw(RECIPES["mocov2"], key(), 200, 300, 0, 50)
    for other in (key(seed=1), key("a/2.jpg")):
        assert not (draw(RECIPES["mocov2"], other, 200, 300, 0, 50) == base).any()
    assert len(np.unique(base)) == 50


@pytest.mark.parametrize(("height", "width"), [(300, 400), (120, 500), (500, 100)])
@pytest.mark.parametrize("name", ["mocov2", "swav", "fkd"])
def test_boxes_are_distributed_as_torchvisions(height, width, name):
    recipe = RECIPES[name]
    count = 4000
    ours = draw(recipe, key("boxes"), height, width, 0, count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        image = torch.empty(1, height, width)
        theirs = np.array([RandomResizedCrop.get_params(image, list(recipe.scale), list(recipe.ratio)) for _ in range(count)])
    mine = np.stack([ours[field].astype(int) for field in ("top", "left", "height", "width")], axis=1)

    def views(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, h, w = boxes.T
        return {
            "area": h * w / (height * width),
            "ratio": w / h,
            "top": top,
            "left": left,
            "bottom": height - top - h,
            "right": width - left - w,
        }

    for what, values in views(mine).items():
        result = stats.ks_2samp(values, views(theirs)[what])
        assert result.pvalue > 1e-3, (what, result)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_probabilities(name):
    recipe, count = RECIPES[name], 8000
    flags = draw(recipe, key("flags"), 200, 300, 0, count)["flags"]
    bits = {name: flag.bit for operation in OPERATIONS for name, flag in operation.flags.items()}
    assert bits.keys() >= {"flip", "jitter", "grey", "blur"}
    for name, bit in bits.items():
        probability = getattr(recipe, name)
        share = ((flags & bit) > 0).mean()
        assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / count), bit
    pairs = np.corrcoef([(flags & bit) > 0 for bit in (FLIP, BLUR)]) if recipe.blur else np.eye(2)
    assert abs(pairs[0, 1]) < 4 / math.sqrt(count)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_factors_lie_in_their_ranges_and_fill_them(name):
    recipe = RECIPES[name]
    records = draw(recipe, key("factors"), 200, 300, 0, 8000)
    jittered, blurred = (records["flags"] & JITTER) > 0, (records["flags"] & BLUR) > 0
    for field in ("brightness", "contrast", "saturation", "hue"):
        values, strength = records[field].astype(float), getattr(recipe, field)
        centre = 0.0 if field == "hue" else 1.0
        assert (values[~jittered] == centre).all()
        if jittered.any():
            drawn = values[jittered]
            assert np.abs(drawn - centre).max() <= strength + 1e-3
            assert stats.kstest(drawn, "uniform", (centre - strength, 2 * strength)).pvalue > 1e-3
    assert (records["sigma"][~blurred] == 0).all()
    if blurred.any():
        drawn = records["sigma"][blurred].astype(float)
        assert stats.kstest(drawn, "uniform", (recipe.sigma[0], recipe.sigma[1] - recipe.sigma[0])).pvalue > 1e-3
    assert (records["order"][~jittered] == 0).all()
    if jittered.any():
        counts = np.bincount(records["order"][jittered], minlength=24)
        assert len(counts) == 24
        assert stats.chisquare(counts).pvalue > 1e-3
    assert well_formed(records)


def test_factors_are_not_drawn_below_nought():
    strong = Recipe(name="strong", scale=(0.2, 1.0), jitter=1.0, brightness=3.0)
    brightness = draw(strong, key(), 10, 10, 0, 2000)["brightness"].astype(float)
    assert brightness.min() >= 0
    assert stats.kstest(brightness, "uniform", (0, 4)).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width"), EXTREMES)
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_boxes_lie_inside_any_image(height, width, name):
    records = draw(RECIPES[name], key("extreme"), height, width, 0, 300)
    unpack(records, height, width)
    assert records.dtype == CROP_DTYPE


@pytest.mark.parametrize(
    ("height", "width", "box"), [(2, 3000, (0, 1498, 2, 3)), (3000, 2, (1498, 0, 3, 2)), (30, 600, (0, 280, 30, 40))]
)
def test_fallback_is_torchvisions_central_one(height, width, box):
    recipe = Recipe(name="whole", scale=(1.0, 1.0))  # no box of the full area fits into these images
    theirs = RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], list(recipe.ratio))
    record = draw(recipe, key(), height, width, 0, 1)[0]
    ours = tuple(int(record[field]) for field in ("top", "left", "height", "width"))
    assert ours == tuple(theirs) == box


def test_positions_reach_both_edges():
    records = draw(Recipe(name="fixed", scale=(0.25, 0.25), ratio=(1.0, 1.0)), key(), 8, 8, 0, 2000)
    assert set(records["height"]) == set(records["width"]) == {4}
    for side in ("top", "left"):
        counts = np.bincount(records[side], minlength=5)
        assert len(counts) == 5
        assert stats.chisquare(counts).pvalue > 1e-3


# recipes


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_comes_back_from_json(name):
    recipe = RECIPES[name]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flip": 1.5}, r"flip 1\.5 is not in 0 to 1"),
        ({"grey": -0.1}, r"grey -0\.1 is not in 0 to 1"),
        ({"scale": (0.0, 1.0)}, r"scale \(0\.0, 1\.0\) is not a valid range above 0 and up to 1"),
        ({"scale": (0.5, 0.2)}, r"scale \(0\.5, 0\.2\) is not a valid range"),
        ({"scale": (0.5, 1.2)}, r"scale \(0\.5, 1\.2\) is not a valid range"),
        ({"ratio": (0.0, 1.0)}, r"ratio \(0\.0, 1\.0\) is not a valid range above 0"),
        ({"hue": 0.6}, r"hue 0\.6 is not in 0 to 0\.5"),
        ({"hue": float("nan")}, "hue nan is not in 0 to 0"),
        ({"contrast": -1.0}, r"contrast -1\.0 is not in 0 to 15"),
        ({"sigma": (2.0, 1.0)}, r"sigma \(2\.0, 1\.0\) is not a valid range in 0 to 64"),
        ({"sigma": (0.1, 65.0)}, r"sigma \(0\.1, 65\.0\) is not a valid range in 0 to 64"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(RequestError, match=f"recipe odd: .*{message}"):
        Recipe(**{"name": "odd", "scale": (0.2, 1.0), **change})


@pytest.mark.parametrize(
    "change",
    [
        {"scale": [0.1]},
        {"scale": None},
        {"sigma": ["a", "b"]},
        {"sigma": 1.0},
        {"sigma": [1.0]},
        {"unknown": 1},
        {"flip": 2},
        {"flip": [0.0, 1.0]},
        {"name": 3},
        {"hue": "red"},
        {"ratio": [1, 2, 3]},
    ],
)
def test_damaged_recipes_are_store_errors(change):
    with pytest.raises(StoreError, match="not a crop recipe: "):
        Recipe.from_dict({**RECIPES["mocov2"].to_dict(), **change})
    with pytest.raises(StoreError, match=r"not a crop recipe: .*'scale'"):
        Recipe.from_dict({"name": "a"})


def test_a_setting_that_an_older_store_lacks_has_its_default():
    assert Recipe.from_dict({"name": "fkd", "scale": [0.08, 1.0]}) == RECIPES["fkd"]
