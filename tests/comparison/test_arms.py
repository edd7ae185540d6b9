"""The arms that a comparison has."""

from typing import Any

import pytest

from fkd_ssl.comparison.arms import arms_of, pretraining, run_name, training
from fkd_ssl.comparison.config import CompareConfig
from fkd_ssl.errors import RequestError
from fkd_ssl.targets import TargetSpec, TeacherInfo


def config(**changes: Any) -> CompareConfig:
    options: dict[str, Any] = {"images": "i", "val": "v", "teacher": "mocov2", "checkpoint": "f", "out": "o", "epochs": 30}
    return CompareConfig(**options | changes)


def infos(*names: str, kind: str = "embedding") -> list[TeacherInfo]:
    return [TeacherInfo(name=name, spec=TargetSpec(kind, (8,))) for name in names]


def test_one_teacher() -> None:
    arms = arms_of(config(further_arms="alone stored:OPQ16,PQ16x8  stored:C=4 online:stored_crops"), ["mocov2"])
    names = ["stored", "online", "alone", "stored:OPQ16,PQ16x8", "stored:C=4", "online:stored_crops"]
    assert [arm.name for arm in arms] == names
    stores = ["store", "store", "store", "store-OPQ16-PQ16x8", "store-C=4", "store"]
    assert [arm.store for arm in arms] == stores
    assert run_name(arms[3].name, 2) == "stored-OPQ16-PQ16x8-seed2"


def test_what_an_arm_trains_on() -> None:
    asked = config(further_arms="stored:C=4 online:stored_crops", lr=0.5, batch_size=64)
    trainings = {arm.name: training(arm, asked, 3, infos("mocov2")) for arm in arms_of(asked, ["mocov2"])}
    found = {name: (t.targets, t.store, t.column, t.teacher, t.checkpoint) for name, t in trainings.items()}
    assert found == {
        "stored": ("stored", "o/store", "mocov2", None, None),
        "online": ("online", None, None, "mocov2", "f"),
        "stored:C=4": ("stored", "o/store-C=4", "mocov2", None, None),
        "online:stored_crops": ("online", "o/store", None, "mocov2", "f"),
    }
    assert {(t.lr, t.batch_size, t.epochs, t.seed) for t in trainings.values()} == {(0.5, 64, 30, 3)}
    assert trainings["online"].out == "o/runs/online-seed3"


def test_a_student_without_a_teacher_has_the_optimiser_of_its_kind() -> None:
    options = {"further_arms": "alone", "pixels": 32, "batch_size": 64, "lr": 0.5, "warmup_epochs": 3}
    adam = pretraining(config(**options), "alone-seed1", seed=1, epochs=10)
    assert (adam.optimizer, adam.lr, adam.warmup_epochs, adam.out) == ("sgd", 0.03, 0, "o/runs/alone-seed1")
    adamw = pretraining(config(**options, optimizer="adamw"), "alone-seed1", seed=1, epochs=10)
    assert (adamw.optimizer, adamw.lr, adamw.warmup_epochs) == ("adamw", 1.5e-4, 1.0)
    assert pretraining(config(**options, alone_lr=1e-3, optimizer="adamw"), "alone-seed1", seed=1, epochs=10).lr == 1e-3


def test_labels() -> None:
    asked = config(further_arms="labels", head="classifier", objective="soft_ce")
    arms = arms_of(asked, ["r18"])
    assert [arm.name for arm in arms] == ["stored", "online", "labels"]
    plain = training(arms[2], asked, 1, infos("r18", kind="distribution"))
    assert (plain.targets, plain.store, plain.teacher, plain.checkpoint) == ("labels", None, None, None)
    assert (plain.head, plain.objective) == ("classifier", "soft_ce")
    with pytest.raises(RequestError, match="further_arms 'labels': trains a classifier; add --head classifier"):
        arms_of(config(further_arms="labels"), ["r18"])


def test_relabel() -> None:
    asked = config(further_arms="relabel", head="classifier", objective="soft_ce")
    arms = arms_of(asked, ["r18"])
    assert [arm.name for arm in arms] == ["stored", "online", "relabel"]
    found = training(arms[2], asked, 1, infos("r18", kind="distribution"))
    assert (found.targets, found.store, found.label_maps, found.teacher) == ("relabel", None, "o/label-maps", None)
    with pytest.raises(RequestError, match="further_arms 'relabel': trains a classifier; add --head classifier"):
        arms_of(config(further_arms="relabel"), ["r18"])
    with pytest.raises(RequestError, match="further_arms 'relabel': label maps come from one teacher"):
        arms_of(config(further_arms="relabel", teacher="a,b", checkpoint="f,g", head="classifier"), ["a", "b"])


def test_two_teachers() -> None:
    two = {"teacher": "mocov2,swav", "checkpoint": "f,g", "teacher_weights": "2,1", "further_arms": "stored:C=4 alone"}
    arms = arms_of(config(**two), ["A", "B"])
    kinds = [f"{kind}:{names}" for kind in ("stored", "online") for names in ("A", "B", "A+B")]
    assert [arm.name for arm in arms] == [*kinds, "stored:C=4", "alone"]
    first, both, online = (training(arms[k], config(**two), 0, infos("A", "B")) for k in (0, 2, 4))
    assert (first.column, first.teacher_weights, both.column, both.teacher_weights) == ("A", None, "A,B", "2,1")
    assert (online.teacher, online.checkpoint) == ("swav", "g")
    with pytest.raises(RequestError, match="codecs are compared with one teacher"):
        arms_of(config(**two | {"further_arms": "stored:SQ4"}), ["A", "B"])


@pytest.mark.parametrize("objective", [None, "cosine+2*token_cosine"])
def test_each_arm_has_the_objective_of_its_targets(objective: str | None) -> None:
    teachers = [*infos("A"), TeacherInfo(name="A-tokens", spec=TargetSpec("tokens", (2, 2, 8)))]
    asked = config(teacher="a,a@tokens", checkpoint="f,f", grid=2, objective=objective)
    found = [training(arm, asked, 0, teachers) for arm in arms_of(asked, ["A", "A-tokens"])]
    first, second = ("feature_kl", "token_cosine") if objective is None else ("cosine", "2.0*token_cosine")
    assert [run.objective for run in found] == 2 * [first, second, f"{first}+{second}"]
    assert [run.grid for run in found] == [None, None, None, None, 2, 2]
