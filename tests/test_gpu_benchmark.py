"""benchmarks/gpu.py at a tiny size on the CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_section_runs_and_the_page_has_them(gpu: Any, image_folder: Path, tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--images", image_folder, "--tiny"], env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["section"] for line in lines] == ["machine", *gpu.SECTIONS]
    assert not [line for line in lines if "error" in line]
    named = {line["section"]: line for line in lines}
    assert named["bits"]["same_pixels"] is True
    run = named["precompute"]["runs"][0]
    assert 0 < run["teacher_busy"] <= 1
    assert run["crops_per_second"] > 0
    assert not list(image_folder.parent.glob(".fkd-ssl-gpu-*"))  # the links are removed
    page = gpu.page(lines)
    assert all(f"## {name}\n" in page for name in named)
    assert "| over_bare |" in page
    assert "knn_seconds" in page


def test_a_section_that_fails_leaves_the_others(
    gpu: Any, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Any) -> Any:
        raise RuntimeError("no such thing\nmore")

    monkeypatch.setattr(gpu, "SECTIONS", {"first": fails, "second": lambda bench: {"figure": 1234.5}})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--images", str(image_folder), "--sections", "first", "second", "--tiny"])
    with pytest.raises(SystemExit, match="True"):
        gpu.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["section"], line.get("error"), line.get("figure")) for line in lines] == [
        ("machine", None, None),
        ("first", "RuntimeError: no such thing", None),
        ("second", None, 1234.5),
    ]
