"""FKD's label quantisation against its own code written out, the quantised codec against loops, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.targets import KINDS, TargetSpec
from fkd_ssl.targets.label_codecs import LABELS, LabelCodec

K = 40
FKDS = [name for name in LABELS if "quantised" not in name]


def probabilities(count: int, classes: int = K, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    logits = np.random.default_rng(seed).normal(0, 3, (count, classes))
    exact = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.float32(exact / exact.sum(axis=1, keepdims=True))


def recovered(name: str, p: torch.Tensor) -> torch.Tensor:
    """Recovers probabilities from stored labels as FKD's training does (`Recover_soft_label`), from the paper's section 3.2."""
    p = p.double()
    if name == "full":
        return p
    k = {"hard": 1, "smoothing": 1}.get(name) or int(name.rpartition("_k")[2])
    value, index = p.topk(k, dim=1)
    if name == "hard":
        return torch.zeros_like(p).scatter_(1, index, 1.0)
    if name.startswith("marginal_renorm"):
        return F.normalize(torch.zeros_like(p).scatter_(1, index, value), p=1.0, dim=1)
    minor = (1 - value.sum(dim=1, keepdim=True)) / (p.shape[1] - k)
    return minor.expand_as(p).clone().scatter_(1, index, value)


@pytest.mark.parametrize("name", [*FKDS, "marginal_smoothing_k3", "marginal_renorm_k39"])
def test_decoding_is_what_fkd_recovers(name: str) -> None:
    p = probabilities(50)
    codec = KINDS["distribution"].train(name, p)
    codes = codec.encode(p)
    assert (codes.dtype, codes.shape) == (np.uint8, (50, codec.code_size))
    decoded = codec.decode(codes)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded.sum(axis=1, dtype=np.float64), 1, atol=1e-6)
    expected = recovered(name, torch.from_numpy(p)).numpy()
    np.testing.assert_allclose(decoded, expected, rtol=2e-3, atol=2e-5)  # float16's 11 bits, and what they do to the rest
    again = KINDS["distribution"].load(name, (K,), {})
    assert (again.decode(codes) == decoded).all()
    assert KINDS["distribution"].parameter_shapes(name, (K,)) == {}


@pytest.mark.parametrize(
    ("name", "classes", "size"),
    [
        ("hard", 1000, 2),
        ("smoothing", 1000, 4),
        ("marginal_smoothing_k5", 1000, 20),
        ("marginal_smoothing_k10", 1000, 40),
        ("marginal_renorm_k5", 21841, 20),
        ("marginal_renorm_k5", 65536, 20),
        ("full", 1000, 2000),
        ("marginal_quantised_k8", 1000, 16),  # 10 + 6 bits for each class
        ("marginal_quantised_k6", 1000, 12),
        ("marginal_quantised_k5", 1025, 11),  # 85 bits
        ("marginal_quantised_k5", 65536, 14),
        ("marginal_quantised_k1", 2, 1),
    ],
)
def test_bytes_of_a_crop(name: str, classes: int, size: int) -> None:
    assert LabelCodec(name, classes).code_size == size


def quantised(p: list[float], k: int) -> bytes:
    """Encodes one row with loops and Python's integers."""
    classes = sorted(range(len(p)), key=lambda c: -p[c])[:k]
    rest = (1 - math.fsum(p[c] for c in classes)) / (len(p) - k)
    step, width = (12 + math.log2(len(p))) / 64, math.ceil(math.log2(len(p)))
    number = shift = 0
    for c in classes:
        number |= c << shift
        shift += width
    for value in [*(p[c] for c in classes[1:]), rest]:
        ratio = value / p[classes[0]]
        number |= (63 if ratio <= 0 else min(63, int(-math.log2(ratio) / step))) << shift
        shift += 6
    return number.to_bytes(math.ceil(shift / 8), "little")


def recovered_quantised(code: bytes, classes: int, k: int) -> list[float]:
    number, width = int.from_bytes(code, "little"), math.ceil(math.log2(classes))
    kept = []
    for _ in range(k):
        number, c = divmod(number, 2**width)
        kept.append(c)
    ratios = [1.0]
    for _ in range(k):
        number, level = divmod(number, 64)
        ratios.append(2 ** (-(level + 0.5) * (12 + math.log2(classes)) / 64))
    assert number == 0
    p = [ratios[-1]] * classes
    for c, ratio in zip(kept, ratios, strict=False):
        p[c] = ratio
    total = math.fsum(p)
    return [value / total for value in p]


