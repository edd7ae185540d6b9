"""Codecs for embeddings: faiss's standalone codecs, with their parameters stored as plain arrays.

The name of a codec is a faiss factory string. Its parameters are stored as .npy files, and the faiss object is rebuilt from
them. Faiss's own files are never read, since damaged ones can load without an error.
"""

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from fkd_ssl.arrays import Float32Array, UInt8Array
from fkd_ssl.errors import RequestError, StoreError

_SPEC = re.compile(
    r"(?:(?P<pre>OPQ|PCAR?|RR)(?P<pre_a>[1-9]\d{0,3})(?:_(?P<pre_b>[1-9]\d{0,3}))?,)?"
    r"(?P<base>Flat|SQ8|SQ6|SQ4|SQfp16|SQbf16|PQ(?P<m>[1-9]\d{0,3})(?:x(?P<bits>[1-9]\d?))?)"
)
EXAMPLES = ("SQ8", "SQ6", "SQ4", "SQfp16", "SQbf16", "Flat", "PQ16x8", "OPQ16,PQ16x8", "PCA64,SQ8")
_RANGE_MARGIN = 0.1  # of max - min at each end, since values beyond the sample's range would be clipped
_TAIL = 0.01  # SQ4's range excludes this share of the values at each end: with 16 steps, a margin loses more than clipping
_INTEGERS = ("SQ8", "SQ6", "SQ4")
_MAX_PARAMETERS = 2**26  # a square transform of 8,192 dimensions; faiss itself has no limit for an untrusted file
_NOT_FINITE = "decoded targets are not finite: a file of the store is damaged; run fkd-ssl verify"
_SAMPLES = 4096
_SAMPLES_PER_CENTROID = 64
_MIN_PER_CENTROID = 39  # faiss's own minimum; with fewer, centroids fit single targets
_OPQ_CENTROIDS = 256  # of the PQ that OPQ trains internally, whichever codec follows


class FaissCodec:
    """A trained codec between float32 [n, D] and uint8 [n, code_size].

    Attributes:
        spec: faiss factory string.
        dim: D.
        code_size: Bytes of one code.
    """

    def __init__(self, spec: str, dim: int, index: Any) -> None:
        self.spec = spec
        self.dim = dim
        self._index = index
        self._outside = _mean_outside(index)
        self.code_size = int(index.sa_code_size())

    @classmethod
    def train(cls, spec: str, sample: Float32Array) -> "FaissCodec":
        """Trains the codec `spec` on float32 [n, D]. The same sample gives the same parameters.

        Raises:
            RequestError: The spec is not supported, does not fit D, or needs a larger sample.
        """
        dim = sample.shape[1]
        index = _build(spec, dim)
        needed = min_sample(spec)
        if len(sample) < needed:
            raise RequestError(
                f"codec {spec} needs at least {needed} targets for its training; there are {len(sample)}: store "
                "more crops or images, or choose the codec SQ8"
            )
        with threadpool_limits(1):  # another order of sums would give other bytes
            index.train(np.ascontiguousarray(sample, dtype=np.float32))
        return cls(spec, dim, index)

    @classmethod
    def load(cls, spec: str, dim: int, arrays: dict[str, npt.NDArray[Any]]) -> "FaissCodec":
        """Loads the codec `spec` from its `arrays`. Raises StoreError if they do not fit the spec."""
        shapes = parameter_shapes(spec, dim)
        index = _build(spec, dim)
        if set(arrays) != set(shapes):
            raise StoreError(f"codec {spec}: has arrays {sorted(arrays)}, expected {sorted(shapes)}")
        for name, array in arrays.items():
            if array.dtype != np.float32 or array.shape != shapes[name] or not np.isfinite(array).all():
                raise StoreError(
                    f"codec {spec}: {name} is {array.dtype} {array.shape} (or not finite), expected float32 {shapes[name]}"
                )
        _set_parameters(index, arrays)
        if "transform" in arrays and not _transform(index).is_orthonormal:  # faiss uses its transpose as the inverse
            raise StoreError(f"codec {spec}: the rows of its transform are not orthonormal; the file is damaged")
        return cls(spec, dim, index)

    def arrays(self) -> dict[str, Float32Array]:
        """Returns the trained parameters, by name; empty for Flat and the float codecs."""
        import faiss

        shapes = parameter_shapes(self.spec, self.dim)
        return {name: faiss.vector_to_array(vector).reshape(shapes[name]) for name, vector in _parameters(self._index).items()}

    def encode(self, targets: Float32Array) -> UInt8Array:
        """Encodes targets float32 [n, D] as uint8 [n, code_size]."""
        codes: UInt8Array = self._index.sa_encode(np.ascontiguousarray(targets, dtype=np.float32))
        return codes

    def decode(self, codes: UInt8Array) -> Float32Array:
        """Decodes uint8 [n, code_size] to targets float32 [n, D]. All but Flat normalise them again.

        Raises:
            StoreError: A decoded target is not finite, so the codes are damaged.
        """
        if not len(codes):
            return np.zeros((0, self.dim), dtype=np.float32)
        targets: Float32Array = self._index.sa_decode(np.ascontiguousarray(codes))
        if self.spec == "Flat":
            if not np.isfinite(targets).all():
                raise StoreError(_NOT_FINITE)
            return targets
        if self._outside is not None:
            targets += self._outside
        return normalise(targets)

    def table(self) -> tuple[Float32Array, Float32Array] | None:
        """Returns what is summed to decode a product quantiser of bytes behind a transform; None for other codecs.

        A code of m bytes decodes to the sum of one row of each of m parts, float32 [m, 256, D], and a constant [D], normalised.
        This avoids multiplying each decoded vector by the transform.
        """
        arrays = self.arrays()
        transform, centroids = arrays.get("transform"), arrays.get("centroids")
        if transform is None or centroids is None or centroids.shape[1] != 256:
            return None
        parts = np.matmul(centroids, transform.reshape(len(centroids), -1, self.dim))
        constant = np.zeros(self.dim, dtype=np.float32) if self._outside is None else self._outside
        return parts, constant - arrays["transform_bias"] @ transform if "transform_bias" in arrays else constant


