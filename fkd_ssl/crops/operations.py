"""The table of augmentations: their flags, their fields in a crop record, and how they are drawn and applied.

The dtype of records, the fields of `Recipe`, `well_formed`, the draw and `replay` are built from this table. To add an
augmentation, add an entry with its CPU implementation here, and the device implementation of the same name in `kernels.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fkd_ssl.crops import blur, colour, flip

Uniform = npt.NDArray[np.float64]  # random numbers in [0, 1), one per crop


def setting(default: Any, low: float, high: float) -> Any:
    """Returns a dataclass field of a recipe: a number or a (low, high) pair, which must be between `low` and `high`."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One bit of a record's flags. A recipe sets its probability under the flag's name."""

    bit: int
    word: int
    """Index, among a crop's 64 random words, of the word that decides whether the bit is set."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One number of a crop record."""

    dtype: str
    word: int
    """Index of the random word that it is drawn from."""
    draw: Callable[[Any, Uniform], npt.NDArray[Any]]
    """`draw(recipe, u)` returns the values of n crops from their random words, given as numbers `u` in [0, 1)."""
    default: float
    """Value in crops without the first flag of the operation."""
    low: float
    high: float
    """Smallest and largest valid value."""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An augmentation. It has several flags if their effects are computed in one pass, such as `jitter` and `grey`."""

    name: str
    settings: type
    """Dataclass of its settings in a recipe, a base class of `Recipe`."""
    flags: Mapping[str, Flag]
    fields: Mapping[str, Field] = field(default_factory=dict)
    on_cpu: Callable[..., None]
    """`on_cpu(view, flags, *fields)` changes a crop, uint8 [P, P, 3], in place. It is called if any of the flags is set."""
    parameters: Callable[..., tuple[npt.NDArray[Any], ...]] = lambda pixels, applied, flags, *fields: ()
    """`parameters(pixels, applied, flags, *fields)` returns the arrays [n, ...] that the device implementation needs for n
    records of crops of `pixels`. `applied`, bool [n], marks the records that have any of the flags."""

    @property
    def bits(self) -> int:
        """All of its flags, combined."""
        return sum(flag.bit for flag in self.flags.values())


@dataclass(frozen=True, kw_only=True)
class ColourSettings:
    """Colour jitter and greyscale."""

    jitter: float = setting(0.0, 0, 1)
    """Probability of the colour jitter."""
    brightness: float = setting(0.0, 0, 15)
    """The brightness factor is uniform in [max(0, 1 - brightness), 1 + brightness]."""
    contrast: float = setting(0.0, 0, 15)
    """The contrast factor is uniform in [max(0, 1 - contrast), 1 + contrast]."""
    saturation: float = setting(0.0, 0, 15)
    """The saturation factor is uniform in [max(0, 1 - saturation), 1 + saturation]."""
    hue: float = setting(0.0, 0, 0.5)
    """The hue shift is uniform in [-hue, hue], in full circles."""
    grey: float = setting(0.0, 0, 1)
    """Probability of converting the crop to greyscale."""


@dataclass(frozen=True, kw_only=True)
class BlurSettings:
    """Gaussian blur."""

    blur: float = setting(0.0, 0, 1)
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = setting((0.1, 2.0), 0, 64)
    """Range of the blur's standard deviation, in pixels of a crop of 224 px."""


@dataclass(frozen=True, kw_only=True)
class FlipSettings:
    """Horizontal flip."""

    flip: float = setting(0.5, 0, 1)
    """Probability of a horizontal flip."""


def _order(recipe: Any, u: Uniform) -> Uniform:
    return np.floor(u * colour.ORDERS)


def _factor(name: str) -> Callable[[Any, Uniform], Uniform]:
    def draw(recipe: Any, u: Uniform) -> Uniform:
        strength = getattr(recipe, name)
        low, high = max(0.0, 1 - strength), 1 + strength
        values: Uniform = low + u * (high - low)
        return values

    return draw


def _hue(recipe: Any, u: Uniform) -> Uniform:
    return np.asarray((2 * u - 1) * recipe.hue)


def _sigma(recipe: Any, u: Uniform) -> Uniform:
    return np.asarray(recipe.sigma[0] + u * (recipe.sigma[1] - recipe.sigma[0]))


FLIP, JITTER, GREY, BLUR = 1, colour.JITTER, colour.GREY, 8

OPERATIONS = (
    Operation(
        name="colour",
        settings=ColourSettings,
        flags={"jitter": Flag(bit=JITTER, word=41), "grey": Flag(bit=GREY, word=42)},
        fields={
            "order": Field(dtype="u1", word=45, draw=_order, default=0, low=0, high=colour.ORDERS - 1),
            "brightness": Field(dtype="<f2", word=46, draw=_factor("brightness"), default=1, low=0, high=16),
            "contrast": Field(dtype="<f2", word=47, draw=_factor("contrast"), default=1, low=0, high=16),
            "saturation": Field(dtype="<f2", word=48, draw=_factor("saturation"), default=1, low=0, high=16),
            "hue": Field(dtype="<f2", word=49, draw=_hue, default=0, low=-0.5, high=0.5),
        },
        on_cpu=colour.apply,
        parameters=colour.parameters,
    ),
    Operation(
        name="blur",
        settings=BlurSettings,
        flags={"blur": Flag(bit=BLUR, word=43)},
        fields={"sigma": Field(dtype="<f2", word=50, draw=_sigma, default=0, low=0, high=64)},
        on_cpu=blur.apply,
        parameters=blur.parameters,
    ),
    Operation(name="flip", settings=FlipSettings, flags={"flip": Flag(bit=FLIP, word=40)}, on_cpu=flip.apply),
)
"""All augmentations, in the order in which `replay` applies them. Words 0 to 39 draw the box; 44 and 51 to 63 are free."""

FLAGS = sum(operation.bits for operation in OPERATIONS)
