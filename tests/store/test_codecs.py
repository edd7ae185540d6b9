import numpy as np
import pytest

from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.store.codecs import Codec, code_size, sample_size, smallest_sample

DIM = 32
# spec: bytes of a code, least mean cosine on targets that the codec was not trained on
SPECS = {
    "Flat": (128, 1.0),
    "SQfp16": (64, 0.9999999),
    "SQbf16": (64, 0.99999),
    "SQ8": (32, 0.9999),
    "SQ6": (24, 0.999),
    "SQ4": (16, 0.98),
    "PQ8x8": (8, 0.8),
    "PQ8": (8, 0.8),
    "PQ16x6": (12, 0.9),
    "OPQ8,PQ8x8": (8, 0.8),
    "OPQ8_16,PQ8x4": (4, 0.6),
    "PCA16,SQ8": (16, 0.85),
    "PCAR16,SQ8": (16, 0.85),
    "RR32,SQ8": (32, 0.9999),
}


def targets(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """Unit vectors whose variance falls off along the axes, as a network's does."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(count, dim)) * 0.9 ** np.arange(dim)
    mixed = values @ np.linalg.qr(np.random.default_rng(99).normal(size=(dim, dim)))[0]
    return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def trained() -> dict[str, Codec]:
    return {spec: Codec.train(spec, targets(600)) for spec in SPECS}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.astype(float) * b).sum(axis=1).mean())


@pytest.mark.parametrize("spec", SPECS)
def test_size_and_fidelity(trained, spec):
    size, floor = SPECS[spec]
    fresh = targets(300, seed=1)
    codes = trained[spec].encode(fresh)
    assert codes.dtype == np.uint8
    assert codes.shape == (300, size)
    assert trained[spec].code_size == code_size(spec, DIM) == size
    decoded = trained[spec].decode(codes)
    assert decoded.dtype == np.float32
    assert cosine(decoded, fresh) >= floor - 1e-6
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, atol=1e-6)


def test_flat_is_exact_and_not_normalised():
    values = 3 * targets(10)
    codec = Codec.train("Flat", values)
    np.testing.assert_array_equal(codec.decode(codec.encode(values)), values)


@pytest.mark.parametrize("spec", SPECS)
def test_codec_rebuilt_from_its_arrays_is_the_same(trained, spec):
    arrays = {name: np.array(array) for name, array in trained[spec].arrays().items()}
    rebuilt = Codec.load(spec, DIM, arrays)
    fresh = targets(200, seed=2)
    codes = trained[spec].encode(fresh)
    np.testing.assert_array_equal(rebuilt.encode(fresh), codes)
    np.testing.assert_array_equal(rebuilt.decode(codes), trained[spec].decode(codes))
    assert rebuilt.code_size == trained[spec].code_size
    for name, array in rebuilt.arrays().items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("spec", ["SQ8", "SQ4", "PQ8x8", "OPQ8,PQ8x8", "PCA16,SQ8"])
def test_the_same_sample_gives_the_same_parameters(trained, spec):
    again = Codec.train(spec, targets(600).copy())
    assert again.arrays()
    for name, array in again.arrays().items():
        np.testing.assert_array_equal(array, trained[spec].arrays()[name])


@pytest.mark.parametrize("spec", SPECS)
def test_a_code_depends_on_its_own_target_alone(trained, spec):
    fresh = targets(64, seed=3)
    together = trained[spec].encode(fresh)
    alone = np.concatenate([trained[spec].encode(fresh[k : k + 1]) for k in range(64)])
    np.testing.assert_array_equal(alone, together)
    decoded = np.concatenate([trained[spec].decode(together[k : k + 1]) for k in range(64)])
    np.testing.assert_allclose(decoded, trained[spec].decode(together), atol=1e-6)


@pytest.mark.parametrize(("spec", "levels"), [("SQ8", 256), ("SQ6", 64), ("SQ4", 16)])
def test_scalar_codecs_are_uniform_steps_over_the_range_with_its_margin(trained, spec, levels):
    """By hand: value = min + (k + 0.5) / levels x span, over the sample's range and a tenth of it at each end."""
    sample = targets(600).astype(float)
    low, high = sample.min(axis=0), sample.max(axis=0)
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
    ranges = trained[spec].arrays()["ranges"]
    np.testing.assert_allclose(ranges[0], low, atol=1e-5)
    np.testing.assert_allclose(ranges[1], high - low, atol=1e-5)
    fresh = targets(100, seed=4)
    raw = trained[spec]._index.sa_decode(trained[spec].encode(fresh))  # before it is normalised again
    inside = (fresh > low) & (fresh < high)
    assert inside.mean() > 0.99
    assert (np.abs(raw - fresh) <= (high - low) / (levels - 1) + 1e-6)[inside].all()


def test_values_beyond_the_sample_are_clipped_not_wrapped(trained):
    outlier = np.zeros((1, DIM), dtype=np.float32)
    outlier[0, 0] = 5
    decoded = trained["SQ8"].decode(trained["SQ8"].encode(outlier))
    assert decoded[0].argmax() == 0


def test_decoding_nothing(trained):
    assert trained["SQ8"].decode(np.zeros((0, DIM), dtype=np.uint8)).shape == (0, DIM)


@pytest.mark.parametrize(
    "spec",
    ["", "sq8", "SQ8 ", "SQ5", "HNSW32", "IVF16,SQ8", "LSH", "SQ8,RFlat", "PQ0x8", "PQ8x0", "OPQ8,SQ8,Flat", "PQ8x8\n", "../x"],
)
def test_specs_off_the_list_are_refused(spec):
    with pytest.raises(RequestError, match="is none of those accepted, for instance SQ8"):
        code_size(spec, DIM)
    with pytest.raises(RequestError, match="is none of those accepted"):
        Codec.train(spec, targets(10))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("PQ5x8", "5 sub-vectors do not divide 32 dimensions"),
        ("PQ8x3", "3 bits a sub-vector; 4 to 12 are accepted"),
        ("PQ8x13", "13 bits a sub-vector; 4 to 12"),
        ("OPQ5,PQ8x8", "5 parts do not divide 32 of 32 dimensions"),
        ("OPQ8_64,PQ8x8", "8 parts do not divide 64 of 32"),
        ("PCA64,SQ8", "cannot reduce 32 dimensions so"),
        ("PCA16_8,SQ8", "cannot reduce 32 dimensions so"),
        ("PCA16,PQ5x8", "5 sub-vectors do not divide 16"),
    ],
)
def test_specs_that_do_not_fit_the_dimension_are_refused(spec, message):
    with pytest.raises(RequestError, match=message):
        code_size(spec, DIM)


