"""benchmarks/gpu.py at a tiny size on the CPU."""

import importlib.util
import json
import os
import re
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
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--images", image_folder, "--tiny"], env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["section"] for line in lines] == ["machine", *gpu.SECTIONS]
    assert not [line for line in lines if "error" in line]
    named = {line["section"]: line for line in lines}
    assert named["bits"]["same_pixels"] is True
    assert [run["device_crops"] for run in named["precompute"]["runs"]] == [False, True]
    for run in named["precompute"]["runs"]:
        assert 0 < run["teacher_busy"] <= 1
        assert run["crops_per_second"] > 0
    assert list(named["train"]["squeezenet1_1"]["over_bare"]) == ["stored", "online", "stored, device crops, 4 workers"]
    assert named["eval"]["features_per_second"] > 0
    assert not list(tmp_path.glob("*/images"))  # the links are removed
    page = gpu.page(lines)
    assert all(f"## {name}\n" in page for name in named)
    assert "| over_bare |" in page
    assert re.search(r"\| loader, crops on the GPU over CPU, M = 4 \| [0-9.]+ \| 1.4 \|", page)
    assert "knn_seconds" in page


def test_a_section_that_fails_leaves_the_others(
    gpu: Any, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Any, found: dict[str, Any]) -> None:
        found["measured"] = 3
        raise RuntimeError("no such thing\nmore")

    monkeypatch.setattr(gpu, "SECTIONS", {"first": fails, "second": lambda bench, found: found.update(figure=1234.5)})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--images", str(image_folder), "--sections", "first", "second", "--tiny"])
    with pytest.raises(SystemExit, match="True"):
        gpu.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [(line["section"], line.get("measured"), line.get("error"), line.get("figure")) for line in lines]
    assert found == [
        ("machine", None, None, None),
        ("first", 3, "RuntimeError: no such thing", None),
        ("second", None, None, 1234.5),
    ]


def test_goals_are_those_of_the_sections_that_were_measured(gpu: Any) -> None:
    run = {"teacher": "resnet50 bf16", "device_crops": True, "crops_per_second": 11_000, "over_bare": 0.9}
    lines = [
        {"section": "machine", "cores": 16},
        {"section": "precompute", "runs": [{**run, "C": 64}, {**run, "C": 4}]},
        {
            "section": "loader",
            "workers": 14,
            "crops_per_second": {"cpu M=4": 10.0, "decode M=4": 14_000.0},
            "error": "no Triton",
        },
        {"section": "train", "resnet50": {"crops_per_second": {}, "over_bare": {"stored": 0.98}}},
    ]
    assert list(gpu.goals(lines)) == [
        ("precompute, resnet50 bf16, C = 64, crops on the GPU, over the bare forward", "0.9", "0.95"),
        ("precompute, resnet50 bf16, C = 4, crops on the GPU, over decoding by all cores", "0.688", "0.7"),
        ("resnet50, stored, over bare", "0.98", "0.99"),
    ]
    assert list(gpu.goals(lines[:1])) == []
