"""What a kind of targets must know of itself."""

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
    """Turns targets into bytes and back.

    Attributes:
        spec: Its name.
        code_size: Bytes of one code.
    """

    spec: str
    code_size: int

    def arrays(self) -> dict[str, Float32Array]:
        """What its training has found, by name."""

    def encode(self, targets: Float32Array) -> UInt8Array:
        """Codes uint8 [n, code_size] of targets float32 [n, *shape]."""

    def decode(self, codes: UInt8Array) -> Float32Array:
        """Targets float32 [n, *shape] of codes uint8 [n, code_size]; raises StoreError where they are damaged."""


class Kind(ABC):
    """A kind of targets and its codecs.

    Attributes:
        name: As meta.json has it.
        words: What such targets are called in messages.
        examples: Names of codecs.
        larger: Codecs to advise where another one loses too much, small ones first.
        measures: What `measure` gives.
        min_cosine: Of decoded to original targets in the mean, below which a codec is refused.
    """

    name: str
    words: str
    examples: tuple[str, ...]
    larger: tuple[str, ...] = ()
    measures: tuple[str, ...] = ("cosine_mean", "cosine_min")
    min_cosine: float = 0.5

    def check_shape(self, shape: Shape) -> None:
        """Raises RequestError where no target of this kind has that shape."""
        if len(shape) != 1:
            raise RequestError(f"targets of shape {list(shape)}: {self.words} are vectors")

    @abstractmethod
    def describe(self, shape: Shape) -> str:
        """A shape in words, for instance `D = 128`."""

    @abstractmethod
    def of_output(self, output: "Tensor") -> "Tensor":
        """Targets float32 [B, *shape] of what a teacher's network gives [B, *shape]."""

    @abstractmethod
    def has_codec(self, codec: str) -> bool:
        """Whether `codec` may be one of this kind's."""

    @abstractmethod
    def default_codec(self, shape: Shape) -> str:
        """The codec that is used if none is asked for."""

    @abstractmethod
    def train(self, codec: str, sample: Float32Array) -> Codec:
        """The codec, trained on targets [n, *shape]; raises RequestError where the name is invalid or the sample too small."""

    @abstractmethod
    def load(self, codec: str, shape: Shape, arrays: dict[str, npt.NDArray[Any]]) -> Codec:
        """The codec with these `arrays`; raises StoreError where they do not fit."""

    @abstractmethod
    def code_size(self, codec: str, shape: Shape) -> int:
        """Bytes of one code, without training; raises RequestError where the codec does not fit the shape."""

    @abstractmethod
    def parameter_shapes(self, codec: str, shape: Shape) -> dict[str, Shape]:
        """Shapes of the float32 arrays that a codec's training finds; raises StoreError where it does not fit the shape."""

    @abstractmethod
    def sample_size(self, codec: str) -> int:
        """How many targets a codec is trained and measured on, where there are so many."""

    def min_sample(self, codec: str) -> int:
        """How many targets a codec needs at least to be trained."""
        return 1

    def measure(self, exact: Float32Array, decoded: Float32Array) -> dict[str, float]:
        """How near decoded targets [n, *shape] are to the original ones: their cosines, each target taken as one vector."""
        one, other = (values.astype(np.float64).reshape(len(values), -1) for values in (exact, decoded))
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosines = (one * other).sum(axis=1) / np.maximum(norms, 1e-12)
        return {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())}
