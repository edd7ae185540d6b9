import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval import held_out, logreg


def gaussians(count: int, *, noise: float, seed: int, classes: int = 6, dim: int = 20):
    means = np.random.default_rng(99).normal(size=(classes, dim))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    return (means[labels] + noise * generator.normal(size=(count, dim))).astype(np.float32), labels


@pytest.fixture(scope="module")
def noisy():
    """Features whose best probe is regularised, with scales and offsets that need standardising, and one constant dimension."""
    train, labels = gaussians(400, noise=2.5, seed=0)
    features, wanted = gaussians(300, noise=2.5, seed=1)
    scale, offset = np.geomspace(1e-3, 1e3, 20).astype(np.float32), np.arange(20, dtype=np.float32)
    train, features = train * scale + offset, features * scale + offset
    train[:, 7] = features[:, 7] = 0.1
    return train, labels, features, wanted


def run(data, **options):
    train, labels, features, wanted = data
    return logreg.evaluate(
        train_features=train, train_labels=labels, features=features, labels=wanted, progress=False, **options
    )


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_fit_is_sklearns_optimum(strength: float) -> None:
    train, labels = gaussians(500, noise=2.0, seed=0)
    weight, bias = logreg.minimise(torch.from_numpy(train), torch.from_numpy(labels), 6, strength)
    oracle = LogisticRegression(C=strength, tol=1e-10, max_iter=5000).fit(train.astype(np.float64), labels)
    np.testing.assert_allclose(weight.numpy(), oracle.coef_, atol=2e-3 * np.abs(oracle.coef_).max())
    # only differences of biases matter; nothing determines their mean
    np.testing.assert_allclose(bias.numpy() - bias.numpy().mean(), oracle.intercept_ - oracle.intercept_.mean(), atol=2e-3)


def test_separable_classes_are_told_apart() -> None:
    result = run((*gaussians(300, noise=0.05, seed=0), *gaussians(100, noise=0.05, seed=1)))
    assert result["top1"] == 100
    assert result["top5"] == 100
    assert result["correct"].all()
    assert result["n_train"] == 300
    assert result["n_val"] == 100
    assert result["classes"] == 6
    assert result["feature_dim"] == 20


def test_the_strength_is_chosen_on_train_alone(noisy) -> None:
    train, labels, features, wanted = noisy
    result = run(noisy)
    assert [row["C"] for row in result["held_out"]] == sorted(logreg.STRENGTHS)
    best = max(row["top1"] for row in result["held_out"])
    assert best == next(row["top1"] for row in result["held_out"] if row["C"] == result["C"])
    other = run((train, labels, features[:7] * 0, (wanted[:7] + 1) % 6))  # other images, other labels: the same choice
    assert other["held_out"] == result["held_out"]
    assert other["C"] == result["C"]

    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation[7] = 1
    oracle = LogisticRegression(C=result["C"], tol=1e-8, max_iter=5000).fit((train - mean) / deviation, labels)
    assert result["top1"] == pytest.approx(100 * oracle.score((features - mean) / deviation, wanted), abs=0.7)
    assert run(noisy)["correct"].tolist() == result["correct"].tolist()
    assert run(noisy, seed=1)["held_out"] != result["held_out"]


def test_the_sweep_can_be_chosen_and_its_edge_is_noted(noisy) -> None:
    result = run(noisy, strengths=[1e-2, 1e-3])
    assert [row["C"] for row in result["held_out"]] == [1e-3, 1e-2]
    assert any("smallest or largest that was tried" in note for note in result["notes"])
    assert run(noisy, strengths=[1e-2])["notes"] == []


def test_the_held_out_part_is_a_tenth_of_each_class() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 40, 3, 1])
    held = held_out.draw(labels, seed=0)
    np.testing.assert_array_equal(np.bincount(labels[held], minlength=4), [10, 4, 1, 0])
    np.testing.assert_array_equal(held, held_out.draw(labels, seed=0))
    assert (held != held_out.draw(labels, seed=1)).any()


def test_classes_come_from_the_class_list(noisy) -> None:
    train, labels, features, wanted = noisy
    result = run((train, labels, features, wanted), num_classes=9, strengths=[1e-2])
    assert result["classes"] == 9
    assert result["top1"] == pytest.approx(run(noisy, strengths=[1e-2])["top1"], abs=1.5)
    two = run((train, labels % 2, features, wanted % 2), strengths=[1e-2])
    assert two["top5"] == 100
    assert two["notes"] == ["top5 is 100 by definition: there are 2 classes"]


def test_wrong_requests_are_named(noisy) -> None:
    train, labels, features, wanted = noisy
    with pytest.raises(RequestError, match="one class only"):
        run((train, labels * 0, features, wanted * 0))
    with pytest.raises(RequestError, match="no class has two training images"):
        run((train[:3], [0, 1, 2], features, wanted * 0))
    with pytest.raises(RequestError, match=r"C: expected positive numbers to choose from, got \[1.0, 0.0\]"):
        run(noisy, strengths=[1.0, 0.0])
    with pytest.raises(RequestError, match="labels: label 5, but there are 3 classes"):
        run((train, labels % 3, features, wanted))
    with pytest.raises(RequestError, match="features have 4 dimensions, the training features 20"):
        run((train, labels, features[:, :4], wanted))
    with pytest.raises(FkdError, match="features: 300 of 300 rows have NaN"):
        run((train, labels, features * np.nan, wanted))
    with pytest.raises(FkdError, match=r"values up to 3.4e\+38 are too large to standardise in float32"):
        run((np.float32([[3.4e38], [-3.4e38], [-3.4e38]] * 4), [0, 1, 1] * 4, features[:, :1], wanted * 0))


def test_huge_features_are_no_worse(noisy) -> None:
    train, labels, features, wanted = noisy
    usual = run(noisy, strengths=[1e-2])["top1"]
    assert run((train * 1e30, labels, features * 1e30, wanted), strengths=[1e-2])["top1"] == pytest.approx(usual, abs=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_the_same(noisy) -> None:
    here, there = run(noisy), run(noisy, device="cuda")
    assert there["top1"] == pytest.approx(here["top1"], abs=1)
    assert there["C"] == here["C"]
