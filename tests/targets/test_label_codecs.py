"""FKD's label quantisation against its own code written out, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.targets import KINDS, TargetSpec
from fkd_ssl.targets.label_codecs import LABELS, LabelCodec

K = 40


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


@pytest.mark.parametrize("name", [*LABELS, "marginal_smoothing_k3", "marginal_renorm_k39"])
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
    ],
)
def test_bytes_of_a_crop(name: str, classes: int, size: int) -> None:
    assert LabelCodec(name, classes).code_size == size


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
def test_impossible_codes_of_a_stranger(name: str, records: Any, said: str) -> None:
    codec = LabelCodec(name, 8)
    codes = np.array(records, dtype=codec._record).view(np.uint8).reshape(1, -1)
    with pytest.raises(StoreError, match=said):
        codec.decode(codes)


def test_any_bytes_decode_or_are_refused() -> None:
    generator = np.random.default_rng(0)
    for name in LABELS:
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
