import faiss
import numpy as np
import pytest

from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.targets import Codec
from fkd_ssl.targets.faiss_codecs import FaissCodec, _parameters, code_size, min_sample, parameter_shapes, sample_size

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
    "OPQ4_16,PQ4x4": (2, 0.4),
    "PCA16,SQ8": (16, 0.85),
    "PCAR16,SQ8": (16, 0.85),
    "RR32,SQ8": (32, 0.9999),
}


def targets(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    """Returns unit vectors whose variance decreases along the axes, as for a network."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(count, dim)) * 0.9 ** np.arange(dim)
    mixed = values @ np.linalg.qr(np.random.default_rng(99).normal(size=(dim, dim)))[0]
    return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def trained() -> dict[str, Codec]:
    return {spec: FaissCodec.train(spec, sample_for(spec)) for spec in SPECS}


def test_pca_gives_the_mean_back_that_lies_outside_its_subspace():
    """faiss's own decoding omits it, and the targets of a network share a large mean."""
    shift = np.random.default_rng(5).normal(size=DIM)
    values = targets(900).astype(float) + 2 * shift / np.linalg.norm(shift)
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    sample, fresh = values[:600], values[600:]
    for spec in ("PCA16,SQ8", "PCAR16,SQ8"):
        codec = FaissCodec.train(spec, sample)
        decoded = codec.decode(codec.encode(fresh))
        mean = sample.astype(float).mean(axis=0)
        rows = np.linalg.svd(sample - mean)[2][:16]  # what 16 components can hold at best
        best = mean + (fresh - mean) @ rows.T @ rows
        best /= np.linalg.norm(best, axis=1, keepdims=True)
        assert cosine(decoded, fresh) == pytest.approx(cosine(best, fresh), abs=1e-4)
        again = FaissCodec.load(spec, DIM, codec.arrays())
        np.testing.assert_array_equal(again.decode(codec.encode(fresh)), decoded)


def sample_for(spec: str) -> np.ndarray:
    return targets(max(600, min_sample(spec)))


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
    codec = FaissCodec.train("Flat", values)
    np.testing.assert_array_equal(codec.decode(codec.encode(values)), values)


@pytest.mark.parametrize("spec", SPECS)
def test_codec_rebuilt_from_its_arrays_is_the_same(trained, spec):
    arrays = {name: np.array(array) for name, array in trained[spec].arrays().items()}
    rebuilt = FaissCodec.load(spec, DIM, arrays)
    fresh = targets(200, seed=2)
    codes = trained[spec].encode(fresh)
    np.testing.assert_array_equal(rebuilt.encode(fresh), codes)
    np.testing.assert_array_equal(rebuilt.decode(codes), trained[spec].decode(codes))
    assert rebuilt.code_size == trained[spec].code_size
    for name, array in rebuilt.arrays().items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("spec", ["SQ8", "SQ4", "PQ16x6", "OPQ4_16,PQ4x4", "PCA16,SQ8"])
def test_the_same_sample_gives_the_same_parameters(trained, spec):
    before = faiss.omp_get_max_threads()
    for threads in (3,) if spec.startswith("OPQ") else (1, 3):  # OPQ takes seconds
        faiss.omp_set_num_threads(threads)
        again = FaissCodec.train(spec, sample_for(spec).copy())
        assert again.arrays()
        for name, array in again.arrays().items():
            np.testing.assert_array_equal(array, trained[spec].arrays()[name])
    faiss.omp_set_num_threads(before)


@pytest.mark.parametrize("spec", SPECS)
def test_a_code_depends_on_its_own_target_alone(trained, spec):
    fresh = targets(64, seed=3)
    together = trained[spec].encode(fresh)
    alone = np.concatenate([trained[spec].encode(fresh[k : k + 1]) for k in range(64)])
    np.testing.assert_array_equal(alone, together)
    decoded = np.concatenate([trained[spec].decode(together[k : k + 1]) for k in range(64)])
    np.testing.assert_allclose(decoded, trained[spec].decode(together), atol=1e-6)


@pytest.mark.parametrize(("spec", "levels"), [("SQ8", 256), ("SQ6", 64)])
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


def test_sq4_leaves_out_a_hundredth_of_the_values_at_each_end(trained):
    """By hand: of 600 values, the seventh smallest and the seventh largest are the ends of the range."""
    ordered = np.sort(targets(600), axis=0)
    low, span = trained["SQ4"].arrays()["ranges"]
    np.testing.assert_allclose(low, ordered[6], atol=1e-6)
    np.testing.assert_allclose(low + span, ordered[-7], atol=1e-6)


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
    with pytest.raises(RequestError, match=": not supported; choose, for instance, SQ8"):
        code_size(spec, DIM)
    with pytest.raises(RequestError, match=": not supported"):
        FaissCodec.train(spec, targets(10))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("PQ5x8", "5 sub-vectors do not divide 32 dimensions"),
        ("PQ8x3", "3 bits per sub-vector; must be between 4 and 12"),
        ("PQ8x13", "13 bits per sub-vector; must be between 4 and 12"),
        ("OPQ5,PQ8x8", "5 parts do not divide 32 of 32 dimensions"),
        ("OPQ8_64,PQ8x8", "8 parts do not divide 64 of 32"),
        ("PCA64,SQ8", "PCA takes one number of dimensions, at most 32"),
        ("PCA16_8,SQ8", "PCA takes one number of dimensions, at most 32"),
        ("PCA16,PQ5x8", "5 sub-vectors do not divide 16"),
    ],
)
def test_specs_that_do_not_fit_the_dimension_are_refused(spec, message):
    with pytest.raises(RequestError, match=message):
        code_size(spec, DIM)


