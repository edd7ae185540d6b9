"""Codecs: how targets become bytes, by their names.

Embeddings have faiss's factory strings, class probabilities FKD's names. Both kinds have `spec`, `dim`, `code_size`, `arrays`,
`encode` and `decode`.
"""

from typing import Any

import numpy.typing as npt

from fkd_ssl.arrays import Float32Array
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.kinds import Kind
from fkd_ssl.store import faiss_codecs
from fkd_ssl.store.faiss_codecs import FaissCodec
from fkd_ssl.store.label_codecs import LABELS, LabelCodec, is_label

Codec = FaissCodec | LabelCodec

_FEW = 10  # classes: all of them take no more bytes than five and their numbers
_LABEL_SAMPLE = 512  # nothing is trained: fidelity is all that these targets are for


def usual_codec(kind: Kind, dim: int) -> str:
    """The codec where none is asked for."""
    if kind == "embedding":
        return "SQ8"
    return "full" if dim <= _FEW else "marginal_smoothing_k5"


def kind_of(spec: str) -> Kind:
    """The kind of targets that a codec is for."""
    return "distribution" if is_label(spec) else "embedding"


def check_kind(kind: Kind, spec: str, whose: str) -> None:
    """Raises RequestError where a codec is for another kind of targets."""
    if kind_of(spec) != kind:
        what, others = ("class probabilities", LABELS) if kind == "distribution" else ("embeddings", faiss_codecs.EXAMPLES)
        raise RequestError(
            f"codec {spec!r}: the targets of {whose} are {what}, whose codecs are, for instance, {', '.join(others)}"
        )


def train_codec(spec: str, sample: Float32Array) -> Codec:
    """The codec `spec`, trained on targets float32 [n, D]; raises RequestError as `FaissCodec.train` or `LabelCodec`."""
    return LabelCodec(spec, sample.shape[1]) if is_label(spec) else FaissCodec.train(spec, sample)


def load_codec(spec: str, dim: int, arrays: dict[str, npt.NDArray[Any]]) -> Codec:
    """The codec whose `arrays` these are; raises StoreError where they do not fit the spec."""
    if not is_label(spec):
        return FaissCodec.load(spec, dim, arrays)
    if arrays:
        raise StoreError(f"codec {spec}: has arrays {sorted(arrays)}, expected none")
    return LabelCodec(spec, dim)


def code_size(spec: str, dim: int) -> int:
    """Bytes of one code of `spec` for D = `dim`, without training; raises RequestError where it does not fit."""
    return LabelCodec(spec, dim).code_size if is_label(spec) else faiss_codecs.code_size(spec, dim)


def sample_size(spec: str) -> int:
    """How many targets a codec is trained and measured on, where there are so many."""
    return _LABEL_SAMPLE if is_label(spec) else faiss_codecs.sample_size(spec)


def smallest_sample(spec: str) -> int:
    """How many targets a codec needs at least to be trained."""
    return 1 if is_label(spec) else faiss_codecs.smallest_sample(spec)


def parameter_shapes(spec: str, dim: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the float32 arrays that a codec's training makes, by name; StoreError for a spec that does not fit D."""
    if not is_label(spec):
        return faiss_codecs.parameter_shapes(spec, dim)
    try:
        LabelCodec(spec, dim)
    except RequestError as error:
        raise StoreError(str(error)) from error
    return {}
