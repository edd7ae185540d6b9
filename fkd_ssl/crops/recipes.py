"""Recipes: the distributions that crops are drawn from, and the draw itself.

A crop depends on the store's seed, the image's path and the crop's index, and on nothing else: Philox4x64 is keyed by
blake2b-128 of seed and path, and crop `c` owns the 16 counter blocks from 16 c on. NumPy promises the raw stream of
Philox for ever but not its distributions, so floats are made here.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fkd_ssl.crops.records import BLUR, FLIP, GREY, JITTER, ORDERS, Records, neutral
from fkd_ssl.errors import RequestError, StoreError

ATTEMPTS = 10  # as torchvision.transforms.RandomResizedCrop
BLOCKS = 16  # Philox blocks of four 64-bit words that one crop owns
# which of a crop's 64 words serves what; the attempts' (area, ratio, top, left) are words 0 to 39
_FLIP, _JITTER, _GREY, _BLUR, _ORDER, _FACTORS, _SIGMA = 40, 41, 42, 43, 45, 46, 50


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a crop is drawn from, in the terms of torchvision's transforms."""

    name: str
    """Name in RECIPES, or one's own."""
    scale: tuple[float, float]
    """Share of the image's area, as RandomResizedCrop's `scale`."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width divided by height, log-uniform, as RandomResizedCrop's `ratio`."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.0
    """Probability of the colour jitter."""
    brightness: float = 0.0
    """Factor uniform in 1 - b to 1 + b, not below 0."""
    contrast: float = 0.0
    """Likewise."""
    saturation: float = 0.0
    """Likewise."""
    hue: float = 0.0
    """Turn uniform in -h to h, in full circles."""
    grey: float = 0.0
    """Probability of greyscale."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """The blur's standard deviation in pixels at 224 px output."""

    def __post_init__(self) -> None:
        probabilities = (self.flip, self.jitter, self.grey, self.blur)
        if not all(0 <= p <= 1 for p in probabilities):
            raise RequestError(f"recipe {self.name}: probabilities must lie in 0 to 1, got {probabilities}")
        if not (0 < self.scale[0] <= self.scale[1] <= 1) or not (0 < self.ratio[0] <= self.ratio[1]):
            raise RequestError(f"recipe {self.name}: scale {self.scale} or ratio {self.ratio} is no range")
        if not 0 <= self.hue <= 0.5 or not all(0 <= f <= 15 for f in (self.brightness, self.contrast, self.saturation)):
            raise RequestError(f"recipe {self.name}: jitter strengths must lie in 0 to 15, hue in 0 to 0.5")
        if not 0 <= self.sigma[0] <= self.sigma[1] <= 64:
            raise RequestError(f"recipe {self.name}: sigma {self.sigma} is no range in 0 to 64")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON holds it."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe of `to_dict`; raises StoreError where the values are no recipe."""
        try:
            pairs = {key: tuple(map(float, values[key])) for key in ("scale", "ratio", "sigma")}
            if any(len(pair) != 2 for pair in pairs.values()):
                raise ValueError("a range needs two numbers")
            if not isinstance(values["name"], str):
                raise TypeError("its name is no text")
            return cls(**{**values, **pairs})
        except (KeyError, TypeError, ValueError, OverflowError, RequestError) as error:
            raise StoreError(f"not a crop recipe: {error}") from error


_MOCO = {"scale": (0.2, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grey": 0.2}
_SWAV = {"scale": (0.14, 1.0), "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "grey": 0.2}
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="mocov2", jitter=0.8, blur=0.5, **_MOCO),  # type: ignore[arg-type]
        Recipe(name="s2bnn", jitter=0.6, blur=0.2, **_MOCO),  # type: ignore[arg-type]
        Recipe(name="swav", jitter=0.8, blur=0.5, **_SWAV),  # type: ignore[arg-type]
        Recipe(name="fkd", scale=(0.08, 1.0)),
    )
}
"""MoCo v2 (arXiv 2003.04297), S2-BNN (2102.08946), SwAV's global crops (2006.09882), FKD (2112.01528)."""
IMPORTED = Recipe(name="imported", scale=(0.08, 1.0))
"""Of a store whose crops came from elsewhere: they are read and never drawn."""


def image_key(seed: int, path: str) -> bytes:
    """The 16-byte Philox key of an image: blake2b-128 of the seed and the NFC POSIX relative path."""
    return hashlib.blake2b(f"{seed}\n{path}".encode(), digest_size=16).digest()


def draw(recipe: Recipe, key: bytes, height: int, width: int, first: int, count: int) -> Records:
    """Crops `first` to `first + count - 1` of an image of `height` x `width` pixels: records [count].

    The box follows torchvision's RandomResizedCrop: ten attempts of a uniform area and a log-uniform ratio, then the
    central fallback.
    """
    philox = np.random.Philox(key=int.from_bytes(key, "little"), counter=first * BLOCKS)
    words = philox.random_raw(count * BLOCKS * 4).reshape(count, BLOCKS * 4)
    u = (words >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
    records = neutral(count)
    _draw_boxes(recipe, u[:, : 4 * ATTEMPTS].reshape(count, ATTEMPTS, 4), height, width, records)

    jitter, grey, blur = u[:, _JITTER] < recipe.jitter, u[:, _GREY] < recipe.grey, u[:, _BLUR] < recipe.blur
    records["flags"] = (u[:, _FLIP] < recipe.flip) * FLIP + jitter * JITTER + grey * GREY + blur * BLUR
    records["order"] = np.where(jitter, np.floor(u[:, _ORDER] * ORDERS), 0)
    for k, name in enumerate(("brightness", "contrast", "saturation")):
        strength = getattr(recipe, name)
        low, high = max(0.0, 1 - strength), 1 + strength
        records[name] = np.where(jitter, low + u[:, _FACTORS + k] * (high - low), 1.0)
    records["hue"] = np.where(jitter, (2 * u[:, _FACTORS + 3] - 1) * recipe.hue, 0.0)
    records["sigma"] = np.where(blur, recipe.sigma[0] + u[:, _SIGMA] * (recipe.sigma[1] - recipe.sigma[0]), 0.0)
    return records


def _draw_boxes(recipe: Recipe, u: npt.NDArray[np.floating[Any]], height: int, width: int, records: Records) -> None:
    area = height * width * (recipe.scale[0] + u[:, :, 0] * (recipe.scale[1] - recipe.scale[0]))
    low, high = np.log(recipe.ratio[0]), np.log(recipe.ratio[1])
    ratio = np.exp(low + u[:, :, 1] * (high - low))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    attempt = np.argmax(fits, axis=1)
    rows = np.arange(len(u))
    w, h, top, left = w[rows, attempt], h[rows, attempt], u[rows, attempt, 2], u[rows, attempt, 3]

    fallback_w, fallback_h = float(width), float(height)
    if width < height * recipe.ratio[0]:
        fallback_h = max(1.0, np.rint(width / recipe.ratio[0]))
    elif width > height * recipe.ratio[1]:
        fallback_w = max(1.0, np.rint(height * recipe.ratio[1]))
    found = fits.any(axis=1)
    records["width"] = np.where(found, w, fallback_w)
    records["height"] = np.where(found, h, fallback_h)
    records["top"] = np.where(found, np.floor(top * (height - h + 1)), (height - fallback_h) // 2)
    records["left"] = np.where(found, np.floor(left * (width - w + 1)), (width - fallback_w) // 2)
