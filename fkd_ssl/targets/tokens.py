"""Tokens: a grid [h, w, D] of L2-normalised vectors over the crop, stored token by token with faiss's codecs."""

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fkd_ssl.arrays import Float32Array, UInt8Array
from fkd_ssl.errors import RequestError
from fkd_ssl.targets.embedding import Embedding
from fkd_ssl.targets.faiss_codecs import FaissCodec, normalise
from fkd_ssl.targets.kind import Codec, Shape

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = "tokens"
_PER_CROP = 16  # tokens of a crop that a codec is trained on
_MIN_CROPS = 512


class Tokens(Embedding):
    """Grids of L2-normalised vectors, h * w per crop. All tokens share one codec."""

    name = TOKENS
    display_name = "tokens"
    larger_codecs = ("SQ4", *Embedding.larger_codecs)

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
        """Returns the number of crops that give as many tokens as an embedding's codec is trained on, and at least 512."""
        return max(_MIN_CROPS, -(-super().sample_size(codec, shape) // len(_sampled(*shape[:2]))))

    def min_sample(self, codec: str, shape: Shape) -> int:
        """Returns the minimum number of crops."""
        return -(-super().min_sample(codec, shape) // len(_sampled(*shape[:2])))

    def sample(self, targets: Float32Array) -> Float32Array:
        """Returns a few tokens of each crop, [n, 1, k, D]: those of one crop are alike, and all would take much memory."""
        n, h, w, dim = targets.shape
        return targets.reshape(n, h * w, dim)[:, None, _sampled(h, w)]

    def fidelity(self, exact: Float32Array, decoded: Float32Array) -> dict[str, float]:
        """Measures the cosines of decoded tokens to the originals; a token of zeros, after a ReLU, has no direction."""
        tokens, found = _rows(exact), _rows(decoded)
        some = tokens.any(axis=1)
        return super().fidelity(tokens[some], found[some]) if some.any() else super().fidelity(tokens, found)


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
        tokens = codes.reshape(-1, self._codec.code_size)
        decoded = self._codec.decode(tokens) if self._table is None or not len(codes) else self._decode_by_table(tokens)
        return decoded.reshape(len(codes), *self._shape)

    @functools.cached_property
    def _table(self) -> "tuple[Tensor, Tensor, Float32Array] | None":
        """Rows of all parts [m * 256, D], the first row of each part, and the constant; see FaissCodec.table."""
        import torch

        found = self._codec.table()
        if found is None:
            return None
        parts, constant = found
        first = 256 * torch.arange(len(parts), dtype=torch.int32)
        return torch.from_numpy(parts.reshape(-1, parts.shape[2])), first, constant

    def _decode_by_table(self, codes: UInt8Array) -> Float32Array:
        """Decodes like FaissCodec, up to rounding, but faster: 12,544 tokens of D = 384 in 7 ms instead of 38."""
        import torch
        from torch.nn import functional as F

        assert self._table is not None
        rows, first, constant = self._table
        indices = torch.from_numpy(codes.astype(np.int32)) + first
        with torch.no_grad():
            decoded: Float32Array = F.embedding_bag(indices, rows, mode="sum").numpy()
        decoded += constant
        return normalise(decoded)


def _sampled(height: int, width: int) -> list[int]:
    """Returns the positions of at most `_PER_CROP` tokens of a grid, in row order, spread over rows and columns."""
    count = height * width
    step = next(step for step in itertools.count(width + width // 2 + 1) if math.gcd(step, count) == 1)
    return sorted(k * step % count for k in range(min(count, _PER_CROP)))


def _rows(grids: Float32Array) -> Float32Array:
    """Returns all tokens of grids [n, h, w, D] as [n * h * w, D]."""
    return np.ascontiguousarray(grids).reshape(-1, grids.shape[-1])
