"""Objectives against NumPy in float64, written out by hand."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

from fkd_ssl.errors import RequestError
from fkd_ssl.objectives import OBJECTIVES, Cosine, FeatureKL, Objective, PrototypeCE, TargetInfo, make_objective

Array = npt.NDArray[np.float64]


def make(name: str, dim: int = 12) -> Objective:
    """An objective with its own temperature; thirty prototypes whose length is not one."""
    prototypes = np.random.default_rng(3).normal(size=(30, dim)).astype(np.float32)
    return make_objective(name, about=TargetInfo(name="swav", dim=dim, arrays={"prototypes": prototypes}))


def pair(batch: int = 5, dim: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """L2-normalised student and target, float64 [B, D]."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, batch, dim, dtype=torch.float64, generator=generator)
    student, target = F.normalize(both, dim=2)
    return student, target


def softmax(row: Array) -> Array:
    powers = np.exp(row)
    return np.asarray(powers / powers.sum())


def cross_entropy(student: Array, target: Array, temperature: float) -> float:
    rows = [
        -sum(p * np.log(q) for p, q in zip(softmax(t / temperature), softmax(s / temperature), strict=True))
        for s, t in zip(student, target, strict=True)
    ]
    return float(sum(rows) / len(rows))


def squared_distance(student: Array, target: Array) -> float:
    return float(np.mean([np.linalg.norm(s - t) ** 2 for s, t in zip(student, target, strict=True)]))


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(1, 2), (5, 12), (16, 128)])
def test_feature_kl_is_the_cross_entropy_of_softmaxed_features(temperature: float, shape: tuple[int, int]) -> None:
    student, target = pair(*shape)
    expected = cross_entropy(student.numpy(), target.numpy(), temperature)
    torch.testing.assert_close(FeatureKL(temperature)(student, target).item(), expected, rtol=1e-12, atol=0)


def test_feature_kl_takes_the_papers_temperature_by_default() -> None:
    student, target = pair()
    assert FeatureKL()(student, target).item() == pytest.approx(cross_entropy(student.numpy(), target.numpy(), 0.2), rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 2), (5, 12), (16, 128)])
def test_cosine_is_the_squared_distance(shape: tuple[int, int]) -> None:
    student, target = pair(*shape)
    expected = squared_distance(student.numpy(), target.numpy())
    assert Cosine()(student, target).item() == pytest.approx(expected, rel=1e-12)


