import numpy as np
import pytest
import torch

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.eval import logreg, sweep


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    means = generator.normal(size=(4, 10))
    labels, wanted = generator.integers(0, 4, 400), generator.integers(0, 4, 150)
    train = means[labels] + generator.normal(size=(400, 10))
    queries = means[wanted] + generator.normal(size=(150, 10))
    return {
        "train_features": (5 + 100 * train).astype(np.float32),
        "train_labels": labels,
        "features": (5 + 100 * queries).astype(np.float32),
        "labels": wanted,
    }


def test_all_rates_at_once_are_torchs_sgd_one_by_one(data, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "BATCH", 64)
    features, labels = torch.randn(150, 10), torch.from_numpy(data["train_labels"][:150])
    rates = [1e-3, 0.1, 1.0]
    weights, biases = sweep.train_layers(features, labels, 4, rates, 30, seed=3)
    for rate, weight, bias in zip(rates, weights, biases, strict=True):
        generator = torch.Generator().manual_seed(3)
        layer = torch.nn.Linear(10, 4)
        layer.weight.data = torch.empty(4, 10).normal_(0, 0.01, generator=generator)
        layer.bias.data.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * 64 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        rows = torch.cat([torch.randperm(150, generator=generator) for _ in range(13)])
        for step in range(30):
            chosen = rows[64 * step : 64 * (step + 1)]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(features[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight, layer.weight.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias, layer.bias.data, rtol=1e-4, atol=1e-5)


def test_it_is_as_good_as_logistic_regression(data, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "MIN_STEPS", 400)
    found = sweep.evaluate(**data, progress=False, names=["a", "b", "c", "d"])
    assert abs(found["top1"] - logreg.evaluate(**data, progress=False)["top1"]) < 3
    assert found["lr"] == max(found["held_out"], key=lambda row: (row["top1"], -row["loss"]))["lr"]
    assert [row["lr"] for row in found["held_out"]] == list(sweep.RATES)
    assert found["correct"].mean() * 100 == pytest.approx(found["top1"])
    assert (found["steps"], found["batch_size"], found["n_train"], found["n_val"]) == (400, 400, 400, 150)
    assert set(found["per_class"]) == {"a", "b", "c", "d"}


def test_the_images_that_are_scored_choose_nothing(data, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "MIN_STEPS", 20)
    first = sweep.evaluate(**data, progress=False)
    other = sweep.evaluate(**{**data, "labels": (data["labels"] + 1) % 4}, progress=False)
    assert (first["lr"], first["held_out"]) == (other["lr"], other["held_out"])
    assert first["top1"] > 50 > other["top1"]


def test_a_rate_that_diverges_is_never_chosen(data, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "MIN_STEPS", 20)
    found = sweep.evaluate(**data, progress=False, rates=[0.01, 1e38])
    assert found["lr"] == 0.01
    assert found["held_out"][1] == {"lr": 1e38, "top1": 0.0, "loss": None}
    with pytest.raises(RequestError, match=r"the probe diverged with every lr of \[1e\+38\]; give lower ones"):
        sweep.evaluate(**data, progress=False, rates=[1e38])


def test_a_choice_at_the_edge_is_noted(data, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "MIN_STEPS", 20)
    notes = sweep.evaluate(**data, progress=False, rates=[1e-6, 1e-5])["notes"]
    assert any("the chosen lr" in note and "smallest or largest that was tried" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rates": []}, RequestError, r"lr: expected positive numbers to choose from, got \[\]"),
        ({"rates": [0.1, -1]}, RequestError, "lr: expected positive numbers"),
        ({"train_labels": np.zeros(400, int)}, RequestError, "one class only; a score needs at least two"),
        ({"train_labels": np.zeros(3, int)}, RequestError, "expected one label for each of 400 features"),
        ({"labels": np.full(150, -1)}, RequestError, "labels: 150 of 150 have no class"),
        ({"features": np.full((150, 10), np.nan)}, FkdError, "features: 150 of 150 rows have NaN"),
        ({"features": np.zeros((150, 9))}, RequestError, "features have 9 dimensions, the training features 10"),
    ],
)
def test_wrong_requests_are_named(data, change, error, message: str) -> None:
    with pytest.raises(error, match=message):
        sweep.evaluate(**{**data, "progress": False, **change})


def test_the_rates_are_dinov2s() -> None:
    assert sweep.RATES == (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_the_same(data, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "MIN_STEPS", 200)
    here, there = (sweep.evaluate(**data, progress=False, device=device) for device in ("cpu", "cuda"))
    assert there["top1"] == pytest.approx(here["top1"], abs=1)
