"""Class probabilities [K], stored with the label codecs."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fkd_ssl.arrays import Float32Array
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.targets.kind import Codec, Kind, Shape
from fkd_ssl.targets.label_codecs import LABELS, LabelCodec, is_label

if TYPE_CHECKING:
    from torch import Tensor

_MAX_CLASSES_FULL = 10  # up to here, all probabilities take no more bytes than five probabilities and their class numbers
_SAMPLE = 512  # only for measuring the fidelity, since nothing is trained


class Distribution(Kind):
    """Class probabilities."""

    name = "distribution"
    display_name = "class probabilities"
    example_codecs = LABELS
    fidelity_keys = ("cosine_mean", "cosine_min", "total_variation_mean", "total_variation_max")
    min_cosine = 0.0

    def describe(self, shape: Shape) -> str:
        """Describes the number of classes."""
        return f"D = {shape[0]}"

    def of_output(self, output: "Tensor") -> "Tensor":
        """Returns the softmax of the logits."""
        return output.float().softmax(dim=1)

    def has_codec(self, codec: str) -> bool:
        """Whether `codec` is the name of a label codec."""
        return is_label(codec)

    def default_codec(self, shape: Shape) -> str:
        """Returns the codec of all classes if there are few of them, otherwise that of the five most probable ones."""
        return "full" if shape[0] <= _MAX_CLASSES_FULL else "marginal_smoothing_k5"

    def train(self, codec: str, sample: Float32Array) -> Codec:
        """Returns the LabelCodec, which needs no training."""
        return LabelCodec(codec, sample.shape[1])

    def load(self, codec: str, shape: Shape, arrays: dict[str, npt.NDArray[Any]]) -> Codec:
        """Returns the LabelCodec, which has no arrays."""
        if arrays:
            raise StoreError(f"codec {codec}: has arrays {sorted(arrays)}, expected none")
        return LabelCodec(codec, shape[0])

    def code_size(self, codec: str, shape: Shape) -> int:
        """Returns the bytes of one code."""
        return LabelCodec(codec, shape[0]).code_size

    def parameter_shapes(self, codec: str, shape: Shape) -> dict[str, Shape]:
        """Returns an empty dict, since these codecs have no parameters."""
        try:
            LabelCodec(codec, shape[0])
        except RequestError as error:
            raise StoreError(str(error)) from error
        return {}

    def sample_size(self, codec: str, shape: Shape) -> int:
        """Returns a small number, for measuring only."""
        return _SAMPLE

    def fidelity(self, exact: Float32Array, decoded: Float32Array) -> dict[str, float]:
        """Measures the total variation too: half the sum of absolute differences."""
        variations = np.abs(decoded.astype(np.float64) - exact).sum(axis=1) / 2
        found = {"total_variation_mean": float(variations.mean()), "total_variation_max": float(variations.max())}
        return super().fidelity(exact, decoded) | found
