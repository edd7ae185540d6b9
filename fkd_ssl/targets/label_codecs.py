"""Codecs for class probabilities: FKD's label quantisation and a smaller one, with codes of a fixed size.

Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022 (arXiv 2112.01528), section 3.2, with
the names of its code. Class numbers are uint16, probabilities float16.

`marginal_quantised_kN` is ours. Like LPQLD (Xiao and He, "Soft Label Pruning and Quantization for Large-Scale Dataset
Distillation", TPAMI 2026, arXiv 2604.18135), it keeps the largest values and one value that all other classes share. A class
takes ceil(log2 K) bits and a value 6, as the logarithm of its ratio to the largest one.

Legend: `K` classes, `k` of them kept.
"""

import math
import re

import numpy as np

from fkd_ssl.arrays import Float32Array, Int64Array, UInt8Array
from fkd_ssl.errors import RequestError, StoreError

_SPEC = re.compile(r"hard|smoothing|full|marginal_(?:smoothing|renorm|quantised)_k([1-9]\d{0,3})")
LABELS = (
    "hard",
    "smoothing",
    "marginal_smoothing_k5",
    "marginal_smoothing_k10",
    "marginal_renorm_k5",
    "marginal_quantised_k8",
    "full",
)
"""Names; `k` may be any number."""
_MAX_CLASSES = 2**16
_DAMAGED = "a file of the store is damaged; run fkd-ssl verify"
_SLACK = 2e-3  # float16 rounds each of the k values by at most 2^-12
_LEVEL_BITS = 6
_LEVELS = 2**_LEVEL_BITS


