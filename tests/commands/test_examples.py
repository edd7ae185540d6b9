"""Every example runs for a few steps on generated images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))

pytestmark = pytest.mark.slow


def run(script: Path, options: str) -> str:
    env = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, str(script), *options.split()], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", [path for path in EXAMPLES if path.name == "distill.py"], ids=lambda path: path.parent.name)
def test_it_runs(script: Path, work: Path) -> None:
    options = "--images train --store store --pixels 32 --batch_size 6 --epochs 2 --workers 0"
    if "distributed" in script.parent.name:
        options += " --devices 2 --batch_size 3"
    lines = [line for line in run(script, options).splitlines() if "loss: " in line]
    assert lines
    assert 0 < float(lines[-1].rpartition("loss: ")[2]) < 10


def test_probes_while_lightly_trains(work: Path) -> None:
    said = run(
        ROOT / "examples/pytorch_lightning/online_probes.py", "train val --pixels 32 --epochs 2 --batch_size 6 --workers 0"
    )
    assert "knn" in said.lower()


def test_the_list_of_examples_is_whole() -> None:
    text = (ROOT / "examples/README.md").read_text()
    assert all(f"({path.relative_to(ROOT / 'examples')})" in text for path in EXAMPLES)
