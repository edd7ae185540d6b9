"""Objectives against NumPy in float64, written out by hand."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

from fkd_ssl.errors import RequestError
from fkd_ssl.objectives import (
    OBJECTIVES,
    Cosine,
    Discriminator,
    FeatureKL,
    Objective,
    PrototypeCE,
    QueueKL,
    Relational,
    SoftCE,
    TokenCosine,
    TokenRelations,
    Weighted,
    complete,
    make_objective,
    make_objectives,
    only,
    settings_of,
)
from fkd_ssl.targets import TargetSpec, TeacherInfo

Array = npt.NDArray[np.float64]
SUM = "feature_kl+0.5*relational+2*queue_kl"
OF_EMBEDDINGS = [name for name, objective in OBJECTIVES.items() if objective.kind == "embedding"]
OF_TOKENS = ["token_cosine", "token_relations", "token_cosine+3*token_relations"]


def make(name: str, dim: int = 12) -> Objective:
    """Makes an objective with its default temperature; thirty prototypes of various lengths, or a queue of fifty."""
    prototypes = np.random.default_rng(3).normal(size=(30, dim)).astype(np.float32)
    teacher = TeacherInfo(name="swav", spec=TargetSpec("embedding", (dim,)), arrays={"prototypes": prototypes})
    return make_objective(name.replace("queue_kl", "queue_kl(queue=50)"), teacher=teacher)


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
    torch.testing.assert_close(FeatureKL(temperature=temperature)(student, target).item(), expected, rtol=1e-12, atol=0)


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


@pytest.mark.parametrize("name", [*OF_EMBEDDINGS, SUM])
def test_gradcheck(name: str) -> None:
    student, target = pair(3, 6)
    objective = make(name, 6)
    assert torch.autograd.gradcheck(lambda s: objective(s, target), (student.requires_grad_(),))


@pytest.mark.parametrize("name", [name for name in OF_EMBEDDINGS if name != "relational"])
def test_the_value_is_a_mean_over_the_batch(name: str) -> None:
    student, target = pair(4)
    objective = make(name)
    rows = [objective(student[k : k + 1], target[k : k + 1]).item() for k in range(4)]
    assert objective(student, target).item() == pytest.approx(sum(rows) / 4, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in OF_EMBEDDINGS if name != "queue_kl"])
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
    (ours,) = torch.autograd.grad(FeatureKL(temperature=0.2)(student, target), student)
    kl = F.kl_div(F.log_softmax(student / 0.2, dim=1), F.softmax(target / 0.2, dim=1), reduction="batchmean")
    (theirs,) = torch.autograd.grad(kl, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert theirs.abs().max() > 1e-3


@pytest.mark.parametrize("name", [*OF_EMBEDDINGS, SUM])
def test_bfloat16_is_near(name: str) -> None:
    student, target = pair(64, 128)
    objective = make(name, 128)
    expected = objective(student, target).item()
    assert objective(student.bfloat16(), target.bfloat16()).item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", [*OF_EMBEDDINGS, SUM])
def test_autocast_is_near(name: str) -> None:
    student, target = pair(64, 128)
    objective: Callable[..., torch.Tensor] = make(name, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = objective(student.float(), target.float())
    assert value.item() == pytest.approx(objective(student, target).item(), rel=1e-2)


def test_make_objective_passes_the_temperature_on() -> None:
    objective = make_objective("feature_kl(temperature=0.5)")
    assert isinstance(objective, FeatureKL)
    assert objective.temperature == 0.5
    assert isinstance(make_objective("cosine"), Cosine)


def test_blanks_around_a_name_do_not_matter() -> None:
    assert type(make_objective(" cosine ")) is Cosine


def test_an_unknown_objective_is_refused_with_the_list() -> None:
    with pytest.raises(
        RequestError, match=r"objective 'mse' is unknown; there are feature_kl, cosine, queue_kl, prototype_ce, rel"
    ):
        make_objective("mse")


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if settings_of(name)])
@pytest.mark.parametrize("value", ["0.0", "-0.2", "1e999", "'1'", "True"])
def test_a_setting_must_be_positive(name: str, value: str) -> None:
    kind = "distribution" if name == "soft_ce" else "embedding"
    teacher = TeacherInfo(name="t", spec=TargetSpec(kind, (4,)), arrays={"prototypes": np.ones((3, 4))})
    for setting in settings_of(name):
        with pytest.raises(RequestError, match=rf"objective {name}: .*{setting} .*must be positive and finite"):
            make_objective(f"{name}({setting}={value})", teacher=teacher)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("cosine(temperature=0.2)", r"objective cosine: no setting 'temperature'; it has none"),
        ("feature_kl(queue=8)", r"objective feature_kl: no setting 'queue'; it has temperature"),
        (
            "queue_kl(temprature=1)",
            r"no setting 'temprature'; did you mean temperature\?; it has queue, temperature, teacher_t",
        ),
        ("queue_kl(dim=9)", r"objective queue_kl: no setting 'dim'"),
        ("feature_kl+cosine(queue=8)", r"objective cosine: no setting 'queue'"),
        ("discriminator(temperature=2)", r"objective discriminator: no setting 'temperature'; it has none"),
    ],
)
def test_a_setting_that_an_objective_does_not_have_is_refused(expression: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        make_objective(expression, teacher=TeacherInfo(name="t", spec=TargetSpec("embedding", (4,))))


@pytest.mark.parametrize("temperature", [0.04, 0.1, 1.0])
@pytest.mark.parametrize(("shape", "count"), [((1, 2), 2), ((5, 12), 7), ((16, 128), 300)])
def test_prototype_ce_is_the_cross_entropy_of_softmaxed_cosines(temperature: float, shape: tuple[int, int], count: int) -> None:
    student, target = pair(*shape)
    prototypes = torch.from_numpy(np.random.default_rng(1).normal(size=(count, shape[1])))
    unit = [p / np.sqrt(sum(p**2)) for p in prototypes.numpy()]
    cosines = [np.array([[sum(row * p) for p in unit] for row in part.numpy()]) for part in (student, target)]
    expected = cross_entropy(*cosines, temperature)
    assert PrototypeCE(prototypes, temperature=temperature)(student, target).item() == pytest.approx(expected, rel=1e-12)


def test_prototype_ce_takes_swavs_temperature_and_the_length_of_a_prototype_does_not_count() -> None:
    student, target = pair()
    prototypes = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    longer = prototypes * torch.linspace(0.5, 3, 7, dtype=torch.float64)[:, None]
    value = PrototypeCE(prototypes, temperature=0.1)(student, target).item()
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


@pytest.mark.parametrize("teacher", [None, TeacherInfo(name="mocov2", spec=TargetSpec("embedding", (12,)))])
def test_targets_without_prototypes_are_refused(teacher: TeacherInfo | None) -> None:
    named = "" if teacher is None else " of 'mocov2'"
    with pytest.raises(RequestError, match=rf"prototype_ce: the targets{named} have no prototypes; use a SwAV teacher"):
        make_objective("prototype_ce", teacher=teacher)


def test_prototypes_of_another_dimension_are_refused() -> None:
    teacher = TeacherInfo(
        name="swav", spec=TargetSpec("embedding", (128,)), arrays={"prototypes": np.ones((30, 64), dtype=np.float32)}
    )
    with pytest.raises(RequestError, match=r"the prototypes of 'swav' are \[30, 64\], expected \[K, 128\]"):
        make_objective("prototype_ce", teacher=teacher)


@pytest.mark.parametrize("prototypes", [torch.zeros(3, 4), torch.ones(4), torch.full((3, 4), float("nan"))])
def test_prototypes_that_are_no_directions_are_refused(prototypes: torch.Tensor) -> None:
    with pytest.raises(RequestError, match=r"prototypes \[.*\]: expected a finite matrix \[K, D\] without a row of zeros"):
        PrototypeCE(prototypes)


class TestQueueKL:
    @pytest.mark.parametrize(("temperature", "teacher"), [(0.2, 1e-4), (0.07, 0.07), (1.0, 0.5)])
    @pytest.mark.parametrize(("shape", "size"), [((1, 2), 3), ((5, 12), 7), ((16, 128), 300)])
    def test_it_is_the_cross_entropy_of_similarities(
        self, temperature: float, teacher: float, shape: tuple[int, int], size: int
    ) -> None:
        student, target = pair(*shape)
        objective = QueueKL(shape[1], queue=size, temperature=temperature, teacher_temperature=teacher).double()
        queue = objective.queue.numpy()
        np.testing.assert_allclose((queue**2).sum(axis=1), 1, rtol=1e-6)
        expected = 0.0
        for s, t in zip(student.numpy(), target.numpy(), strict=True):
            a = np.array([sum(s * t), *(sum(s * q) for q in queue)]) / temperature
            b = np.array([sum(t * t), *(sum(t * q) for q in queue)]) / teacher
            p = np.exp(b - b.max())
            expected -= float((p / p.sum() * (a - np.log(np.exp(a).sum()))).sum()) / len(target)
        assert objective(student, target).item() == pytest.approx(expected, rel=1e-10)

    def test_at_seeds_temperatures_the_teacher_points_at_its_own_target(self) -> None:
        """The loss then is InfoNCE (van den Oord et al., arXiv 1807.03748) with the target as the positive."""
        student, target = pair(8, 32)
        objective = QueueKL(32, queue=64)
        queue = objective.queue.double()
        logits = np.array([[s @ t, *(s @ queue.numpy().T)] for s, t in zip(student.numpy(), target.numpy(), strict=True)]) / 0.2
        expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[:, 0])
        assert objective(student, target).item() == pytest.approx(expected, rel=1e-6)
        assert objective.floor(target).item() == pytest.approx(0, abs=1e-9)

    def test_the_floor_is_the_entropy_at_the_teachers_temperature(self) -> None:
        student, target = pair()
        objective = QueueKL(12, queue=30, temperature=0.5, teacher_temperature=0.5).double()
        rows = np.concatenate([np.ones((5, 1)), target.numpy() @ objective.queue.numpy().T], axis=1)
        expected = np.mean([-sum(p * np.log(p) for p in softmax(row / 0.5)) for row in rows])
        assert objective.floor(target).item() == pytest.approx(expected, rel=1e-12)
        assert objective.floor(target).item() < objective(student, target).item()

    def test_the_queue_holds_the_latest_targets_in_a_ring(self) -> None:
        objective = QueueKL(4, queue=6)
        first = objective.queue.clone()
        rows = F.normalize(torch.randn(11, 4, generator=torch.Generator().manual_seed(1)), dim=1)
        objective.remember(rows[:4])
        assert torch.equal(objective.queue, torch.cat([rows[:4], first[4:]]))
        objective.remember(rows[4:8])
        assert torch.equal(objective.queue, torch.cat([rows[6:8], rows[2:6]]))
        assert objective.next.item() == 2
        objective.remember(rows)  # more than it holds
        assert sorted(objective.queue.tolist()) == sorted(rows[-6:].tolist())

    def test_it_is_part_of_a_checkpoint_and_leaves_the_global_draw_alone(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        objective = QueueKL(4, queue=6)
        assert torch.equal(torch.rand(3), expected)
        assert set(objective.state_dict()) == {"queue", "next"}
        assert list(objective.parameters()) == []

    def test_it_is_the_same_until_it_is_told_to_remember(self) -> None:
        student, target = pair()
        objective = make("queue_kl")
        value = objective(student, target).item()
        assert objective(student, target).item() == value
        objective.remember(target)
        assert objective(student, target).item() != value

    def test_what_it_cannot_be_is_refused(self) -> None:
        with pytest.raises(RequestError, match=r"objective queue_kl: queue 0: must be positive and finite"):
            QueueKL(4, queue=0)
        with pytest.raises(RequestError, match=r"objective queue_kl: queue 2.5: must be a whole number"):
            make_objective("queue_kl(queue=2.5)", teacher=TeacherInfo(name="t", spec=TargetSpec("embedding", (4,))))
        with pytest.raises(RequestError, match="queue_kl: it needs the size of the targets"):
            make_objective("queue_kl")


class TestRelational:
    @pytest.mark.parametrize("temperature", [0.04, 0.5])
    @pytest.mark.parametrize("shape", [(2, 3), (5, 12), (16, 128)])
    def test_it_is_the_cross_entropy_of_likenesses_to_the_others(self, temperature: float, shape: tuple[int, int]) -> None:
        student, target = pair(*shape)
        expected = 0.0
        for i in range(len(student)):
            others = [j for j in range(len(student)) if j != i]
            p, q = (softmax(np.array([r[i] @ r[j] for j in others]) / temperature) for r in (target.numpy(), student.numpy()))
            expected -= float(sum(p * np.log(q))) / len(student)
        assert Relational(temperature=temperature)(student, target).item() == pytest.approx(expected, rel=1e-10)

    def test_turning_all_of_the_student_changes_nothing(self) -> None:
        student, target = pair(6, 12)
        turn, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        assert Relational()(student @ turn, target).item() == pytest.approx(Relational()(student, target).item(), rel=1e-10)

    def test_one_crop_has_no_relations(self) -> None:
        with pytest.raises(RequestError, match=r"objective relational: needs at least 2 crops in a batch, found 1"):
            Relational()(*pair(1))


class TestSums:
    def test_the_value_and_the_floor_are_the_weighted_sums(self) -> None:
        student, target = pair()
        total = make_objective("feature_kl + 0.5*relational+2*cosine")
        assert isinstance(total, Weighted)
        parts = [(1, FeatureKL()), (0.5, Relational()), (2, Cosine())]
        assert total(student, target).item() == pytest.approx(sum(w * p(student, target).item() for w, p in parts), rel=1e-12)
        assert total.floor(target).item() == pytest.approx(sum(w * p.floor(target).item() for w, p in parts), rel=1e-12)

    def test_one_with_a_weight(self) -> None:
        student, target = pair()
        assert make_objective("0.1*cosine")(student, target).item() == pytest.approx(0.1 * Cosine()(student, target).item())

    def test_the_kind_is_that_of_the_parts(self) -> None:
        assert make_objective("feature_kl+cosine").kind == "embedding"
        teacher = TeacherInfo(name="r50", spec=TargetSpec("distribution", (10,)))
        assert make_objective("soft_ce+discriminator", teacher=teacher).kind == "distribution"
        with pytest.raises(RequestError, match="objectives for distribution and embedding targets cannot be summed"):
            Weighted([FeatureKL(), SoftCE()], [1, 1])

    def test_parts_remember_and_are_saved(self) -> None:
        total = make(SUM)
        assert set(total.state_dict()) == {"parts.2.queue", "parts.2.next"}
        before = total.state_dict()["parts.2.queue"].clone()
        total.remember(pair()[1])
        assert not torch.equal(total.state_dict()["parts.2.queue"], before)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            (
                "feature_kl+x*cosine",
                r"objective 'feature_kl\+x\*cosine': expected a sum such as feature_kl\+0\.5\*queue_kl\(queue=",
            ),
            ("feature_kl+-1*cosine", r"the weight -1 is not positive and finite"),
            ("1e999*cosine", r"the weight inf is not positive and finite"),
            ("feature_kl+cosin", r"objective 'cosin' is unknown; .*did you mean cosine"),
            ("feature_kl+", r"expected a sum"),
            ("feature_kl(0.2)", r"expected a sum"),
            ("feature_kl(temperature=print(1))", r"expected a sum"),
            ("(feature_kl+cosine)*2", r"expected a sum"),
            ("__import__('os').getcwd()", r"expected a sum"),
            ("cosine-cosine", r"expected a sum"),
            ("", r"expected a sum"),
            ("+".join(["cosine"] * 10**5), r"expected a sum"),
        ],
    )
    def test_what_is_not_a_sum_is_refused(self, name: str, said: str) -> None:
        with pytest.raises(RequestError, match=said):
            make_objective(name)

    def test_every_part_has_its_own_settings(self) -> None:
        total = make_objective("feature_kl(temperature=0.5) + 0.25*relational(temperature=2)")
        assert isinstance(total, Weighted)
        assert [part.temperature for part in total.parts] == [0.5, 2]
        assert total.weights == [1, 0.25]


def test_settings_arrive() -> None:
    expression = "queue_kl(temperature=0.07, teacher_temperature=0.08, queue=9)"
    objective = make_objective(expression, teacher=TeacherInfo(name="t", spec=TargetSpec("embedding", (4,))))
    assert isinstance(objective, QueueKL)
    assert (objective.temperature, objective.teacher_temperature, objective.queue.shape) == (0.07, 0.08, (9, 4))


def test_an_objective_with_a_new_setting_needs_its_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(Cosine):
        def __init__(self, *, scale: float = 2.0) -> None:
            super().__init__()
            self.scale = scale

    monkeypatch.setitem(OBJECTIVES, "scaled", Scaled)
    assert settings_of("scaled") == ["scale"]
    objective = make_objective("scaled(scale=3)")
    assert isinstance(objective, Scaled)
    assert objective.scale == 3


def classes(batch: int = 5, count: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A student's logits and a teacher's probabilities, some of them 0, float64 [B, K]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, batch, count, dtype=torch.float64, generator=generator)
    target = teacher.softmax(dim=1)
    target[0, :3] = 0
    return student, target / target.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(1.0, None), (4.0, None), (2.0, 1.0), (1.0, 3.0)])
def test_soft_ce_is_the_cross_entropy_of_the_classes(temperature: float, teacher_temperature: float | None) -> None:
    student, target = classes()
    sharpened = target.numpy() ** (1 / (teacher_temperature or temperature))
    sharpened /= sharpened.sum(axis=1, keepdims=True)
    rows = [-(p * np.log(softmax(s / temperature))).sum() for p, s in zip(sharpened, student.numpy(), strict=True)]
    objective = SoftCE(temperature=temperature, teacher_temperature=teacher_temperature)
    assert objective(student, target).item() == pytest.approx(np.mean(rows), rel=1e-12)
    entropy = np.mean([-sum(p * np.log(p) for p in row if p > 0) for row in sharpened])
    assert objective.floor(target).item() == pytest.approx(entropy, rel=1e-12)


def test_soft_ce_at_a_temperature_is_that_of_the_teachers_logits() -> None:
    student, _ = classes()
    logits = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    expected = -((logits / 4).softmax(dim=1) * (student / 4).log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(SoftCE(temperature=4.0)(student, logits.softmax(dim=1)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_ce_gradients_floor_and_bfloat16(temperature: float) -> None:
    student, target = classes(4, 6)
    objective = SoftCE(temperature=temperature)
    assert torch.autograd.gradcheck(lambda s: objective(s, target), (student.requires_grad_(),))
    target = classes(4, 6)[1].clamp_min(1e-9)
    target /= target.sum(dim=1, keepdim=True)
    assert objective(target.log(), target).item() == pytest.approx(objective.floor(target).item(), rel=1e-9)
    student, target = classes(64, 1000)
    near = objective(student.bfloat16(), target.float())
    assert near.dtype == torch.float32
    assert near.item() == pytest.approx(objective(student, target).item(), rel=1e-2)


def test_an_objective_is_for_one_kind_of_targets() -> None:
    teacher = TeacherInfo(name="r50", spec=TargetSpec("distribution", (10,)))
    assert isinstance(make_objective("soft_ce(temperature=2, teacher_temperature=1)", teacher=teacher), SoftCE)
    with pytest.raises(RequestError, match="targets of 'r50' are class probabilities: choose --objective soft_ce and --head"):
        make_objective("feature_kl", teacher=teacher)
    with pytest.raises(RequestError, match="objective soft_ce: the targets of 'moco' are embeddings"):
        make_objective("feature_kl+soft_ce", teacher=TeacherInfo(name="moco", spec=TargetSpec("embedding", (10,))))


class TestDiscriminator:
    """MEAL V2's discriminator, compared with the layers and the logistic loss written out."""

    def test_it_is_the_cross_entropy_of_telling_them_apart(self) -> None:
        student, target = classes(5, 32)
        objective = Discriminator(32).double()
        weights = [p.detach().numpy() for p in objective.parameters()]

        def judged(row: Array) -> float:
            for k in (0, 2, 4):
                row = weights[k] @ row + weights[k + 1]
                row = np.maximum(row, 0) if k < 4 else row
            return 1 / (1 + np.exp(-row.item()))

        teachers = [-np.log(judged(row)) for row in target.numpy()]
        students = [-np.log(1 - judged(softmax(row))) for row in student.numpy()]
        assert objective(student, target).item() == pytest.approx(np.mean(teachers + students), rel=1e-12)
        assert objective.floor(target).item() == 0

    def test_the_student_raises_what_the_discriminator_lowers(self) -> None:
        student, target = classes(64, 10)
        student.requires_grad_()
        objective = Discriminator(10).double()
        loss = objective(student, target)
        gradient, *own = torch.autograd.grad(loss, [student, *objective.parameters()])
        with torch.no_grad():
            assert objective(student - 0.1 * gradient / gradient.norm(), target) > loss
            for p, g in zip(objective.parameters(), own, strict=True):
                p -= 1e-2 * g
            assert objective(student, target) < loss

    def test_making_it_leaves_the_students_initial_weights(self) -> None:
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        make_objective("soft_ce+discriminator", teacher=TeacherInfo(name="r50", spec=TargetSpec("distribution", (10,))))
        assert torch.equal(torch.rand(3), expected)

    def test_bfloat16_and_autocast_are_near(self) -> None:
        student, target = classes(64, 128)
        objective = Discriminator(128)
        expected = objective(student, target).item()
        assert objective(student.bfloat16(), target).item() == pytest.approx(expected, rel=1e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert objective(student.float(), target.float()).item() == pytest.approx(expected, rel=1e-2)

    def test_it_needs_the_number_of_classes(self) -> None:
        with pytest.raises(RequestError, match="objective discriminator: it needs the size of the targets"):
            make_objective("discriminator")


def grids(batch: int = 3, h: int = 2, w: int = 3, dim: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """L2-normalised tokens of student and target, float64 [B, h, w, D]."""
    both = torch.randn(2, batch, h, w, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    student, target = F.normalize(both, dim=-1)
    return student, target


class TestTokens:
    @pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 2, 3, 5), (4, 7, 7, 64)])
    def test_token_cosine_is_the_squared_distance_of_the_tokens(self, shape: tuple[int, int, int, int]) -> None:
        student, target = grids(*shape)
        rows = [part.numpy().reshape(-1, shape[3]) for part in (student, target)]
        assert TokenCosine()(student, target).item() == pytest.approx(squared_distance(*rows), rel=1e-12)

    @pytest.mark.parametrize("shape", [(1, 1, 2, 2), (3, 2, 3, 5), (2, 7, 7, 16)])
    def test_token_relations_compares_all_pairs_of_positions_of_a_crop(self, shape: tuple[int, int, int, int]) -> None:
        student, target = grids(*shape)
        squares = []
        for s, t in zip(student.numpy(), target.numpy(), strict=True):
            a, b = s.reshape(-1, shape[3]), t.reshape(-1, shape[3])
            squares += [(sum(a[i] * a[j]) - sum(b[i] * b[j])) ** 2 for i in range(len(a)) for j in range(len(a))]
        assert TokenRelations()(student, target).item() == pytest.approx(np.mean(squares), rel=1e-12)

    def test_token_relations_does_not_depend_on_a_rotation_or_on_the_students_dimension(self) -> None:
        student, target = grids()
        rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
        value = TokenRelations()(student, target).item()
        assert TokenRelations()(student @ rotation, target).item() == pytest.approx(value, rel=1e-9)
        assert TokenRelations()(F.pad(student, (0, 2)), target).item() == pytest.approx(value, rel=1e-12)
        assert TokenRelations()(target @ rotation, target).item() == pytest.approx(0, abs=1e-15)

    @pytest.mark.parametrize("name", OF_TOKENS)
    def test_the_value_is_a_mean_over_the_batch_with_zero_at_the_target(self, name: str) -> None:
        objective = make_objective(name, teacher=TeacherInfo(name="vit", spec=TargetSpec("tokens", (2, 3, 5))))
        student, target = grids()
        rows = [objective(student[k : k + 1], target[k : k + 1]).item() for k in range(3)]
        assert objective(student, target).item() == pytest.approx(sum(rows) / 3, rel=1e-12)
        assert objective.floor(target).item() == 0
        assert objective(target, target).item() == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("name", OF_TOKENS)
    def test_gradients_bfloat16_and_autocast(self, name: str) -> None:
        student, target = grids()
        objective = make_objective(name)
        assert torch.autograd.gradcheck(lambda s: objective(s, target), (student.requires_grad_(),))
        student, target = grids(8, 7, 7, 64)
        expected = objective(student, target).item()
        assert objective(student.bfloat16(), target.float()).item() == pytest.approx(expected, rel=1e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert objective(student.float(), target.float()).item() == pytest.approx(expected, rel=1e-2)


class TestSeveralKinds:
    GLOBAL = TeacherInfo(name="cls", spec=TargetSpec("embedding", (12,)))
    DENSE = TeacherInfo(name="vit", spec=TargetSpec("tokens", (2, 3, 5)))

    def test_each_teacher_gets_the_terms_for_its_kind(self) -> None:
        first, second = make_objectives("cosine + 2*token_cosine + 0.5*relational", [self.GLOBAL, self.DENSE])
        assert isinstance(first, Weighted)
        assert [type(part) for part in first.parts] == [Cosine, Relational]
        assert first.weights == [1, 0.5]
        assert isinstance(second, Weighted)
        assert ([type(part) for part in second.parts], second.weights) == ([TokenCosine], [2])
        again, _ = make_objectives("feature_kl+token_cosine", [self.GLOBAL, self.DENSE])
        assert type(again) is FeatureKL

    @pytest.mark.parametrize(
        ("expression", "kinds", "expected"),
        [
            (None, ["embedding"], "feature_kl"),
            (None, ["distribution"], "soft_ce"),
            (None, ["tokens"], "token_cosine"),
            (None, ["tokens", "embedding", "tokens"], "token_cosine+feature_kl"),
            ("relational", ["embedding", "tokens"], "relational+token_cosine"),
            ("2*token_relations + cosine", ["embedding", "tokens"], "2*token_relations + cosine"),
        ],
    )
    def test_missing_terms_are_the_defaults(self, expression: str | None, kinds: list[str], expected: str) -> None:
        assert complete(expression, kinds) == expected

    def test_the_terms_of_one_kind_are_an_expression(self) -> None:
        found = only("0.5*queue_kl(queue=8, temperature=0.1) + token_cosine + cosine", ["embedding"])
        assert found == "0.5*queue_kl(queue=8, temperature=0.1)+cosine"

    def test_a_term_for_no_teacher_is_refused(self) -> None:
        with pytest.raises(RequestError, match="objective token_cosine: the targets of 'cls' are embeddings: choose"):
            make_objectives("cosine+token_cosine", [self.GLOBAL])
        with pytest.raises(
            RequestError, match=r"objective cosine: the targets of 'vit' are .*: choose --objective token_cosine"
        ):
            make_objectives("cosine+token_cosine", [self.DENSE])
        with pytest.raises(RequestError, match="objective: no term is for embeddings, the targets of 'cls'"):
            make_objectives("token_cosine", [self.GLOBAL, self.DENSE])
