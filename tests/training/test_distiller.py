"""The step's parts: targets, schedule, optimiser."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from fkd_ssl.objectives import FeatureKL
from fkd_ssl.students import Student
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.distiller import Distiller, make_optimizer
from fkd_ssl.training.module import cosine, dropping, linear
from fkd_ssl.training.targets import OnlineTargets, stored_targets

OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "lars": "LARS"}


def make_config(**options: Any) -> TrainConfig:
    given = {"images": "i", "out": "o", "store": "s", "pixels": 224, "batch_size": 256, "lr": 3e-4, "warmup_epochs": 0.0}
    return TrainConfig(**{**given, **options})


class TestCosine:
    def test_without_warm_up_it_falls_from_one_to_zero(self) -> None:
        assert cosine(0, 100, 0) == 1
        assert cosine(50, 100, 0) == pytest.approx(0.5)
        assert cosine(25, 100, 0) == pytest.approx(0.5 + math.sqrt(0.5) / 2)
        assert cosine(100, 100, 0) == pytest.approx(0, abs=1e-12)
        assert cosine(101, 100, 0) == pytest.approx(0, abs=1e-12)

    def test_warm_up_is_linear_and_ends_at_one(self) -> None:
        assert [cosine(step, 100, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert cosine(52, 100, 4) == pytest.approx(0.5)

    def test_after_warm_up_it_never_rises_and_stays_positive(self) -> None:
        factors = [cosine(step, 40, 5) for step in range(5, 40)]
        assert all(a >= b > 0 for a, b in pairwise(factors))

    def test_a_warm_up_of_all_steps_does_not_divide_by_zero(self) -> None:
        assert cosine(10, 10, 10) == 1


class TestLinear:
    def test_at_the_start_of_every_epoch_it_is_s2bnns(self) -> None:
        epochs, steps_per_epoch = 10, 7
        for epoch in range(epochs):
            factor = linear(epoch * steps_per_epoch, epochs * steps_per_epoch, 0)
            assert factor == pytest.approx(1 - epoch / epochs)  # adjust_learning_rate of its main_moco.py

    def test_warm_up_comes_first_and_the_end_is_zero(self) -> None:
        assert [linear(step, 6, 2) for step in range(7)] == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])


class TestDropping:
    def test_a_tenth_after_each_drop(self) -> None:
        assert [dropping(step, [3, 5], 0) for step in (0, 2, 3, 4, 5, 90)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])

    def test_warm_up_comes_first(self) -> None:
        assert [dropping(step, [3], 2) for step in range(4)] == pytest.approx([0.5, 1, 1, 0.1])


class TestOptimizer:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_weights_decay_and_biases_and_norms_do_not(self, name: str) -> None:
        student = Student("shufflenet_v2_x0_5", 8)
        optimizer = make_optimizer(student, make_config(optimizer=name, weight_decay=0.1, lr=0.5, momentum=0.8))
        assert type(optimizer).__name__ == OPTIMIZERS[name]
        decayed, free = optimizer.param_groups
        assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
        assert decayed["lr"] == free["lr"] == 0.5
        named = {id(p): n for n, p in student.named_parameters()}
        assert len(decayed["params"]) + len(free["params"]) == len(named)
        norms = {n for n, m in student.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
        expected = {n for n in named.values() if n.endswith(".bias") or n.rpartition(".")[0] in norms}
        assert {named[id(p)] for p in free["params"]} == expected
        assert expected

    def test_with_decay_all_everything_decays_as_in_one_group(self) -> None:
        networks = []
        for _ in range(2):
            torch.manual_seed(0)
            networks.append(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)))
        config = make_config(optimizer="sgd", weight_decay=0.5, decay_all=True, lr=0.1, momentum=0.9)
        ours = make_optimizer(networks[0], config)
        theirs = torch.optim.SGD(networks[1].parameters(), 0.1, momentum=0.9, weight_decay=0.5)
        for network, optimizer in zip(networks, (ours, theirs), strict=True):
            for _ in range(3):
                optimizer.zero_grad()
                network(torch.eye(3)).pow(2).sum().backward()
                optimizer.step()
        for a, b in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert not torch.equal(networks[0][1].weight, torch.ones(4))

    @pytest.mark.parametrize("name", ["sgd", "lars"])
    def test_momentum_is_passed_on(self, name: str) -> None:
        optimizer = make_optimizer(torch.nn.Linear(2, 2), make_config(optimizer=name, momentum=0.8, weight_decay=1e-6))
        assert optimizer.param_groups[0]["momentum"] == 0.8

    def test_a_step_of_sgd_decays_the_weight_alone(self) -> None:
        layer = torch.nn.Linear(3, 2)
        before = [p.detach().clone() for p in (layer.weight, layer.bias)]
        optimizer = make_optimizer(layer, make_config(optimizer="sgd", lr=0.1, weight_decay=0.5, momentum=0))
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), 0.95 * before[0])
        assert torch.equal(layer.bias, before[1])


class TestTargets:
    def test_stored_targets_are_the_batchs(self) -> None:
        targets = torch.randn(4, 8)
        (found,) = stored_targets({"images": torch.zeros(4, 3, 8, 8), "targets": targets})
        assert found is targets

    def test_several_teachers_targets_come_in_the_order_of_their_names(self) -> None:
        a, b = torch.randn(4, 8), torch.randn(4, 6)
        first, second = stored_targets({"targets": {"b": b, "a": a}})
        assert first is b
        assert second is a

    def test_online_targets_come_from_the_students_crops(self) -> None:
        images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        online = OnlineTargets(lambda x: x.float().mean(dim=(2, 3)))
        (found,) = online({"images": images})
        assert torch.equal(found, images.float().mean(dim=(2, 3)))
        online({"images": images})

    def test_several_online_teachers_see_the_same_crops(self) -> None:
        images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        online = OnlineTargets(lambda x: x.float().mean(dim=(2, 3)), lambda x: x.float().amax(dim=(2, 3)))
        mean, most = online({"images": images})
        assert torch.equal(mean, images.float().mean(dim=(2, 3)))
        assert torch.equal(most, images.float().amax(dim=(2, 3)))

    def test_online_targets_come_from_the_teachers_crops_where_there_are_any(self) -> None:
        batch = {"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "teacher_images": torch.ones(2, 3, 16, 16)}
        (found,) = OnlineTargets(lambda x: x.mean(dim=(2, 3)))(batch)
        assert torch.equal(found, torch.ones(2, 3))

    def test_a_teacher_in_inference_mode_does_not_stop_the_gradient(self) -> None:
        @torch.inference_mode()
        def embed(images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(torch.ones(len(images), 8), dim=1)

        student = Student("squeezenet1_1", 8)
        module = Distiller(student, [FeatureKL()], OnlineTargets(embed), make_config(student="squeezenet1_1"), 1)
        loss = module.training_step({"images": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)}, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        assert student.head[0].weight.grad.abs().sum() > 0
        assert module.last_floor < module.last_loss == loss.detach()
        assert not module.last_loss.requires_grad


class TestSeveralTeachers:
    def make(self, **options: Any) -> tuple[Distiller, dict[str, Any]]:
        torch.manual_seed(0)
        student = Student("squeezenet1_1", 8, 6)
        config = make_config(student="squeezenet1_1", column="a,b", **options)
        targets = {name: torch.nn.functional.normalize(torch.randn(2, dim), dim=1) for name, dim in (("a", 8), ("b", 6))}
        batch = {"images": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), "targets": targets}
        return Distiller(student, [FeatureKL(), FeatureKL()], stored_targets, config, 1).eval(), batch

    @pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ("3, 1", (0.75, 0.25))])
    def test_the_loss_is_the_weighted_sum(self, weights: str | None, shares: tuple[float, float]) -> None:
        module, batch = self.make(teacher_weights=weights)
        features = module.student.features(batch["images"])
        heads = (module.student.head, module.student.more_heads[0])
        outputs = [torch.nn.functional.normalize(head(features), dim=1) for head in heads]
        losses = [FeatureKL()(s, t).item() for s, t in zip(outputs, batch["targets"].values(), strict=True)]
        floors = [FeatureKL().floor(t).item() for t in batch["targets"].values()]
        loss = module.training_step(batch, 0)
        assert loss.item() == pytest.approx(shares[0] * losses[0] + shares[1] * losses[1], rel=1e-5)
        assert module.last_floor.item() == pytest.approx(shares[0] * floors[0] + shares[1] * floors[1], rel=1e-5)

    def test_each_head_learns_from_its_own_teacher_alone(self) -> None:
        module, batch = self.make()
        both = module.training_step(batch, 0)
        batch["targets"]["b"] = -batch["targets"]["b"]
        other = module.training_step(batch, 0)
        heads = [module.student.head[2].weight, module.student.more_heads[0][2].weight]
        grads = [torch.autograd.grad(loss, heads) for loss in (both, other)]
        assert torch.equal(grads[0][0], grads[1][0])
        assert not torch.allclose(grads[0][1], grads[1][1])

    def test_a_checkpoint_names_all_dimensions(self) -> None:
        module, _ = self.make()
        saved: dict[str, Any] = {}
        module.on_save_checkpoint(saved)
        assert saved["fkd_ssl_student"] == {"name": "squeezenet1_1", "dim": [8, 6], "pixels": 224}