@pytest.mark.parametrize(("spec", "needed"), [("PQ8x8", 256), ("PQ8x4", 16), ("PCA16,SQ8", 16), ("SQ8", 1)])
def test_samples_that_are_too_small_are_refused(spec, needed):
    assert smallest_sample(spec) == needed
    Codec.train(spec, targets(needed))
    if needed > 1:
        with pytest.raises(
            RequestError, match=rf"codec {spec} needs at least {needed} targets .* there are {needed - 1}: store"
        ):
            Codec.train(spec, targets(needed - 1))


def test_sample_sizes():
    assert sample_size("SQ8") == 4096
    assert sample_size("PQ8x8") == 64 * 256
    assert sample_size("OPQ16,PQ16x4") == 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {}, r"has arrays \[\], expected \['ranges'\]"),
        (lambda a: {**a, "more": a["ranges"]}, "has arrays"),
        (lambda a: {"ranges": a["ranges"][:1]}, r"ranges is float32 \(1, 32\)"),
        (lambda a: {"ranges": a["ranges"].astype(np.float64)}, "ranges is float64"),
        (lambda a: {"ranges": a["ranges"] * np.nan}, "not finite"),
    ],
)
def test_arrays_that_do_not_fit_the_spec_are_refused(trained, change, message):
    with pytest.raises(StoreError, match=message):
        Codec.load("SQ8", DIM, change(trained["SQ8"].arrays()))


def test_a_spec_off_the_list_in_a_store_is_a_store_error():
    with pytest.raises(StoreError, match="is none of those accepted"):
        Codec.load("IVF1,Flat", DIM, {})
