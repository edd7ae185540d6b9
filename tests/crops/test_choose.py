"""Where the crops are made is decided by a measurement."""

from pathlib import Path

import pytest
import torch

from fkd_ssl import images
from fkd_ssl.crops import RECIPES, choose
from fkd_ssl.crops.choose import Rates


def test_the_slowest_step_counts() -> None:
    rates = Rates(decode=4.0, replay=12.0, plan=0.5, device=0.1, network=2.0)
    assert [rates.on_cpu(workers) for workers in (1, 4, 16)] == [16.0, 4.0, 2.0]
    assert [rates.on_device(workers) for workers in (1, 4, 16)] == [4.0, 2.1, 2.1]


def test_every_step_is_measured(image_folder: Path) -> None:
    rates = choose.measure(
        images.scan(image_folder), RECIPES["mocov2"], crops=2, sides=[32, 40], device=torch.device("cpu"), network=lambda: 3.0
    )
    assert rates is not None
    assert min(rates.decode, rates.replay, rates.plan, rates.device) > 0
    assert rates.network == 3.0


def test_images_that_cannot_be_read_are_not_measured(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(b"nothing")
    assert choose.measure(images.scan(tmp_path), RECIPES["fkd"], crops=2, sides=[32], device=torch.device("cpu")) is None


def choice(image_folder: Path, device: str) -> tuple[bool, list[str]]:
    lines: list[str] = []
    chosen = choose.choose(
        images.scan(image_folder),
        RECIPES["mocov2"],
        crops=4,
        sides=[32],
        workers=2,
        device=torch.device(device),
        log=lines.append,
    )
    return chosen, lines


def test_a_cpu_is_not_measured(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "measure", lambda *_, **__: pytest.fail("measured"))
    assert choice(image_folder, "cpu") == (False, [])


@pytest.mark.parametrize(("network", "expected"), [(0.0, True), (10.0, False)])
def test_the_faster_one_is_chosen_and_said(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, network: float, expected: bool
) -> None:
    """Only the figures are given; a network that takes longer than both makes the GPU's own crops a loss."""
    rates = Rates(decode=0.001, replay=0.003, plan=0.0001, device=0.0001, network=network)
    monkeypatch.setattr(choose, "measure", lambda *_, **__: rates)
    monkeypatch.setattr(choose, "check_device", lambda device: None)
    monkeypatch.setattr(choose, "replay_digest", lambda device=None: "same")
    chosen, lines = choice(image_folder, "cuda")
    assert chosen == expected
    assert lines[-1].startswith(f"crops are made on the {'GPU' if expected else 'CPU'}: measured")
    if expected:
        assert "2,000 crops a second with the GPU, 500 without it" in lines[-1]


def test_a_gpu_that_makes_other_pixels_is_not_used(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "check_device", lambda device: None)
    monkeypatch.setattr(choose, "replay_digest", lambda device=None: str(device))
    chosen, lines = choice(image_folder, "cuda")
    assert (chosen, lines[-1]) == (False, "crops are made on the CPU: this GPU makes slightly different pixels")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_measured(image_folder: Path) -> None:
    chosen, lines = choice(image_folder, "cuda")
    assert f"crops are made on the {'GPU' if chosen else 'CPU'}: measured" in lines[-1]
