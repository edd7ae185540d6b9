"""Training on tokens, alone and with embeddings: 24 small images, crops of 64 px, a grid of 3 x 3."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fkd_ssl.data import StoredCrops
from fkd_ssl.errors import RequestError
from fkd_ssl.store import Store
from fkd_ssl.students import Student, dims_of, load_student
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.distiller import Distiller, make_optimizer
from fkd_ssl.training.engine import objectives_of
from fkd_ssl.training.targets import stored_targets

D = 8
BOTH = ("tiny", "tokens")


class TokensTeacher:
    """A random convolution whose map is pooled to 3 x 3."""

    def __init__(self) -> None:
        self.info = TeacherInfo(name="tokens", spec=TargetSpec("tokens", (3, 3, D)), network="convolution", pixels=64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = nn.Sequential(nn.Conv2d(3, D, 5, stride=2), nn.AdaptiveAvgPool2d(3)).eval()

    @torch.no_grad()
    def embed(self, crops: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.module(crops / 255 - 0.45).permute(0, 2, 3, 1), dim=-1)


@pytest.fixture
def dense_run(make_run: Any, make_store: Any, image_folder: Path, tmp_path: Path, new_teacher: Any) -> Callable[..., Any]:
    """dense_run(name, columns, online=False, **options) -> a finished run."""
    teachers = {"tiny": new_teacher(), "tokens": TokensTeacher()}
    for teacher in teachers.values():
        store: Store = make_store(tmp_path / "both", codec="Flat", teacher=teacher, pixels=64)

    def train(name: str, columns: tuple[str, ...] = BOTH, *, online: bool = False, **options: Any) -> Any:
        wrap = options.pop("wrap", lambda embed: embed)
        sides = {"crops_per_image": 2, "pixels": 64}
        data = StoredCrops(store, image_folder, column=list(columns), with_targets=not online, **sides)
        where: dict[str, Any] = {"column": ",".join(columns)}
        if online:
            where = {"targets": "online", "teacher": ",".join(columns)}
        where["store"] = None if online else str(store.folder)
        run = make_run(name, data, **{"pixels": 64, "epochs": 2, "lr": 3e-3, **where, **options})
        embeds = [wrap(teachers[column].embed) for column in columns] if online else None
        return run.train(targets=[teachers[column].info for column in columns], embeds=embeds)

    return train


def test_stored_equals_online_at_every_step(dense_run: Any) -> None:
    stored, online = dense_run("stored"), dense_run("online", online=True)
    assert stored.column("loss") == pytest.approx(online.column("loss"), rel=1e-5)
    assert stored.column("kl") == pytest.approx(online.column("kl"), rel=1e-3)


def test_it_learns(dense_run: Any) -> None:
    losses = dense_run("run", ("tokens",), epochs=12).column("loss")
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


def test_the_loss_is_the_weighted_sum_of_both() -> None:
    infos = [TestOptions.GLOBAL, TestOptions.DENSE]
    config = TestOptions.config(
        objective="0.5*cosine+token_cosine+2*token_relations", teacher_weights="1,3", column="a,b", batch_size=4, pixels=64
    )
    student = Student("squeezenet1_1", *dims_of(infos)).eval()
    module = Distiller(student, objectives_of(config, infos), stored_targets, config, 1).eval()
    vectors, tokens = (F.normalize(torch.randn(4, *info.spec.shape), dim=-1) for info in infos)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    loss = module.training_step({"images": images, "targets": {"a": vectors, "b": tokens}}, 0)
    with torch.no_grad():
        of_vectors, of_tokens = student.embeddings(images)
        distance = (of_tokens - tokens).square().sum(dim=-1).mean()
        cosines = [part.flatten(1, 2) @ part.flatten(1, 2).mT for part in (of_tokens, tokens)]
        dense = distance + 2 * (cosines[0] - cosines[1]).square().mean()
        expected = 0.25 * 0.5 * (of_vectors - vectors).square().sum(dim=1).mean() + 0.75 * dense
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.last_floor is not None
    assert module.last_floor.item() == 0


@pytest.mark.parametrize("columns", [("tokens",), ("tokens", "tiny"), BOTH])
def test_a_checkpoint_gives_the_student_back(dense_run: Any, columns: tuple[str, ...]) -> None:
    run = dense_run("run", columns, ema=0.9)
    dims = {"tiny": 16, "tokens": [3, 3, D]}
    assert run.checkpoint()["fkd_ssl_student"]["dim"] == [dims[column] for column in columns]
    student, pixels = load_student(run.folder / "checkpoints" / "last.ckpt")
    assert pixels == 64
    assert student.dims == [tuple(d) if isinstance(d := dims[column], list) else d for column in columns]
    saved = {key.removeprefix("average."): value for key, value in run.weights.items() if key.startswith("average.")}
    assert all(torch.equal(value, saved[key]) for key, value in student.state_dict().items())
    with torch.no_grad():
        outputs = student.embeddings(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert [output.shape[1:] for output in outputs] == [(3, 3, D) if column == "tokens" else (16,) for column in columns]


def test_a_killed_training_continues_to_the_same_bits(dense_run: Any) -> None:
    calls = [0]

    def dying(embed: Any) -> Any:
        def run(images: torch.Tensor) -> Any:
            calls[0] += 1
            if calls[0] == 4:  # in the second step
                raise InterruptedError
            return embed(images)

        return run

    student = {"student": "shufflenet_v2_x0_5", "ema": 0.9, "precision": "bf16-mixed", "epochs": 3}
    whole = dense_run("whole", online=True, **student)
    with pytest.raises(InterruptedError):
        dense_run("run", online=True, wrap=dying, **student)
    run = dense_run("run", online=True, **student)
    assert run.column("loss") == whole.column("loss")
    assert all(torch.equal(value, whole.weights[key]) for key, value in run.weights.items())


@pytest.mark.slow
def test_a_compiled_backbone_gives_the_same_training(dense_run: Any) -> None:
    plain, compiled = dense_run("plain", epochs=1), dense_run("compiled", epochs=1, compile=True)
    assert compiled.column("loss") == pytest.approx(plain.column("loss"), rel=1e-4)
    assert compiled.weights.keys() == plain.weights.keys()


def test_targets_of_another_grid_are_refused(dense_run: Any) -> None:
    run = dense_run("run", ("tokens",), epochs=1)
    other = TeacherInfo(name="tokens", spec=TargetSpec("tokens", (2, 2, D)))
    with pytest.raises(RequestError, match=r"targets of D = \[\[3, 3, 8\]\], and now they have D = \[\[2, 2, 8\]\]"):
        run.train(targets=[other])


class TestOptions:
    GLOBAL = TeacherInfo(name="cls", spec=TargetSpec("embedding", (12,)))
    PROBABILITIES = TeacherInfo(name="probs", spec=TargetSpec("distribution", (12,)))
    DENSE = TeacherInfo(name="vit", spec=TargetSpec("tokens", (2, 3, 5)))

    @staticmethod
    def config(**options: Any) -> TrainConfig:
        return TrainConfig(**{"images": "i", "out": "o", "store": "s", "lr": 1e-3, "objective": "token_cosine", **options})

    @pytest.mark.parametrize("option", ["mixup", "cutmix", "calibrate_below"])
    def test_tokens_are_not_mixed(self, option: str) -> None:
        with pytest.raises(RequestError, match=rf"{option} 0.8: the targets of 'vit' are tokens; it is for class prob"):
            objectives_of(self.config(**{option: 0.8}), [self.DENSE])
        config = self.config(**{option: 0.8}, head="classifier", objective="soft_ce+token_cosine")
        with pytest.raises(RequestError, match=rf"{option} 0.8: the targets of 'vit' are tokens; it is for class prob"):
            objectives_of(config, [self.PROBABILITIES, self.DENSE])

    def test_a_classifier_may_have_tokens_beside_its_classes(self) -> None:
        config = self.config(head="classifier", objective="soft_ce+token_cosine")
        assert len(objectives_of(config, [self.PROBABILITIES, self.DENSE])) == 2
        with pytest.raises(RequestError, match="head classifier: the targets of 'vit' are tokens: choose --head mocov2 or sim"):
            objectives_of(config, [self.DENSE, self.PROBABILITIES])
        with pytest.raises(RequestError, match="head classifier: the targets of 'cls' are embeddings: choose --head mocov2 or"):
            objectives_of(config, [self.PROBABILITIES, self.GLOBAL])

    def test_the_position_embedding_and_the_class_token_get_no_weight_decay(self) -> None:
        pytest.importorskip("timm")
        for name in ("timm/vit_tiny_patch16_224", "vit_b_32"):
            student = Student(name, (2, 2, 4))
            optimizer = make_optimizer(student, self.config(weight_decay=0.05))
            names = {id(p): key for key, p in student.named_parameters()}
            free = {names[id(p)] for p in optimizer.param_groups[1]["params"]}
            tokens = {key for key in names.values() if key.rpartition(".")[2] in ("cls_token", "class_token")}
            places = {key for key in names.values() if key.rpartition(".")[2] in ("pos_embed", "pos_embedding")}
            assert len(tokens) == len(places) == 1
            assert tokens | places < free
            assert all(
                key.rpartition(".")[2].endswith("bias") or "norm" in key or "ln" in key for key in free - tokens - places
            )
            decayed = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
            assert decayed | free == set(names.values())

    def test_layer_decay_lowers_the_rate_of_earlier_layers(self) -> None:
        pytest.importorskip("timm")
        config = self.config(student="timm/vit_tiny_patch16_224", layer_decay=0.5, lr=1.0, weight_decay=0.1, optimizer="adamw")
        student = Student(config.student, 4)
        groups = make_optimizer(student, config, backbone=student.backbone).param_groups
        rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        found = {key: rates[id(p)] for key, p in student.named_parameters()}
        assert found["head.0.weight"] == (1.0, 0.1)
        for layer in range(11):
            key = f"backbone.blocks.{layer}.attn.qkv.weight"
            later = f"backbone.blocks.{layer + 1}.attn.qkv.weight"
            assert found[key] == (pytest.approx(found[later][0] / 2), 0.1)
        assert found["backbone.patch_embed.proj.weight"] == (pytest.approx(found["backbone.blocks.0.norm1.bias"][0] / 2), 0.1)
        assert found["backbone.pos_embed"][1] == 0
        with pytest.raises(RequestError, match=r"layer_decay 0.5: only for students of timm, not 'resnet18'"):
            self.config(layer_decay=0.5)
        with pytest.raises(RequestError, match=r"layer_decay 1.5: must be between 0 and 1"):
            self.config(layer_decay=1.5, student="timm/x")

    def test_drop_path_skips_blocks_in_train_mode_alone(self) -> None:
        pytest.importorskip("timm")
        name, images = "timm/vit_tiny_patch16_224", torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        student = Student(name, 4, drop_path=0.9)
        with torch.no_grad():
            one, two = (student.features(images) for _ in range(2))
            assert not torch.allclose(one, two)
            student.eval()
            assert torch.equal(student.features(images), student.features(images))
        assert student.state_dict().keys() == Student(name, 4).state_dict().keys()
        assert student.spec == {"name": name}
        with pytest.raises(RequestError, match=r"drop_path 0.1: only for students of timm, not 'resnet18'"):
            Student("resnet18", 4, drop_path=0.1)
        with pytest.raises(RequestError, match=r"drop_path 1.0: must be at least 0 and below 1"):
            self.config(drop_path=1.0)