def test_a_quantised_code_by_hand() -> None:
    codec = LabelCodec("marginal_quantised_k2", 4)  # 2 bits for a class; a level is 14 / 64 of an octave
    # classes 2 and 0; ratios 2^-1 and 2^-2 are levels 4 and 9: 0b10, 0b00, 0b000100, 0b001001 from the lowest bit
    code = codec.encode(np.float32([[0.25, 0.125, 0.5, 0.125]]))
    assert code.tobytes() == (2 | 0 << 2 | 4 << 4 | 9 << 10).to_bytes(2, "little")
    ratios = [2 ** -(4.5 * 14 / 64), 2 ** -(9.5 * 14 / 64)]
    total = 1 + ratios[0] + 2 * ratios[1]
    expected = [[ratios[0] / total, ratios[1] / total, 1 / total, ratios[1] / total]]
    np.testing.assert_allclose(codec.decode(code), expected, rtol=1e-6)


@pytest.mark.parametrize(("classes", "k"), [(2, 1), (3, 2), (40, 5), (40, 39), (1000, 8), (1025, 5), (65536, 8)])
def test_the_quantised_codec_against_loops(classes: int, k: int) -> None:
    p = probabilities(8, classes)
    p[0] = 0
    p[0, -1] = 1  # ratios of 0
    p[1] = 1 / classes  # ratios of 1
    codec = LabelCodec(f"marginal_quantised_k{k}", classes)
    codes, decoded = codec.encode(p), codec.decode(codec.encode(p))
    assert [code.tobytes() for code in codes[2:]] == [quantised(row.tolist(), k) for row in p[2:]]
    expected = [recovered_quantised(code.tobytes(), classes, k) for code in codes]
    np.testing.assert_allclose(decoded, expected, rtol=2e-4, atol=5e-7)  # the rest is 1 minus float32 values
    assert (decoded.argmax(axis=1) == p.argmax(axis=1)).all()
    # every ratio to the largest probability is within half a step of FKD's codec that keeps as many classes
    exact = recovered(f"marginal_smoothing_k{k}", torch.from_numpy(p[2:])).clamp(min=1e-12).numpy()
    off = np.log2(exact / exact.max(axis=1, keepdims=True) * decoded[2:].max(axis=1, keepdims=True) / decoded[2:])
    assert np.abs(off[exact > 2**-12 * exact.max() / classes]).max() < 0.501 * (12 + math.log2(classes)) / 64


def test_the_last_class_of_many() -> None:
    p = np.zeros((2, 65536), dtype=np.float32)
    p[0, -1], p[1, 0] = 1, 1
    codec = LabelCodec("marginal_smoothing_k5", 65536)
    assert codec.decode(codec.encode(p)).argmax(axis=1).tolist() == [65535, 0]
    with pytest.raises(RequestError, match="65537 classes, expected 2 to 65536"):
        LabelCodec("hard", 65537)
    with pytest.raises(RequestError, match="1 classes, expected 2 to 65536"):  # a softmax of one logit says nothing
        LabelCodec("full", 1)


def test_equal_probabilities_are_kept_in_the_order_of_the_classes() -> None:
    p = np.full((1, 8), 0.125, dtype=np.float32)
    assert LabelCodec("hard", 8).decode(LabelCodec("hard", 8).encode(p)).argmax() == 0
    np.testing.assert_allclose(
        LabelCodec("marginal_smoothing_k3", 8).decode(LabelCodec("marginal_smoothing_k3", 8).encode(p)), p
    )


def test_the_kept_classes_are_those_of_a_stable_sort() -> None:
    generator = np.random.default_rng(0)
    for classes, k in ((3, 1), (8, 3), (40, 39), (1000, 5)):
        p = np.float32(generator.dirichlet(np.full(classes, 0.1), 200))
        p[::2] = np.floor(p[::2] * 8) / 8  # many are equal
        p[::2, -1] += 1 - p[::2].sum(axis=1)
        p[0] = -0.0
        p[0, -1] = 1
        kept, _ = LabelCodec(f"marginal_renorm_k{k}", classes).unpack(LabelCodec(f"marginal_renorm_k{k}", classes).encode(p))
        assert (kept == np.argsort(-p, axis=1, kind="stable")[:, :k]).all()


