"""The official layouts at their own widths, against the forward written out: to 1e-5 in fp32, and loaded in little memory."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

SQUARE = ((32, 32), (65, 65), (96, 96))


@pytest.fixture(scope="module")
def parity() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "parity.py")))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "weights.pth.tar"
    (tmp_path / "weights.pth.tar").unlink()  # gigabytes


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("moco_r50", (*SQUARE, (48, 80), (224, 224)), marks=pytest.mark.slow),
        pytest.param("swav_r50", (*SQUARE, (48, 80), (224, 224)), marks=pytest.mark.slow),
        pytest.param("swav_r50w2", (*SQUARE, (48, 80)), marks=pytest.mark.slow),
        pytest.param("swav_r50w4", SQUARE, marks=pytest.mark.slow),
    ],
)
def test_embeddings_are_the_forward_written_out(
    name: str, sizes: tuple[tuple[int, int], ...], parity: SimpleNamespace, file: Path
) -> None:
    state = parity.write(name, file)
    worst = parity.differences(name, file, state, sizes)
    assert len(worst) == len(sizes) + (name != "moco_r50")
    assert max(worst.values()) < 1e-5, worst
    if name == "swav_r50w4":
        weights, beyond = parity.peak_beyond_weights("swav", file)
        assert weights > 1.5e9  # 375 million in the backbone, and the head's
        assert beyond < 3e9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moco_r50", "swav_r50"])
@pytest.mark.parametrize("changed", ["layer3.2.bn2.running_mean", "layer1.0.downsample.1.weight", "layer4.2.conv3.weight"])
def test_a_wrong_weight_is_seen(name: str, changed: str, parity: SimpleNamespace, file: Path) -> None:
    """A change of 5 % in one of 53 layers exceeds the tolerance."""
    state = dict(parity.write(name, file))
    key = next(key for key in state if key.endswith(changed) and "encoder_k" not in key)
    state[key] = state[key] + 0.05 * state[key].sign()
    assert max(parity.differences(name, file, state, ((32, 32),)).values()) > 2e-5