class LabelCodec:
    """A codec between probabilities float32 [n, K] and uint8 [n, code_size]. It needs no training.

    - `hard`: the most probable class.
    - `smoothing`: the most probable class and its probability; the rest is spread evenly over the other classes.
    - `marginal_smoothing_kN`: the N most probable classes and their probabilities; the rest is spread evenly.
    - `marginal_renorm_kN`: the same, scaled to a sum of 1; the other classes have probability 0.
    - `marginal_quantised_kN`: as `marginal_smoothing_kN`, in fewer bytes. The ratio of a probability to the largest one
      is a level 0 to 63, which means 2^-((level + 1/2) s) with s = (12 + log2 K) / 64. The last level is the ratio of the
      probability that each of the other classes has.
    - `full`: the probabilities of all K classes.

    Attributes:
        spec: One of these names.
        dim: K.
        code_size: Bytes of one code.
        kept: k; K for `full`.

    Raises:
        RequestError: The name is unknown, k is not less than K, or K is not in 2 to 65,536.
    """

    def __init__(self, spec: str, dim: int) -> None:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise RequestError(
                f"codec {spec!r} is not supported for class probabilities; choose one of {', '.join(LABELS)} (with any k)"
            )
        self.spec = spec
        self.dim = dim
        self.kept = dim if spec == "full" else int(match[1] or 1)
        if spec != "full" and self.kept >= dim:
            raise RequestError(f"codec {spec}: keeps {self.kept} of {dim} classes; choose full, or a smaller k")
        if not 2 <= dim <= _MAX_CLASSES:
            raise RequestError(f"codec {spec}: {dim} classes, expected 2 to {_MAX_CLASSES}")
        self.quantised = "quantised" in spec
        if self.quantised:
            self._class_bits = (dim - 1).bit_length()
            self._step = (12 + math.log2(dim)) / _LEVELS
            self.code_size = -(-self.kept * (self._class_bits + _LEVEL_BITS) // 8)
            return
        record: list[tuple[str, np.dtype[np.generic], tuple[int]]] = []
        if spec != "full":
            record.append(("classes", np.dtype("<u2"), (self.kept,)))
        if spec != "hard":
            record.append(("values", np.dtype("<f2"), (self.kept,)))
        self._record = np.dtype(record)
        self.code_size = self._record.itemsize

    def arrays(self) -> dict[str, Float32Array]:
        """Returns an empty dict, since there are no trained parameters."""
        return {}

    def encode(self, targets: Float32Array) -> UInt8Array:
        """Encodes probabilities float32 [n, K] as uint8 [n, code_size].

        Raises:
            RequestError: A row is not a distribution: it has values that are not finite or negative, or its sum is not 1.
        """
        if not (np.isfinite(targets).all() and (targets >= 0).all() and (np.abs(targets.sum(axis=1) - 1) < _SLACK).all()):
            raise RequestError(
                f"codec {self.spec}: the targets are not class probabilities (finite, not negative, each row with a sum of 1)"
            )
        if self.spec == "full":
            return self.pack(None, targets)
        classes = _largest(targets, self.kept)
        return self.pack(classes, np.take_along_axis(targets, classes, axis=1))

    def pack(self, classes: Int64Array | None, values: Float32Array) -> UInt8Array:
        """Packs class numbers [n, k] (None for `full`) and their probabilities [n, k] (unused by `hard`) into codes.

        `marginal_quantised_kN` expects the most probable class first.
        """
        if self.quantised:
            assert classes is not None
            return np.packbits(
                np.concatenate([_bits(classes, self._class_bits), _bits(self._levels(values), _LEVEL_BITS)], axis=1),
                axis=1,
                bitorder="little",
            )
        records = np.zeros(len(values), dtype=self._record)
        if classes is not None:
            records["classes"] = classes
        if self.spec != "hard":
            records["values"] = values
        return records.view(np.uint8).reshape(len(values), self.code_size)

    def unpack(self, codes: UInt8Array) -> tuple[Int64Array, Float32Array]:
        """Unpacks codes, except those of `full`, into class numbers int64 [n, k] and their probabilities float32 [n, k].

        Raises:
            StoreError: A code of `marginal_quantised_kN` has levels that are not in ascending order, or bits after its end.
        """
        if self.quantised:
            return self._unpack_quantised(codes)
        records = np.ascontiguousarray(codes).view(self._record).reshape(len(codes))
        classes = records["classes"].astype(np.int64)
        return classes, np.ones_like(classes, np.float32) if self.spec == "hard" else records["values"].astype(np.float32)

    def decode(self, codes: UInt8Array) -> Float32Array:
        """Decodes uint8 [n, code_size] to probabilities float32 [n, K]. The sum of each row is 1.

        Raises:
            StoreError: A code contains an invalid or repeated class number, or invalid probabilities.
        """
        if self.spec == "full":
            records = np.ascontiguousarray(codes).view(self._record).reshape(len(codes))
            probabilities = records["values"].astype(np.float32)
        else:
            classes, values = self.unpack(codes)
            ordered = np.sort(classes, axis=1)
            if (classes >= self.dim).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
                raise StoreError(f"codec {self.spec}: a code has invalid classes: {_DAMAGED}")
            rest = np.zeros((len(codes), 1), np.float32)
            if "smoothing" in self.spec or self.quantised:
                rest = np.maximum(0, 1 - values.sum(axis=1, keepdims=True)) / np.float32(self.dim - self.kept)
            probabilities = np.repeat(rest, self.dim, axis=1)
            np.put_along_axis(probabilities, classes, values, axis=1)
        sums = probabilities.sum(axis=1, keepdims=True, dtype=np.float64)
        if not (np.isfinite(sums).all() and (sums > 0).all() and (probabilities >= 0).all()):
            raise StoreError(f"codec {self.spec}: a code has invalid probabilities: {_DAMAGED}")
        normalised: Float32Array = (probabilities / sums).astype(np.float32)
        return normalised

    def _levels(self, values: Float32Array) -> Int64Array:
        """Quantises the ratios [n, k] of the second and further probabilities, and of each other class, to the first one."""
        rest = np.maximum(0, 1 - values.sum(axis=1, keepdims=True, dtype=np.float64)) / (self.dim - self.kept)
        ratios = np.concatenate([values[:, 1:], rest], axis=1) / values[:, :1]
        levels = np.floor(-np.log2(np.maximum(ratios, 1e-30)) / self._step).clip(0, _LEVELS - 1)
        # the rest can exceed the last probability by the rounding of the sum
        return np.maximum.accumulate(levels, axis=1).astype(np.int64)

    def _unpack_quantised(self, codes: UInt8Array) -> tuple[Int64Array, Float32Array]:
        stream = np.unpackbits(codes, axis=1, bitorder="little")
        first, end = self.kept * self._class_bits, self.kept * (self._class_bits + _LEVEL_BITS)
        classes, levels = _numbers(stream[:, :first], self._class_bits), _numbers(stream[:, first:end], _LEVEL_BITS)
        if stream[:, end:].any() or (np.diff(levels, axis=1) < 0).any():
            raise StoreError(f"codec {self.spec}: a code has invalid probabilities: {_DAMAGED}")
        ratios = np.exp2(-(levels + 0.5) * self._step)
        kept = np.concatenate([np.ones_like(ratios[:, :1]), ratios[:, :-1]], axis=1)
        total = kept.sum(axis=1, keepdims=True) + ratios[:, -1:] * (self.dim - self.kept)
        return classes, (kept / total).astype(np.float32)


def is_label(spec: str) -> bool:
    """Whether `spec` names a codec for class probabilities."""
    return _SPEC.fullmatch(spec) is not None


def _bits(numbers: Int64Array, width: int) -> UInt8Array:
    """The bits uint8 [n, m x width] of numbers [n, m], least significant first."""
    bits: UInt8Array = (numbers[:, :, None] >> np.arange(width) & 1).astype(np.uint8)
    return bits.reshape(len(numbers), -1)


def _numbers(bits: UInt8Array, width: int) -> Int64Array:
    """The numbers int64 [n, m] of bits [n, m x width]."""
    numbers: Int64Array = bits.reshape(len(bits), -1, width) @ (1 << np.arange(width))
    return numbers


def _largest(targets: Float32Array, k: int) -> Int64Array:
    """Returns the classes of the k largest values of each row, largest first, and the first of equal ones: int64 [n, k]."""
    last = targets.shape[1] - 1
    # Nonnegative floats sort like their bits; + 0 turns -0 into 0. Sorting all of 21,841 classes is as slow as a teacher.
    keys = (targets + np.float32(0)).view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(last, -1, -1, dtype=np.uint64)
    kept = np.sort(np.partition(keys, last + 1 - k, axis=1)[:, last + 1 - k :], axis=1)[:, ::-1]
    classes: Int64Array = last - (kept & np.uint64(2**32 - 1)).astype(np.int64)
    return classes
