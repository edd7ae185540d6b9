"""The interfaces of a kind of targets and of a codec."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fkd_ssl.arrays import Float32Array, UInt8Array
from fkd_ssl.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor


Shape = tuple[int, ...]


class Codec(Protocol):
    """Encodes targets as bytes and decodes them.

    Attributes:
        spec: Name of the codec.
        code_size: Bytes of one code.
    """

    spec: str
    code_size: int

    def arrays(self) -> dict[str, Float32Array]:
        """Returns the trained parameters, by name."""

    def encode(self, targets: Float32Array) -> UInt8Array:
        """Encodes targets float32 [n, *shape] as uint8 [n, code_size]."""

    def decode(self, codes: UInt8Array) -> Float32Array:
        """Decodes uint8 [n, code_size] to targets float32 [n, *shape]. Raises StoreError if the codes are damaged."""


class Kind(ABC):
    """A kind of targets and its codecs.

    Attributes:
        name: Name of the kind in meta.json.
        display_name: Name of such targets in messages.
        example_codecs: Names of some codecs.
        larger_codecs: Codecs to suggest if another one loses too much, smallest first.
        fidelity_keys: Names of the values that `fidelity` returns.
        min_cosine: Minimum mean cosine of decoded to original targets; a codec below it is rejected.
    """

    name: str
    display_name: str
    example_codecs: tuple[str, ...]
    larger_codecs: tuple[str, ...] = ()
    fidelity_keys: tuple[str, ...] = ("cosine_mean", "cosine_min")
    min_cosine: float = 0.5

    def check_shape(self, shape: Shape) -> None:
        """Raises RequestError if the shape is invalid for this kind."""
        if len(shape) != 1:
            raise RequestError(f"targets of shape {list(shape)}: {self.display_name} are vectors")

    @abstractmethod
    def describe(self, shape: Shape) -> str:
        """Describes a shape, for instance as `D = 128`."""

    @abstractmethod
    def of_output(self, output: "Tensor") -> "Tensor":
        """Converts the output of a teacher's network [B, *shape] to targets float32 [B, *shape]."""

    @abstractmethod
    def has_codec(self, codec: str) -> bool:
        """Whether `codec` can be a codec of this kind."""

    @abstractmethod
    def default_codec(self, shape: Shape) -> str:
        """Returns the default codec."""

    @abstractmethod
    def train(self, codec: str, sample: Float32Array) -> Codec:
        """Trains the codec on targets [n, *shape]. Raises RequestError if its name is invalid or the sample is too small."""

    @abstractmethod
    def load(self, codec: str, shape: Shape, arrays: dict[str, npt.NDArray[Any]]) -> Codec:
        """Loads the codec with these `arrays`. Raises StoreError if they do not fit it."""

    @abstractmethod
    def code_size(self, codec: str, shape: Shape) -> int:
        """Returns the bytes of one code, without training. Raises RequestError if the codec does not fit the shape."""

    @abstractmethod
    def parameter_shapes(self, codec: str, shape: Shape) -> dict[str, Shape]:
        """Returns the shapes of a codec's trained float32 arrays. Raises StoreError if the codec does not fit the shape."""

    @abstractmethod
    def sample_size(self, codec: str, shape: Shape) -> int:
        """Returns the maximum number of targets that a codec is trained and measured on."""

    def min_sample(self, codec: str, shape: Shape) -> int:
        """Returns the minimum number of targets for training a codec."""
        return 1

    def sample(self, targets: Float32Array) -> Float32Array:
        """Returns the part of targets [n, *shape] that a codec is trained and measured on, one row per target."""
        return targets

    def fidelity(self, exact: Float32Array, decoded: Float32Array) -> dict[str, float]:
        """Measures how close decoded targets [n, *shape] are to the originals, by the cosines of the flattened targets."""
        one, other = (values.astype(np.float64).reshape(len(values), -1) for values in (exact, decoded))
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosines = (one * other).sum(axis=1) / np.maximum(norms, 1e-12)
        return {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
