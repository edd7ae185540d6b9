import copy
import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fkd_ssl import runs
from fkd_ssl.errors import RequestError
from fkd_ssl.pretrain import CHECKPOINT, LAST, METRICS, MoCo, Progress, pretrain, queue_length
from fkd_ssl.pretrain_config import PretrainConfig
from fkd_ssl.teachers import load_teacher

pytestmark = pytest.mark.filterwarnings("ignore:queue 65536")


def config(folder: Path, out: str = "run", **changes: Any) -> PretrainConfig:
    options = {"epochs": 3, "batch_size": 8, "pixels": 16, "dim": 32, "workers": 0, "log_every": 1, "lr": 0.01}
    return PretrainConfig(images=str(folder / "images"), out=str(folder / out), **{**options, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images of smooth random colours; 64 under `more`."""
    folder = tmp_path_factory.mktemp("pretrain")
    generator = np.random.default_rng(0)
    for name, count in (("images", 16), ("more", 64)):
        (folder / name).mkdir()
        for i in range(count):
            small = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            small.resize((24, 24), Image.Resampling.BICUBIC).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    return pretrain(config(folder))


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_checkpoint_is_mocos_and_loads_as_a_teacher(trained: Path, folder: Path) -> None:
    saved = torch.load(trained, weights_only=True)
    assert (saved["epoch"], saved["arch"]) == (3, "resnet18")
    state = saved["state_dict"]
    names = {key.split(".")[1] for key in state}
    assert names == {"encoder_q", "encoder_k", "queue", "queue_ptr"}
    assert state["module.queue"].shape == (32, 8)
    torch.testing.assert_close(state["module.queue"].norm(dim=0), torch.ones(8))
    teacher = load_teacher("mocov2", checkpoint=trained)
    assert (teacher.network, teacher.dim) == ("resnet18, MLP 512-512-32", 32)
    module = MoCo(config(folder), 8, 6).eval()
    module.encoder_q.load_state_dict(
        {key.removeprefix("module.encoder_q."): value for key, value in state.items() if "encoder_q." in key}
    )
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = F.normalize(module.encoder_q((images - module.mean) / module.std), dim=1)
    torch.testing.assert_close(teacher.embed(images).clone(), expected, rtol=1e-4, atol=1e-5)


def test_a_run_is_described(trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((trained.parent / "results.json").read_text())
    assert {key: results[key] for key in ("epochs", "steps", "images", "queue")} == {
        "epochs": 3,
        "steps": 6,
        "images": 16,
        "queue": 8,
    }
    lines = read_metrics(trained.parent / METRICS)
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4, 5, 6]
    assert float(lines[1]["epoch"]) == 1
    assert all(math.isfinite(float(line["loss"])) for line in lines)
    assert results["loss"] == float(lines[-1]["loss"])


def test_a_finished_run_is_left_alone(trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = trained.stat().st_mtime_ns
    said: list[str] = []
    assert pretrain(config(folder), log=said.append) == trained
    assert "finished already" in said[0]
    assert trained.stat().st_mtime_ns == before
    with pytest.raises(RequestError, match=r"another config \(lr is 0\.01 there, 0\.02 here\)"):
        pretrain(config(folder, lr=0.02))
    assert capsys.readouterr().out == ""


def test_a_killed_run_continues_to_the_same_weights(
    trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Progress.on_train_batch_end

    def kill(self: Progress, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("killed")
        whole(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_train_batch_end", kill)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain(config(folder, "killed"))
    assert (folder / "killed" / LAST).exists()
    assert not (folder / "killed" / CHECKPOINT).exists()
    said: list[str] = []
    again = pretrain(config(folder, "killed"), log=said.append)
    assert "continues from step 4 of 6" in said[0]
    expected = torch.load(trained, weights_only=True)["state_dict"]
    found = torch.load(again, weights_only=True)["state_dict"]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    losses = [[float(line["loss"]) for line in read_metrics(path.parent / METRICS)] for path in (trained, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert capsys.readouterr().out == ""


def test_the_step_is_mocos_algorithm(folder: Path) -> None:
    """Against arXiv 1911.05722, algorithm 1, written out: key encoder first, InfoNCE, then the queue."""
    torch.manual_seed(0)
    module = MoCo(config(folder, momentum=0.75, temperature=0.2), 16, 6)
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
def test_the_loss_falls_below_chance(folder: Path) -> None:
    asked = {"epochs": 50, "batch_size": 16, "queue": 16, "pixels": 24, "temperature": 0.1, "momentum": 0.9, "log_every": 20}
    path = pretrain(dataclasses.replace(config(folder, "long", **asked), images=str(folder / "more")))
    losses = [float(line["loss"]) for line in read_metrics(path.parent / METRICS)]
    assert losses[-1] < math.log(1 + 16) - 0.2  # embeddings that are all alike give ln(1 + K)


def test_the_queue_is_a_multiple_of_the_batch_and_at_most_half_of_the_images(folder: Path) -> None:
    asked = config(folder, batch_size=8, queue=64)
    assert queue_length(asked, 128) == 64
    with pytest.warns(UserWarning, match=r"queue 64: 48 are kept, a multiple of batch_size 8 and at most half of the 100"):
        assert queue_length(asked, 100) == 48
    with pytest.warns(UserWarning, match=r"queue 60: 56 are kept"):
        assert queue_length(config(folder, queue=60), 1000) == 56
    with pytest.warns(UserWarning, match=r"8 are kept"):
        assert queue_length(asked, 9) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"epochs 0: must be positive"),
        ({"workers": -1}, r"workers -1: must not be negative"),
        ({"batch_size": 1}, r"BatchNorm needs at least 2"),
        ({"momentum": 1.0}, r"momentum 1\.0: must lie in 0 to 1"),
    ],
)
def test_impossible_configs_are_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(RequestError, match=message):
        config(folder, **changes)


def test_impossible_runs_are_refused_before_anything_is_written(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"batch_size 64: there are 16 images"):
        pretrain(config(folder, "large", batch_size=64))
    assert not (folder / "large").exists()


def test_the_config_file_is_the_config(trained: Path, folder: Path) -> None:
    assert (trained.parent / "config.yaml").read_text() == runs.to_yaml(config(folder))
    assert {field.name for field in dataclasses.fields(PretrainConfig)} >= {"images", "out", "method", "arch", "epochs"}
