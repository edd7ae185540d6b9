"""Recipes: the distributions that crops are drawn from, and the draw itself.

The random numbers of a crop depend only on the store's seed, the image's path and the crop's index: the key of Philox4x64 is
blake2b-128 of seed and path, and crop `c` uses the 16 counter blocks from 16 c on. NumPy guarantees that the raw stream of
Philox never changes, but not its distributions, so this module converts the stream to floats itself.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from fkd_ssl.crops.operations import OPERATIONS, BlurSettings, ColourSettings, FlipSettings
from fkd_ssl.crops.records import Records, neutral
from fkd_ssl.errors import RequestError, StoreError

ATTEMPTS = 10  # as in torchvision.transforms.RandomResizedCrop
BLOCKS = 16  # Philox blocks of four 64-bit words per crop; the attempts' (area, ratio, top, left) are words 0 to 39


@dataclass(frozen=True, kw_only=True)
class BoxSettings:
    """The recipe's name, and the box as in torchvision's RandomResizedCrop."""

    name: str
    """A name in `RECIPES`, or a new one."""
    scale: tuple[float, float]
    """Range of the area of the box, as a fraction of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of width divided by height, log-uniform."""


@dataclass(frozen=True, kw_only=True)
class Recipe(BlurSettings, ColourSettings, FlipSettings, BoxSettings):
    """The distribution that crops are drawn from, in the terms of torchvision's transforms.

    Its fields are those of the box and the settings of each operation in `fkd_ssl.crops.operations.OPERATIONS`.

    Raises:
        RequestError: A value is out of range.
    """

    def __post_init__(self) -> None:
        if not (0 < self.scale[0] <= self.scale[1] <= 1):
            raise RequestError(f"recipe {self.name}: scale {self.scale} is not a valid range above 0 and up to 1")
        if not (0 < self.ratio[0] <= self.ratio[1]):
            raise RequestError(f"recipe {self.name}: ratio {self.ratio} is not a valid range above 0")
        for setting in fields(self):
            if not setting.metadata:
                continue
            value, low, high = getattr(self, setting.name), setting.metadata["low"], setting.metadata["high"]
            if isinstance(setting.default, tuple):
                if not low <= value[0] <= value[1] <= high:
                    raise RequestError(f"recipe {self.name}: {setting.name} {value} is not a valid range in {low} to {high}")
            elif not low <= value <= high:
                raise RequestError(f"recipe {self.name}: {setting.name} {value} is not in {low} to {high}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as a dictionary for JSON."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Returns the recipe of `to_dict`. A missing setting has its default. Raises StoreError if the values are invalid."""
        try:
            pairs = {key: tuple(map(float, value)) for key, value in values.items() if isinstance(value, list)}
            if any(len(pair) != 2 for pair in pairs.values()):
                raise ValueError("a range needs two numbers")
            if not isinstance(values["name"], str):
                raise TypeError("its name is not a string")
            return cls(**{**values, **pairs})
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RequestError) as error:
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
        Recipe(name="simreg", scale=(0.2, 1.0)),
    )
}
"""MoCo v2 (arXiv 2003.04297), S2-BNN (2102.08946), SwAV's global crops (2006.09882), FKD (2112.01528), SimReg (2201.05131).

SwAV's script for ResNet-50 w4 has a minimum scale of 0.08, and the generator of FKD's labels a maximum of 0.936:
`precompute` has `min_scale` and `max_scale`."""
IMPORTED = Recipe(name="imported", scale=(0.08, 1.0))
"""The recipe of stores with imported crops, which cannot be drawn again."""


def image_key(seed: int, path: str) -> bytes:
    """Returns the 16-byte Philox key of an image: blake2b-128 of the seed and the NFC POSIX relative path."""
    return hashlib.blake2b(f"{seed}\n{path}".encode(), digest_size=16).digest()


def draw(recipe: Recipe, key: bytes, height: int, width: int, first: int, count: int) -> Records:
    """Draws crops `first` to `first + count - 1` of an image of `height` x `width` pixels: records [count].

    The box follows torchvision's RandomResizedCrop: ten attempts of a uniform area and a log-uniform ratio, then the
    central fallback.
    """
    philox = np.random.Philox(key=int.from_bytes(key, "little"), counter=first * BLOCKS)
    words = philox.random_raw(count * BLOCKS * 4).reshape(count, BLOCKS * 4)
    u = ((words >> np.uint64(11)) * 2.0**-53).astype(np.float64, copy=False)  # uniform in [0, 1)
    records = neutral(count)
    _draw_boxes(recipe, u[:, : 4 * ATTEMPTS].reshape(count, ATTEMPTS, 4), height, width, records)

    flags = np.zeros(count, dtype=np.uint8)
    for operation in OPERATIONS:
        drawn = [u[:, flag.word] < getattr(recipe, name) for name, flag in operation.flags.items()]
        for mask, flag in zip(drawn, operation.flags.values(), strict=True):
            flags += mask * np.uint8(flag.bit)
        for name, field in operation.fields.items():
            records[name] = np.where(drawn[0], field.draw(recipe, u[:, field.word]), field.default)
    records["flags"] = flags
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
