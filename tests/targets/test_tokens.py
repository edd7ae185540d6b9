"""Tokens: each is normalised and coded on its own, by one codec, in row order."""

import numpy as np
import pytest
import torch

from fkd_ssl.arrays import Float32Array
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.targets import KINDS, TargetSpec
from fkd_ssl.targets.faiss_codecs import FaissCodec

SHAPE = (2, 3, 16)
TOKENS = KINDS["tokens"]


def grids(count: int = 400) -> Float32Array:
    """Unit vectors near a subspace of 6 dimensions, as features are."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, 2, 3, 6)) @ rng.normal(size=(6, 16)) + 0.1 * rng.normal(size=(count, *SHAPE))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def test_each_token_is_normalised() -> None:
    output = torch.randn(5, *SHAPE, dtype=torch.bfloat16)
    found = TOKENS.of_output(output)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, output.float() / output.float().square().sum(-1, keepdim=True).sqrt())


@pytest.mark.parametrize(
    "codec", ["Flat", "SQ8", "SQ4", "OPQ4,PQ4x8", "OPQ4_8,PQ4x8", "OPQ4,PQ4x4", "PCA8,SQ8", "PCA8,PQ4x8", "RR8,PQ4x8"]
)
def test_a_codec_codes_each_token_in_row_order(codec: str) -> None:
    """The oracle lists the tokens one after the other and codes the list."""
    exact = grids(1700)
    trained = TOKENS.train(codec, exact)
    alone = FaissCodec.load(codec, 16, trained.arrays())
    listed = alone.encode(
        np.stack([exact[crop, row, column] for crop in range(1700) for row in range(2) for column in range(3)])
    )
    codes = trained.encode(exact)
    assert (codes.dtype, codes.shape) == (np.uint8, (1700, TOKENS.code_size(codec, SHAPE)))
    np.testing.assert_array_equal(codes, [np.concatenate(listed[6 * crop : 6 * crop + 6]) for crop in range(1700)])
    again = TOKENS.load(codec, SHAPE, trained.arrays())
    expected = alone.decode(listed)
    for decoded in (trained.decode(codes), again.decode(codes)):
        np.testing.assert_allclose(decoded[7, 1, 0], expected[6 * 7 + 3], rtol=0, atol=1e-6)
        np.testing.assert_allclose(decoded.reshape(-1, 16), expected, rtol=0, atol=1e-6)
        assert (decoded * exact).sum(-1).mean() > 0.7
    assert {name: array.shape for name, array in trained.arrays().items()} == TOKENS.parameter_shapes(codec, SHAPE)
    assert trained.decode(codes[:0]).shape == (0, *SHAPE)


def test_damaged_codebooks_are_noticed() -> None:
    """The fast decoder checks what it decodes as FaissCodec does."""
    exact = grids(1700)
    trained = TOKENS.train("OPQ4,PQ4x8", exact)
    arrays = trained.arrays()
    arrays["centroids"] = arrays["centroids"] * np.float32(1e38)
    with pytest.raises(StoreError, match="not finite"):
        TOKENS.load("OPQ4,PQ4x8", SHAPE, arrays).decode(trained.encode(exact))


@pytest.mark.parametrize(
    ("shape", "codec"),
    [
        ((7, 7, 384), "OPQ16,PQ16x8"),
        ((7, 7, 2048), "OPQ16_256,PQ16x8"),
        ((7, 7, 440), "OPQ11,PQ11x8"),
        ((7, 7, 1110), "OPQ15_255,PQ15x8"),
        ((2, 2, 14), "OPQ14,PQ14x8"),
        ((2, 2, 34), "SQ4"),
    ],
)
def test_the_default_codec_fits(shape: tuple[int, ...], codec: str) -> None:
    assert TOKENS.default_codec(shape) == codec
    assert TargetSpec("tokens", shape).check_codec(codec, "it") > 0


def test_a_sample_takes_some_tokens_of_each_crop() -> None:
    """Without it, 4,608 crops of a ResNet-50's map would take 1.8 GB."""
    targets = np.arange(3 * 7 * 7 * 2, dtype=np.float32).reshape(3, 7, 7, 2)
    sample = TOKENS.sample(targets)
    assert sample.shape == (3, 1, 16, 2)
    positions = {int(value) // 2 for value in sample[0, 0, :, 0]}
    assert len(positions) == 16
    assert {place // 7 for place in positions} == {place % 7 for place in positions} == set(range(7))
    np.testing.assert_array_equal(sample[2], sample[0] + 2 * 98)
    np.testing.assert_array_equal(TOKENS.sample(grids(2)), grids(2).reshape(2, 1, 6, 16))
    assert TOKENS.sample_size("SQ8", (7, 7, 384)) == 512
    assert TOKENS.sample_size("OPQ16,PQ16x8", (7, 7, 384)) == 1024
    assert TOKENS.min_sample("OPQ16,PQ16x8", (7, 7, 384)) == 624
    assert TOKENS.min_sample("OPQ16,PQ16x8", (2, 2, 384)) == 2496


def test_fidelity_is_measured_per_token() -> None:
    """One bad token among 2,400 is the minimum, which a cosine of whole grids would hide."""
    exact = grids()
    decoded = exact.copy()
    decoded[3, 1, 2] *= -1
    found = TOKENS.fidelity(exact, decoded)
    assert found == pytest.approx({"cosine_mean": 1 - 2 / 2400, "cosine_min": -1})
    exact[5] = 0  # has no direction
    assert TOKENS.fidelity(exact, decoded) == pytest.approx({"cosine_mean": 1 - 2 / 2394, "cosine_min": -1})
    assert TOKENS.fidelity(0 * exact, decoded) == {"cosine_mean": 0, "cosine_min": 0}


@pytest.mark.parametrize("shape", [(16,), (4, 16), (1, 2, 2, 16)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"tokens are grids \[h, w, D\]"):
        TargetSpec("tokens", shape)


def test_a_large_map_fits() -> None:
    assert str(TargetSpec("tokens", (7, 7, 2048))) == "7 x 7 tokens, D = 2048"


def test_codecs_of_other_kinds_and_damaged_arrays_are_refused() -> None:
    spec = TargetSpec("tokens", SHAPE)
    assert spec.check_codec("SQ8", "it") == 6 * 16
    with pytest.raises(RequestError, match="codec hard: is not for tokens"):
        spec.check_codec("hard", "it")
    with pytest.raises(StoreError):
        TOKENS.load("SQ8", SHAPE, {"ranges": np.zeros((2, 96), np.float32)})
