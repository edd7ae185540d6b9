"""MoCo v2 against its algorithm written out."""

import copy
import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fkd_ssl.errors import RequestError
from fkd_ssl.pretraining.engine import pretrain
from fkd_ssl.pretraining.mocov2 import MoCo
from fkd_ssl.students import Student, load_student
from fkd_ssl.teachers import load_teacher
from fkd_ssl.training.metrics import METRICS
from fkd_ssl.training.monitor import last_checkpoint


def test_the_checkpoint_is_mocos_and_loads_as_a_teacher(trained: Any, make_config: Any) -> None:
    saved = torch.load(trained("mocov2"), weights_only=True)
    assert (saved["epoch"], saved["arch"]) == (3, "resnet18")
    state = saved["state_dict"]
    names = {key.split(".")[1] for key in state}
    assert names == {"encoder_q", "encoder_k", "queue", "queue_ptr"}
    assert state["module.queue"].shape == (32, 8)
    torch.testing.assert_close(state["module.queue"].norm(dim=0), torch.ones(8))
    teacher = load_teacher("mocov2", checkpoint=trained("mocov2"))
    assert (teacher.info.network, teacher.info.spec.size) == ("resnet18, MLP 512-512-32", 32)
    module = MoCo(make_config(), 16).eval()
    module.encoder_q.load_state_dict(
        {key.removeprefix("module.encoder_q."): value for key, value in state.items() if "encoder_q." in key}
    )
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = F.normalize(module.encoder_q((images - module.mean) / module.std), dim=1)
    torch.testing.assert_close(teacher.embed(images).clone(), expected, rtol=1e-4, atol=1e-5)


def test_the_step_is_mocos_algorithm(make_config: Any) -> None:
    """Against arXiv 1911.05722, algorithm 1, written out: key encoder first, InfoNCE, then the queue."""
    torch.manual_seed(0)
    module = MoCo(make_config(momentum=0.75, temperature=0.2, queue=16), 32)
    with torch.no_grad():
        for p in module.encoder_q.parameters():
            p.add_(0.01)  # so that the encoders differ
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8)
    bank = module.loss.memory_bank.bank.clone()
    q_net, k_net = copy.deepcopy(module.encoder_q), copy.deepcopy(module.encoder_k)
    with torch.no_grad():
        for k_weight, q_weight in zip(k_net.parameters(), q_net.parameters(), strict=True):
            k_weight.copy_(0.75 * k_weight + 0.25 * q_weight)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    views = (images / 255 - mean) / std
    q, k = (F.normalize(net(views[i::2]), dim=1) for i, net in enumerate((q_net, k_net)))
    losses: list[Tensor] = []
    for i in range(8):
        logits = torch.stack([q[i] @ k[i], *(q[i] @ key for key in bank)]) / 0.2
        losses.append(torch.logsumexp(logits, dim=0) - logits[0])
    torch.stack(losses).mean().backward()

    loss = module.training_step({"images": images}, 0)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean().detach(), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(module.encoder_q.parameters(), q_net.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(module.encoder_k.parameters(), k_net.parameters(), strict=True):
        assert mine.grad is None
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(module.loss.memory_bank.bank[:8], k.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(module.loss.memory_bank.bank[8:], bank[8:])


@pytest.mark.slow
def test_the_loss_falls_below_chance(folder: Path, make_config: Any) -> None:
    asked = {"epochs": 50, "batch_size": 16, "queue": 16, "pixels": 24, "temperature": 0.1, "momentum": 0.9, "log_every": 20}
    path = pretrain(dataclasses.replace(make_config("long", **asked), images=str(folder / "more")))
    losses = [float(line["loss"]) for line in csv.DictReader((path.parent / METRICS).open(newline=""))]
    assert losses[-1] < math.log(1 + 16) - 0.2  # equal embeddings give ln(1 + K)


def test_a_small_network_is_trained_without_a_teacher(folder: Path, make_config: Any) -> None:
    config = make_config("alone", arch="shufflenet_v2_x0_5", stem="small", epochs=1)
    path = pretrain(config)
    student, pixels = load_student(path)
    assert (student.spec, pixels) == ({"name": "shufflenet_v2_x0_5", "stem": "small"}, 16)
    torch.manual_seed(0)
    module = MoCo(config, 16)  # the initial weights
    torch.manual_seed(0)
    start = Student("shufflenet_v2_x0_5", 32, stem="small")
    for key, value in start.backbone.state_dict().items():
        torch.testing.assert_close(module.encoder_q.get_submodule("backbone").state_dict()[key], value, rtol=0, atol=0)
    trained = student.backbone.state_dict()
    assert not torch.equal(trained["conv1.0.weight"], start.backbone.state_dict()["conv1.0.weight"])
    last = torch.load(last_checkpoint(folder / "alone"), weights_only=True)["state_dict"]
    for key, value in trained.items():
        torch.testing.assert_close(value, last[f"encoder_q.backbone.{key}"], rtol=0, atol=0)
    assert pretrain(config) == path


def test_a_vit_is_trained_with_adamw_after_a_warm_up(folder: Path, make_config: Any) -> None:
    pytest.importorskip("timm")
    arch = "timm/test_vit"
    config = make_config("vit", arch=arch, optimizer="adamw", lr=1e-3, weight_decay=0.05, warmup_epochs=2, epochs=3, pixels=32)
    student, _ = load_student(pretrain(config))
    assert student.spec["name"] == arch
    rates = [float(line["lr"]) for line in csv.DictReader((folder / "vit" / METRICS).open(newline=""))]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 5e-4])  # four steps up, then a cosine of two
    saved = torch.load(last_checkpoint(folder / "vit"), weights_only=True)["optimizer_states"][0]
    assert "exp_avg_sq" in saved["state"][0]  # Adam's second moment
    assert saved["param_groups"][0]["weight_decay"] == 0.05


def test_only_mocov2_trains_students(make_config: Any) -> None:
    with pytest.raises(RequestError, match=r"arch 'shufflenet_v2_x0_5': swav trains only ResNets"):
        make_config(method="swav", arch="shufflenet_v2_x0_5")
    with pytest.raises(RequestError, match=r"no backbone|unknown|resnet19"):
        pretrain(make_config("nothing", arch="resnet19"))
    assert not Path(make_config("nothing").out).exists()
