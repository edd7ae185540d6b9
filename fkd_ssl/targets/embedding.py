"""Embeddings: L2-normalised vectors [D], stored with faiss's codecs."""

from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from fkd_ssl.arrays import Float32Array
from fkd_ssl.targets import faiss_codecs
from fkd_ssl.targets.faiss_codecs import FaissCodec
from fkd_ssl.targets.kind import Codec, Kind, Shape
from fkd_ssl.targets.label_codecs import is_label

if TYPE_CHECKING:
    from torch import Tensor


class Embedding(Kind):
    """L2-normalised vectors."""

    name = "embedding"
    display_name = "embeddings"
    example_codecs = faiss_codecs.EXAMPLES
    larger_codecs: tuple[str, ...] = ("SQ8", "SQfp16", "Flat")

    def describe(self, shape: Shape) -> str:
        """Describes the dimension."""
        return f"D = {shape[0]}"

    def of_output(self, output: "Tensor") -> "Tensor":
        """Returns the normalised vectors."""
        from torch.nn import functional as F

        return F.normalize(output.float(), dim=1)

    def has_codec(self, codec: str) -> bool:
        """Whether `codec` is not one for class probabilities. Faiss's names are checked when they are used."""
        return not is_label(codec)

    def default_codec(self, shape: Shape) -> str:
        """Returns SQ8, which takes one byte per dimension."""
        return "SQ8"

    def train(self, codec: str, sample: Float32Array) -> Codec:
        """Trains a FaissCodec."""
        return FaissCodec.train(codec, sample)

    def load(self, codec: str, shape: Shape, arrays: dict[str, npt.NDArray[Any]]) -> Codec:
        """Loads a FaissCodec."""
        return FaissCodec.load(codec, shape[0], arrays)

    def code_size(self, codec: str, shape: Shape) -> int:
        """Returns the bytes of one code."""
        return faiss_codecs.code_size(codec, shape[0])

    def parameter_shapes(self, codec: str, shape: Shape) -> dict[str, Shape]:
        """Returns the shapes of the arrays of the faiss index."""
        return faiss_codecs.parameter_shapes(codec, shape[0])

    def sample_size(self, codec: str, shape: Shape) -> int:
        """Returns the size of the sample, which grows with the number of centroids."""
        return faiss_codecs.sample_size(codec)

    def min_sample(self, codec: str, shape: Shape) -> int:
        """Returns the minimum size of the sample, which grows with the number of centroids."""
        return faiss_codecs.min_sample(codec)