def test_cosine_is_zero_for_equals_and_four_for_opposites() -> None:
    _, target = pair()
    assert Cosine()(target, target).item() == pytest.approx(0, abs=1e-12)
    assert Cosine()(-target, target).item() == pytest.approx(4, abs=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name: str) -> None:
    student, target = pair(3, 6)
    objective = make(name, 6)
    assert torch.autograd.gradcheck(lambda s: objective(s, target), (student.requires_grad_(),))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_value_is_a_mean_over_the_batch(name: str) -> None:
    student, target = pair(4)
    objective = make(name)
    rows = [objective(student[k : k + 1], target[k : k + 1]).item() for k in range(4)]
    assert objective(student, target).item() == pytest.approx(sum(rows) / 4, rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_floor_is_the_least_value_and_is_reached_at_the_target(name: str) -> None:
    objective = make(name)
    for seed in range(5):
        student, target = pair(seed=seed)
        floor = objective.floor(target).item()
        assert floor < objective(student, target).item()
        assert objective(target, target).item() == pytest.approx(floor, abs=1e-12)
        nearby = F.normalize(target + 1e-3 * student, dim=1)
        assert floor < objective(nearby, target).item()


def test_the_floor_of_feature_kl_is_the_targets_entropy() -> None:
    _, target = pair()
    expected = np.mean([-sum(p * np.log(p) for p in softmax(row / 0.2)) for row in target.numpy()])
    assert FeatureKL().floor(target).item() == pytest.approx(expected, rel=1e-12)


def test_feature_kl_has_the_gradient_of_the_kl_divergence() -> None:
    student, target = pair()
    student.requires_grad_()
    (ours,) = torch.autograd.grad(FeatureKL(0.2)(student, target), student)
    kl = F.kl_div(F.log_softmax(student / 0.2, dim=1), F.softmax(target / 0.2, dim=1), reduction="batchmean")
    (theirs,) = torch.autograd.grad(kl, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert theirs.abs().max() > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bfloat16_is_near(name: str) -> None:
    student, target = pair(64, 128)
    objective = make(name, 128)
    expected = objective(student, target).item()
    assert objective(student.bfloat16(), target.bfloat16()).item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_is_near(name: str) -> None:
    student, target = pair(64, 128)
    objective: Callable[..., torch.Tensor] = make(name, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = objective(student.float(), target.float())
    assert value.item() == pytest.approx(objective(student, target).item(), rel=1e-2)


def test_make_objective_passes_the_temperature_on() -> None:
    objective = make_objective("feature_kl", 0.5)
    assert isinstance(objective, FeatureKL)
    assert objective.temperature == 0.5
    assert isinstance(make_objective("cosine"), Cosine)


def test_an_unknown_objective_is_refused_with_the_list() -> None:
    with pytest.raises(RequestError, match=r"objective 'mse' is unknown; there are feature_kl, cosine, prototype_ce"):
        make_objective("mse")


@pytest.mark.parametrize("temperature", [0.0, -0.2])
def test_a_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(RequestError, match=r"temperature .*must be positive"):
        make_objective("feature_kl", temperature)


def test_a_temperature_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(RequestError, match=r"temperature 0\.2: cosine has none"):
        make_objective("cosine", 0.2)


@pytest.mark.parametrize("temperature", [0.04, 0.1, 1.0])
@pytest.mark.parametrize(("shape", "count"), [((1, 2), 2), ((5, 12), 7), ((16, 128), 300)])
def test_prototype_ce_is_the_cross_entropy_of_softmaxed_cosines(temperature: float, shape: tuple[int, int], count: int) -> None:
    student, target = pair(*shape)
    prototypes = torch.from_numpy(np.random.default_rng(1).normal(size=(count, shape[1])))
    unit = [p / np.sqrt(sum(p**2)) for p in prototypes.numpy()]
    cosines = [np.array([[sum(row * p) for p in unit] for row in part.numpy()]) for part in (student, target)]
    expected = cross_entropy(*cosines, temperature)
    assert PrototypeCE(prototypes, temperature)(student, target).item() == pytest.approx(expected, rel=1e-12)


def test_prototype_ce_takes_swavs_temperature_and_the_length_of_a_prototype_does_not_count() -> None:
    student, target = pair()
    prototypes = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    longer = prototypes * torch.linspace(0.5, 3, 7, dtype=torch.float64)[:, None]
    value = PrototypeCE(prototypes, 0.1)(student, target).item()
    assert PrototypeCE(longer)(student, target).item() == pytest.approx(value, rel=1e-12)


def test_the_floor_of_prototype_ce_is_the_entropy_of_the_targets_assignments() -> None:
    _, target = pair()
    prototypes = F.normalize(torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=1)
    rows = target.numpy() @ prototypes.numpy().T
    expected = np.mean([-sum(p * np.log(p) for p in softmax(row / 0.1)) for row in rows])
    assert PrototypeCE(prototypes).floor(target).item() == pytest.approx(expected, rel=1e-12)


def test_prototypes_are_frozen_and_no_part_of_a_checkpoint() -> None:
    objective = make("prototype_ce")
    assert isinstance(objective, PrototypeCE)
    assert list(objective.parameters()) == []
    assert objective.state_dict() == {}
    assert objective.double().prototypes.dtype == torch.float64  # they move with the module


@pytest.mark.parametrize("about", [None, TargetInfo(name="mocov2", dim=12)])
def test_targets_without_prototypes_are_refused(about: TargetInfo | None) -> None:
    named = "" if about is None else " of 'mocov2'"
    with pytest.raises(RequestError, match=rf"prototype_ce: the targets{named} have no prototypes; use a SwAV teacher"):
        make_objective("prototype_ce", about=about)


def test_prototypes_of_another_dimension_are_refused() -> None:
    about = TargetInfo(name="swav", dim=128, arrays={"prototypes": np.ones((30, 64), dtype=np.float32)})
    with pytest.raises(RequestError, match=r"the prototypes of 'swav' are \[30, 64\], expected \[K, 128\]"):
        make_objective("prototype_ce", about=about)


@pytest.mark.parametrize("prototypes", [torch.zeros(3, 4), torch.ones(4), torch.full((3, 4), float("nan"))])
def test_prototypes_that_are_no_directions_are_refused(prototypes: torch.Tensor) -> None:
    with pytest.raises(RequestError, match=r"prototypes \[.*\]: expected a finite matrix \[K, D\] without a row of zeros"):
        PrototypeCE(prototypes)
