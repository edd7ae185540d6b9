"""What the pretraining of every method shares: a run folder, resume, errors."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fkd_ssl import runs
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.pretraining.config import METHODS
from fkd_ssl.pretraining.engine import CHECKPOINT, pretrain
from fkd_ssl.pretraining.method import Method
from fkd_ssl.training.metrics import METRICS, MetricsWriter
from fkd_ssl.training.monitor import last_checkpoint

pytestmark = pytest.mark.parametrize("method", METHODS)


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_is_described(method: str, trained: Any, make_config: Any) -> None:
    path = trained(method)
    results = json.loads((path.parent / "results.json").read_text())
    assert {key: results[key] for key in ("epochs", "steps", "images", "queue")} == {
        "epochs": 3,
        "steps": 6,
        "images": 16,
        "queue": 8,
    }
    lines = read_metrics(path.parent / METRICS)
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4, 5, 6]
    assert float(lines[1]["epoch"]) == 1
    assert all(math.isfinite(float(line["loss"])) for line in lines)
    assert results["loss"] == float(lines[-1]["loss"])
    assert (path.parent / "config.yaml").read_text() == runs.to_yaml(make_config(f"run-{method}", method))


def test_metrics_have_the_learning_rate_of_their_step(method: str, trained: Any, make_config: Any) -> None:
    lines = read_metrics(trained(method).parent / METRICS)
    peak = make_config(f"run-{method}", method).lr
    expected = [peak * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert [float(line["lr"]) for line in lines] == pytest.approx(expected)
    assert float(lines[-1]["lr"]) > 0


def test_metrics_are_those_of_train(method: str, trained: Any) -> None:
    lines = read_metrics(trained(method).parent / METRICS)
    views = {"mocov2": 2, "swav": 4}[method]
    assert [int(line["crops"]) for line in lines] == [step * 8 * views for step in range(1, 7)]
    assert {line["kl"] + line["knn_top1"] for line in lines} == {""}  # neither a floor of the loss nor a score


def test_a_finished_run_is_left_alone(method: str, trained: Any, make_config: Any, capsys: Any) -> None:
    path = trained(method)
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    said: list[str] = []
    assert pretrain(make_config(f"run-{method}", method), log=said.append) == path
    assert "already finished" in said[0]
    assert path.stat().st_mtime_ns == before
    with pytest.raises(RequestError, match=r"another config \(lr is 0\.\d+ there, 0\.02 here\)"):
        pretrain(make_config(f"run-{method}", method, lr=0.02))
    assert capsys.readouterr().out == ""


def test_a_killed_run_continues_to_the_same_weights(
    method: str, trained: Any, make_config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole = MetricsWriter.on_train_batch_end

    def kill(self: MetricsWriter, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("killed")
        whole(self, trainer, *rest)

    out = f"killed-{method}"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "on_train_batch_end", kill)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain(make_config(out, method))
    assert (last_checkpoint(folder / out)).exists()
    assert not (folder / out / CHECKPOINT).exists()
    said: list[str] = []
    again = pretrain(make_config(out, method), log=said.append)
    assert said == [f"{folder / out}: continuing resnet18 on 16 images"]
    expected = torch.load(trained(method), weights_only=True)["state_dict"]
    found = torch.load(again, weights_only=True)["state_dict"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    losses = [[float(line["loss"]) for line in read_metrics(path.parent / METRICS)] for path in (trained(method), again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert capsys.readouterr().out == ""


def test_a_run_that_diverges_stops(method: str, make_config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Method, "normalised", lambda self, images: images * float("nan"))
    with pytest.raises(FkdError, match=r"step 1: the loss is nan: the training has diverged; .*choose a smaller --lr"):
        pretrain(make_config(f"nan-{method}", method))
    assert not (last_checkpoint(folder / f"nan-{method}")).exists()


def test_impossible_runs_are_refused_before_anything_is_written(method: str, make_config: Any, folder: Path) -> None:
    with pytest.raises(RequestError, match=r"batch_size 64: there are 16 images"):
        pretrain(make_config("large", method, batch_size=64))
    assert not (folder / "large").exists()