@pytest.mark.parametrize(
    "p", [np.float32([[0.5, 0.6]]), np.float32([[1.5, -0.5]]), np.float32([[np.nan, 1]]), np.float32([[0, 0]])]
)
def test_what_are_no_probabilities_are_not_stored(p: Any) -> None:
    with pytest.raises(RequestError, match="not class probabilities"):
        LabelCodec("full", 2).encode(p)


@pytest.mark.parametrize(
    ("name", "records", "said"),
    [
        ("hard", [(8,)], "invalid classes"),
        ("marginal_smoothing_k2", [([1, 1], [0.5, 0.2])], "invalid classes"),
        ("marginal_smoothing_k2", [([1, 2], [np.nan, 0.2])], "invalid probabilities"),
        ("marginal_smoothing_k2", [([1, 2], [-0.5, 0.2])], "invalid probabilities"),
        ("marginal_renorm_k2", [([1, 2], [0, 0])], "invalid probabilities"),
        ("full", [(np.zeros(8),)], "invalid probabilities"),
        ("full", [(np.full(8, np.inf),)], "invalid probabilities"),
    ],
)
def test_impossible_codes(name: str, records: Any, said: str) -> None:
    codec = LabelCodec(name, 8)
    codes = np.array(records, dtype=codec._record).view(np.uint8).reshape(1, -1)
    with pytest.raises(StoreError, match=said):
        codec.decode(codes)


@pytest.mark.parametrize(
    ("classes", "levels", "after", "said"),
    [
        ([1, 1], [3, 4], 0, "invalid classes"),
        ([1, 6], [3, 4], 0, "invalid classes"),
        ([1, 2], [4, 3], 0, "invalid probabilities"),  # a class that is less probable than those that were left out
        ([1, 2], [3, 4], 1, "invalid probabilities"),  # a bit after the end
        ([1, 2], [3, 3], 0, None),
    ],
)
def test_impossible_quantised_codes(classes: list[int], levels: list[int], after: int, said: str | None) -> None:
    codec = LabelCodec("marginal_quantised_k2", 6)
    number = classes[0] | classes[1] << 3 | levels[0] << 6 | levels[1] << 12 | after << 18
    codes = np.frombuffer(number.to_bytes(codec.code_size, "little"), np.uint8)[None]
    if said is None:
        assert codec.decode(codes).argmax() == classes[0]
    else:
        with pytest.raises(StoreError, match=said):
            codec.decode(codes)


def test_any_bytes_decode_or_are_refused() -> None:
    generator = np.random.default_rng(0)
    for name in (*LABELS, "marginal_quantised_k1", "marginal_quantised_k2"):
        codec = LabelCodec(name, 12)
        for _ in range(200):
            with np.errstate(all="ignore"):
                try:
                    decoded = codec.decode(generator.integers(0, 256, (1, codec.code_size), dtype=np.uint8))
                except StoreError:
                    continue
            assert np.isfinite(decoded).all()
            assert decoded.sum() == pytest.approx(1, abs=1e-5)


def test_nothing_decodes_to_nothing() -> None:
    assert LabelCodec("full", 5).decode(np.zeros((0, 10), np.uint8)).shape == (0, 5)
    assert LabelCodec("marginal_renorm_k2", 5).encode(np.zeros((0, 5), np.float32)).shape == (0, 8)


def test_names() -> None:
    for name, said in {
        "marginal_smoothing_k0": "is not supported",
        "soft": "is not supported",
        "marginal_renorm_k8": "keeps 8 of 8",
    }.items():
        with pytest.raises(RequestError, match=said):
            LabelCodec(name, 8)
    with pytest.raises(RequestError, match=r"is not for class probabilities, the targets of r50; choose, for instance, hard"):
        TargetSpec("distribution", (8,)).check_codec("SQ8", "r50")
    with pytest.raises(RequestError, match="is not for embeddings, the targets of moco"):
        TargetSpec("embedding", (8,)).check_codec("hard", "moco")
    with pytest.raises(StoreError, match="has arrays"):
        KINDS["distribution"].load("hard", (8,), {"ranges": np.zeros(2)})
    with pytest.raises(StoreError, match="keeps 8 of 8"):
        KINDS["distribution"].parameter_shapes("marginal_renorm_k8", (8,))