def normalise(targets: Float32Array) -> Float32Array:
    """Normalises decoded targets [n, D] in place and returns them. Raises StoreError if one is not finite."""
    norms = np.sqrt(np.einsum("nd,nd->n", targets, targets))
    if not np.isfinite(norms).all():
        raise StoreError(_NOT_FINITE)
    targets /= np.maximum(norms, np.float32(1e-12))[:, None]
    return targets


def code_size(spec: str, dim: int) -> int:
    """Returns the bytes of one code of `spec` for D = `dim`, without training. Raises RequestError as `FaissCodec.train`."""
    return int(_build(spec, dim).sa_code_size())


def sample_size(spec: str) -> int:
    """Returns the maximum number of targets that a codec is trained on."""
    return max(_SAMPLES, _SAMPLES_PER_CENTROID * _centroids(spec), min_sample(spec))


def min_sample(spec: str) -> int:
    """Returns the minimum number of targets for training a codec."""
    match = _match(spec)
    dimensions = int(match["pre_a"]) if match["pre"] in ("PCA", "PCAR") else 1
    return max(dimensions, _MIN_PER_CENTROID * _centroids(spec))


def _match(spec: str) -> re.Match[str]:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise RequestError(f"codec {spec!r}: not supported; choose, for instance, {', '.join(EXAMPLES)}")
    return match


def _centroids(spec: str) -> int:
    """Returns the maximum number of centroids per part of a codec; 0 if it has no centroids."""
    match = _match(spec)
    return max(_OPQ_CENTROIDS if match["pre"] == "OPQ" else 0, 2 ** int(match["bits"] or 8) if match["m"] else 0)


