"""Tokens: a grid [h, w, D] of L2-normalised vectors over the crop, stored token by token with faiss's codecs."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fkd_ssl.arrays import Float32Array, UInt8Array
from fkd_ssl.errors import RequestError
from fkd_ssl.targets.embedding import Embedding
from fkd_ssl.targets.faiss_codecs import FaissCodec
from fkd_ssl.targets.kind import Codec, Shape

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = "tokens"
_PER_CROP = 16  # tokens of a crop that a codec is trained on
_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread evenly


class Tokens(Embedding):
    """Grids of L2-normalised vectors, h * w to a crop. All tokens share one codec."""

    name = TOKENS
    display_name = "tokens"

    def check_shape(self, shape: Shape) -> None:
        """Raises RequestError if the shape is not [h, w, D]."""
        if len(shape) != 3:
            raise RequestError(f"targets of shape {list(shape)}: tokens are grids [h, w, D]")

    def describe(self, shape: Shape) -> str:
        """Describes the grid and the dimension."""
        return f"{shape[0]} x {shape[1]} tokens, D = {shape[2]}"

    def of_output(self, output: "Tensor") -> "Tensor":
        """Returns the grid with each token normalised."""
        from torch.nn import functional as F

        return F.normalize(output.float(), dim=-1)

    def default_codec(self, shape: Shape) -> str:
        """Returns a product quantiser of 16 bytes per token, or of fewer that divide D; SQ4 if D has no such divisor from 8 on.

        A 7 x 7 grid of D = 384 then takes 784 bytes instead of SQ8's 18,816. From D = 512 on, the rotation also reduces the
        tokens to 256 dimensions, since its training takes minutes otherwise.
        """
        dim = shape[2]
        parts = max(m for m in range(1, 17) if dim % m == 0)
        reduced = f"_{256 // parts * parts}" if dim >= 512 else ""
        return f"OPQ{parts}{reduced},PQ{parts}x8" if parts >= 8 else "SQ4"

    def train(self, codec: str, sample: Float32Array) -> Codec:
        """Trains a FaissCodec on the tokens of the sample."""
        return GridCodec(FaissCodec.train(codec, _rows(sample)), sample.shape[1:])

    def load(self, codec: str, shape: Shape, arrays: dict[str, npt.NDArray[Any]]) -> Codec:
        """Loads a FaissCodec."""
        return GridCodec(FaissCodec.load(codec, shape[-1], arrays), shape)

    def code_size(self, codec: str, shape: Shape) -> int:
        """Returns the bytes of one crop's codes."""
        return shape[0] * shape[1] * super().code_size(codec, shape[-1:])

    def parameter_shapes(self, codec: str, shape: Shape) -> dict[str, Shape]:
        """Returns the shapes of the arrays of the faiss index, which do not depend on the grid."""
        return super().parameter_shapes(codec, shape[-1:])

    def sample_size(self, codec: str, shape: Shape) -> int:
        """Returns the number of crops that give twice as many tokens as an embedding's codec is trained on."""
        return -(-2 * super().sample_size(codec, shape) // len(_sampled(shape)))

    def min_sample(self, codec: str, shape: Shape) -> int:
        """Returns the minimum number of crops."""
        return -(-super().min_sample(codec, shape) // len(_sampled(shape)))

    def sample(self, targets: Float32Array) -> Float32Array:
        """Returns a few tokens of each crop, [n, 1, k, D]: those of one crop are alike, and all would take much memory."""
        n, h, w, dim = targets.shape
        return targets.reshape(n, h * w, dim)[:, None, _sampled((h, w))]

    def fidelity(self, exact: Float32Array, decoded: Float32Array) -> dict[str, float]:
        """Measures the cosines of decoded tokens to the originals, over all tokens."""
        return super().fidelity(_rows(exact), _rows(decoded))


class GridCodec:
    """Codes of grids of tokens: the codes of their tokens in row order, each of the same codec.

    Attributes:
        spec: faiss factory string.
        code_size: Bytes of one grid's codes.
    """

    def __init__(self, codec: FaissCodec, shape: Shape) -> None:
        self._codec = codec
        self._shape = shape
        self.spec = codec.spec
        self.code_size = shape[0] * shape[1] * codec.code_size

    def arrays(self) -> dict[str, Float32Array]:
        """Returns the trained parameters of the tokens' codec, by name."""
        return self._codec.arrays()

    def encode(self, targets: Float32Array) -> UInt8Array:
        """Encodes grids float32 [n, h, w, D] as uint8 [n, code_size]."""
        return self._codec.encode(_rows(targets)).reshape(len(targets), self.code_size)

    def decode(self, codes: UInt8Array) -> Float32Array:
        """Decodes uint8 [n, code_size] to grids float32 [n, h, w, D], all tokens in one call."""
        return self._codec.decode(codes.reshape(-1, self._codec.code_size)).reshape(len(codes), *self._shape)


def _sampled(shape: Shape) -> list[int]:
    """Returns the positions of at most `_PER_CROP` tokens, in row order, spread over a grid [h, w, ...]."""
    count = shape[0] * shape[1]
    if count <= _PER_CROP:
        return list(range(count))
    return sorted({int((0.5 + k * _GOLDEN) % 1 * count) for k in range(_PER_CROP)})


def _rows(grids: Float32Array) -> Float32Array:
    """Returns all tokens of grids [n, h, w, D] as [n * h * w, D]."""
    return np.ascontiguousarray(grids).reshape(-1, grids.shape[-1])