@pytest.mark.parametrize(("spec", "needed"), [("PQ8x8", 39 * 256), ("PQ8x4", 39 * 16), ("PCA16,SQ8", 16), ("SQ8", 1)])
def test_samples_that_are_too_small_are_refused(spec, needed):
    assert min_sample(spec) == needed
    FaissCodec.train(spec, targets(needed))
    if needed > 1:
        with pytest.raises(
            RequestError, match=rf"codec {spec} needs at least {needed} targets .* there are {needed - 1}: store"
        ):
            FaissCodec.train(spec, targets(needed - 1))


def test_sample_sizes():
    assert sample_size("SQ8") == 4096
    assert sample_size("PQ8x8") == 64 * 256
    assert sample_size("PQ16x4") == 4096
    assert sample_size("OPQ16,PQ16x4") == 64 * 256  # OPQ trains a codec of 256 centroids of its own
    assert min_sample("OPQ8,PQ8x4") == 39 * 256
    assert all(sample_size(spec) >= min_sample(spec) for spec in SPECS)


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
        FaissCodec.load("SQ8", DIM, change(trained["SQ8"].arrays()))


def test_a_spec_off_the_list_in_a_store_is_a_store_error():
    with pytest.raises(StoreError, match=": not supported"):
        FaissCodec.load("IVF1,Flat", DIM, {})


def test_a_transform_that_is_not_orthonormal_is_refused(trained):
    arrays = {name: np.array(array) for name, array in trained["RR32,SQ8"].arrays().items()}
    arrays["transform"][0] *= 2
    with pytest.raises(StoreError, match="codec RR32,SQ8: the rows of its transform are not orthonormal"):
        FaissCodec.load("RR32,SQ8", DIM, arrays)


@pytest.mark.parametrize("spec", ["SQfp16", "SQbf16", "Flat"])
@pytest.mark.parametrize("byte", [0xFF, 0x7F])
def test_codes_of_no_finite_target_are_refused(trained, spec, byte):
    codes = trained[spec].encode(targets(4))
    codes[2] = byte  # NaN, or the largest bfloat16 there is
    if spec == "Flat" and byte == 0x7F:
        codes[2, 2::4] = 0x80  # 0x7f807f7f: a NaN
    with pytest.raises(StoreError, match="decoded targets are not finite: a file of the store is damaged"):
        trained[spec].decode(codes)


@pytest.mark.parametrize(("spec", "dim"), [("OPQ8,PQ8x8", 16384), ("PQ8x12", 32768), ("PCA9999,SQ8", 10000)])
def test_codecs_of_too_many_parameters_are_refused_before_any_memory_is_taken(spec, dim):
    with pytest.raises(
        RequestError, match=rf"codec {spec}: [0-9,]+ parameters for {dim} dimensions, over 67,108,864; choose SQ8"
    ):
        code_size(spec, dim)
    with pytest.raises(StoreError, match="choose SQ8"):
        FaissCodec.load(spec, dim, {})


def test_shapes_of_parameters_are_those_that_training_makes(trained):
    for spec, codec in trained.items():
        shapes = {name: array.shape for name, array in codec.arrays().items()}
        assert shapes == parameter_shapes(spec, DIM)
        vectors = {name: faiss.vector_to_array(vector).size for name, vector in _parameters(codec._index).items()}
        assert vectors == {name: int(np.prod(shape)) for name, shape in shapes.items()}