def parameter_shapes(spec: str, dim: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a codec's trained float32 arrays, by name. Raises StoreError if the spec does not fit D."""
    try:
        match, inner = _checked(spec, dim)
    except RequestError as error:
        raise StoreError(str(error)) from error
    return _shapes(match, inner, dim)


def _checked(spec: str, dim: int) -> tuple[re.Match[str], int]:
    """Returns a spec's parts, and the dimension after its transform. Raises RequestError if they do not fit D."""
    match = _match(spec)
    if match["bits"] and not 4 <= int(match["bits"]) <= 12:
        raise RequestError(f"codec {spec}: {match['bits']} bits per sub-vector; must be between 4 and 12")
    inner = dim
    if match["pre"] == "OPQ":
        inner = int(match["pre_b"] or dim)
        if inner > dim or dim % int(match["pre_a"]) or inner % int(match["pre_a"]):
            raise RequestError(f"codec {spec}: {match['pre_a']} parts do not divide {inner} of {dim} dimensions")
    elif match["pre"]:
        inner = int(match["pre_a"])
        if inner > dim or match["pre_b"]:
            raise RequestError(f"codec {spec}: {match['pre']} takes one number of dimensions, at most {dim}")
    if match["m"] and inner % int(match["m"]):
        raise RequestError(f"codec {spec}: {match['m']} sub-vectors do not divide {inner} dimensions")
    count = sum(math.prod(shape) for shape in _shapes(match, inner, dim).values())
    if count > _MAX_PARAMETERS:
        raise RequestError(f"codec {spec}: {count:,} parameters for {dim} dimensions, over {_MAX_PARAMETERS:,}; choose SQ8")
    return match, inner


def _shapes(match: re.Match[str], inner: int, dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if match["pre"]:
        shapes["transform"] = (inner, dim)
        if match["pre"] in ("PCA", "PCAR"):
            shapes |= {"transform_bias": (inner,), "transform_mean": (dim,)}
    if match["m"]:
        parts = int(match["m"])
        shapes["centroids"] = (parts, 2 ** int(match["bits"] or 8), inner // parts)
    elif match["base"] in _INTEGERS:
        shapes["ranges"] = (2, inner)
    return shapes


def _build(spec: str, dim: int) -> Any:
    """Builds the untrained faiss index of a supported spec."""
    import faiss

    match, _ = _checked(spec, dim)
    index = faiss.index_factory(dim, spec)
    base = _base(index)
    if match["m"]:
        base.do_polysemous_training = False  # it only orders centroids for a kind of search that a store does not need
    elif match["base"] == "SQ4":
        base.sq.rangestat = faiss.ScalarQuantizer.RS_quantiles
        base.sq.rangestat_arg = _TAIL
    elif match["base"] in _INTEGERS:
        base.sq.rangestat = faiss.ScalarQuantizer.RS_minmax
        base.sq.rangestat_arg = _RANGE_MARGIN
    return index


def _base(index: Any) -> Any:
    import faiss

    inner = faiss.downcast_index(index)
    return faiss.downcast_index(inner.index) if isinstance(inner, faiss.IndexPreTransform) else inner


def _transform(index: Any) -> Any:
    import faiss

    return faiss.downcast_VectorTransform(index.chain.at(0))


def _mean_outside(index: Any) -> Float32Array | None:
    """Returns the part of a trained PCA's mean outside its subspace, float32 [D], which faiss omits when decoding."""
    vectors = _parameters(index)
    if "transform_mean" not in vectors:
        return None
    import faiss

    mean = faiss.vector_to_array(vectors["transform_mean"]).astype(np.float64)
    rows = faiss.vector_to_array(vectors["transform"]).astype(np.float64).reshape(-1, len(mean))
    outside: Float32Array = (mean - rows.T @ (rows @ mean)).astype(np.float32)
    return outside


def _parameters(index: Any) -> dict[str, Any]:
    """Returns the faiss vectors that training fills, by the name they are stored under."""
    import faiss

    outer: Any = faiss.downcast_index(index)
    base = _base(index)
    vectors: dict[str, Any] = {}
    if isinstance(outer, faiss.IndexPreTransform):
        transform = _transform(outer)
        vectors["transform"] = transform.A
        if isinstance(transform, faiss.PCAMatrix):
            vectors |= {"transform_bias": transform.b, "transform_mean": transform.mean}
    if isinstance(base, faiss.IndexPQ):
        vectors["centroids"] = base.pq.centroids
    elif isinstance(base, faiss.IndexScalarQuantizer) and base.sq.qtype in (
        faiss.ScalarQuantizer.QT_8bit,
        faiss.ScalarQuantizer.QT_6bit,
        faiss.ScalarQuantizer.QT_4bit,
    ):
        vectors["ranges"] = base.sq.trained
    return vectors


def _set_parameters(index: Any, arrays: dict[str, npt.NDArray[Any]]) -> None:
    import faiss

    for name, vector in _parameters(index).items():
        faiss.copy_array_to_vector(np.ascontiguousarray(arrays[name]).ravel(), vector)
    outer: Any = faiss.downcast_index(index)
    base = _base(index)
    if isinstance(outer, faiss.IndexPreTransform):
        transform = _transform(outer)
        transform.have_bias = "transform_bias" in arrays
        transform.set_is_orthonormal()
        transform.is_trained = True
    base.is_trained = True
    outer.is_trained = True
