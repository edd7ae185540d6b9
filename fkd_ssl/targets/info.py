"""The description of a teacher that networks, columns, cards and objectives share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fkd_ssl.errors import RequestError
from fkd_ssl.targets.precision import PRECISIONS, Precision
from fkd_ssl.targets.spec import TargetSpec

Rgb = tuple[float, float, float]
IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)
IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)
_MAX_PIXELS = 4096


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """A teacher's description.

    Raises:
        RequestError: A value is of the wrong type or out of range.
    """

    name: str
    """Default name of its column."""
    spec: TargetSpec
    """Kind and shape of its targets."""
    network: str = "not stated"
    """The architecture in words."""
    licence: str = "not stated"
    """Licence of the weights."""
    source: str | None = None
    """Origin of the weights: a URL or module:function."""
    checkpoint_sha256: str | None = None
    """sha256 of the file of weights."""
    checkpoint: str | None = field(default=None, compare=False)
    """Name of the file of weights, without its folder; not stored."""
    pixels: int = 224
    """Side of the crops that it sees: the network's default or, in a store, that of the column."""
    mean: Rgb = IMAGENET_MEAN
    """Mean of RGB in 0 to 1."""
    std: Rgb = IMAGENET_STD
    """Standard deviation of RGB in 0 to 1."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass."""
    arrays: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict, compare=False)
    """Additional arrays, for instance `prototypes` float32 [K, D]; stored as files."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _rgb(self.mean, f"teacher {self.name}: mean"))
        object.__setattr__(self, "std", _rgb(self.std, f"teacher {self.name}: std"))
        object.__setattr__(self, "licence", self.licence or "not stated")
        if min(self.std) <= 0:
            raise RequestError(f"teacher {self.name}: std {self.std}: must be positive")
        if self.precision not in PRECISIONS:
            raise RequestError(f"precision {self.precision!r}: expected {' or '.join(PRECISIONS)}")
        if type(self.pixels) is not int or not 0 < self.pixels <= _MAX_PIXELS:
            raise RequestError(f"teacher {self.name}: pixels {self.pixels!r}: expected 1 to {_MAX_PIXELS}")
        words = (self.name, self.network, self.licence)
        if not all(isinstance(word, str) for word in words) or not all(
            isinstance(word, str | None) for word in (self.source, self.checkpoint_sha256)
        ):
            raise RequestError(f"teacher {self.name!r}: name, network, licence, source and checksum are strings")

    @property
    def normalisation(self) -> str:
        """Describes mean and standard deviation."""
        mean, std = (" ".join(f"{value:g}" for value in rgb) for rgb in (self.mean, self.std))
        return f"pixels normalised by mean {mean}, std {std}"

    @property
    def if_not_finite(self) -> str:
        """What to do, or what is wrong, if the network gives NaN or infinity."""
        if self.precision != "fp32":
            return "try --precision fp32"
        return "its weights are damaged, or do not match its preprocessing"

    @property
    def description(self) -> str:
        """Describes the network, its input and its licence in one line."""
        return f"teacher {self.name}: {self.network}; {self.normalisation}; licence of the weights: {self.licence}"

    def to_json(self) -> dict[str, Any]:
        """Returns the values for meta.json: all but the arrays, which are files, and the checkpoint's name."""
        values = {key: value for key, value in vars(self).items() if key not in ("spec", "checkpoint", "arrays")}
        values |= {"kind": self.spec.kind, "shape": list(self.spec.shape)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: Any) -> "TeacherInfo":
        """Returns the teacher that meta.json describes.

        Raises:
            RequestError: A value is invalid.
            TypeError: A key is missing or unknown.
        """
        given = {**values}
        shape = given.pop("shape", None)
        if not isinstance(shape, list):
            raise TypeError(f"shape {shape!r}")
        return cls(spec=TargetSpec(given.pop("kind", None), tuple(shape)), **given)


def difference(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Describes the first key in which two JSON objects with a `teacher` differ; "" if they are equal."""
    here, there = ({**values["teacher"], **values} for values in (found, asked))
    keys = [key for key in there if key != "teacher" and here[key] != there[key]]
    return f"{keys[0]} is {here[keys[0]]}, not {there[keys[0]]}" if keys else ""


def _rgb(values: Any, what: str) -> Rgb:
    """Converts three numbers to an RGB tuple."""
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{what} {values!r:.80}: expected three numbers, of R, G and B in 0 to 1") from error
    if not max(abs(red), abs(green), abs(blue)) < 256:
        raise RequestError(f"{what} {values!r:.80}: expected three numbers, of R, G and B in 0 to 1")
    return red, green, blue
