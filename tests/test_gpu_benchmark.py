"""benchmarks/gpu.py at a tiny size on the CPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
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
    runs = [*named["precompute"]["runs"].values()]
    assert [run["device_crops"] for run in runs] == [False, True]
    for run in runs:
        assert 0 < run["teacher_busy"] <= 1
        assert run["crops_per_second"] > 0
    assert list(named["train"]["over_bare"]) == [f"squeezenet1_1, {key}" for key in gpu.RUNS]
    assert named["train"]["online_over_its_bound"]["squeezenet1_1"] > 0
    assert named["eval"]["features_per_second"] > 0
    assert not list(tmp_path.glob("*/images"))  # the links are removed
    page = gpu.page(lines)
    assert all(f"## {name}\n" in page for name in named)
    assert "| over_bare |" in page
    for row in (
        "precompute, resnet50 bf16, C = 64, crops on the GPU, over the bare forward",
        "crops a second on the GPU, M = 4, transfer included",
        "loader, crops on the GPU over CPU, M = 4",
        "loader, box and flip, over decoding only, M = 4",
        "loader, full recipe, 96 px, over decoding only, M = 4",
        "squeezenet1_1, stored, device crops, 4 workers, over bare",
        "squeezenet1_1, online over its bound",
        "seconds of kNN, 512 x 64 x 32",
    ):
        assert re.search(rf"\n\| {row} \| [0-9.,]+ \| [a-z0-9., ]+ \|\n", page), row


@pytest.mark.slow
def test_without_crops_on_the_gpu_everything_else_is_measured(gpu: Any, image_folder: Path) -> None:
    """As on a machine without a C compiler."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    command = [sys.executable, SCRIPT, "--images", image_folder, "--tiny", "--sections", "replay", "loader", "train"]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    named = {line["section"]: line for line in map(json.loads, done.stdout.splitlines())}
    missing = {section: list(named[section]["errors"]) for section in ("replay", "loader", "train")}
    assert missing == {
        "replay": ["M=4"],
        "loader": ["crops on the GPU, M = 4"],
        "train": ["squeezenet1_1, stored, device crops, 4 workers"],
    }
    assert named["replay"]["errors"]["M=4"] == "RequestError: --device_crops needs a CUDA GPU, found cpu: run without it"
    assert list(named["train"]["over_bare"]) == ["squeezenet1_1, stored", "squeezenet1_1, online"]
    assert list(named["train"]["online_over_its_bound"]) == ["squeezenet1_1"]
    assert len(named["loader"]["crops_per_second"]) == 5


Run = Callable[..., tuple[object, list[dict[str, Any]]]]


@pytest.fixture
def run(gpu: Any, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """run(name=function, ...) runs these sections, and returns the exit status and the lines without the machine."""

    def call(seconds: float = 60, tiny: bool = True, **sections: Any) -> tuple[object, list[dict[str, Any]]]:
        monkeypatch.setattr(gpu, "SECTIONS", {name: (section, seconds) for name, section in sections.items()})
        options = ["--images", str(image_folder), "--sections", *sections, *(["--tiny"] if tiny else [])]
        monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
        with pytest.raises(SystemExit) as stop:
            gpu.main()
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        return stop.value.code, [line for line in lines if line["section"] != "machine"]

    return call


def test_what_fails_leaves_the_other_measurements_and_sections(run: Run) -> None:
    def fails(bench: Any, found: dict[str, Any]) -> None:
        def failing() -> None:
            raise RuntimeError("no such thing\nmore")

        bench.measure(found, "one", failing)
        bench.measure(found, "two", lambda: 3.14159)
        raise MemoryError

    status, lines = run(first=fails, second=lambda bench, found: found.update(figure=1234.5))
    assert status is True
    assert lines[0]["errors"] == {"one": "RuntimeError: no such thing", "first": "MemoryError: "}
    assert (lines[0]["two"], lines[1]["figure"]) == (3.1, 1234.5)
    assert "errors" not in lines[1]


def test_what_would_begin_too_late_is_left_out(run: Run) -> None:
    def two(bench: Any, found: dict[str, Any]) -> None:
        bench.measure(found, "one", lambda: time.sleep(0.6))
        bench.measure(found, "two", lambda: 1)

    status, lines = run(seconds=0.5, tiny=False, first=two, second=lambda bench, found: found.update(figure=1))
    assert status is True
    late = "TimeoutError: left out: the time of this section is over"
    assert [line.get("errors") for line in lines] == [{"two": late}, None]


@pytest.mark.slow
def test_a_new_process_measures_the_rest_if_the_gpu_is_unusable(gpu: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An invalid address in a kernel makes every later call of the driver fail in this process."""

    def fails(bench: Any, found: dict[str, Any]) -> None:
        monkeypatch.setattr(gpu, "_broken", lambda bench: True)
        raise RuntimeError("an illegal memory access was encountered")

    status, lines = run(bits=fails, forward=lambda bench, found: pytest.fail("measured here"))
    assert status is True
    assert [line["section"] for line in lines] == ["bits", "forward"]
    assert lines[0]["errors"] == {"bits": "RuntimeError: an illegal memory access was encountered"}
    assert len(lines[1]["crops_per_second"]) == 4


def test_goals_are_those_of_the_sections_that_were_measured(gpu: Any) -> None:
    run = {"teacher": "resnet50 bf16", "device_crops": True, "crops_per_second": 11_000, "over_bare": 0.9}
    lines = [
        {"section": "machine", "cores": 16},
        {"section": "precompute", "runs": {"A": {**run, "C": 64}, "B": {**run, "C": 4}}},
        {
            "section": "loader",
            "workers": 14,
            "crops_per_second": {"full recipe, M = 4": 7000.0, "decoding only, M = 4": 14_000.0},
            "errors": {"crops on the GPU, M = 4": "no Triton"},
        },
        {"section": "train", "crops_per_second": {}, "over_bare": {"resnet50, stored": 0.98, "resnet50, online": 0.3}},
    ]
    assert list(gpu.goals(lines)) == [
        ("precompute, A, over the bare forward", "0.9", "0.95"),
        ("precompute, B, over decoding by all cores", "0.688", "0.7"),
        ("loader, full recipe, over decoding only, M = 4", "0.500", "0.6"),
        ("resnet50, stored, over bare", "0.98", "0.99"),
    ]
    assert list(gpu.goals(lines[:1])) == []


def test_the_page_takes_the_lines_of_a_run_that_printed_more(gpu: Any, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    machine = json.dumps({"section": "machine", "device": "card"})
    (tmp_path / "lines").write_text(f"{machine}\nGPU available: True\n{machine}\n")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--page", str(tmp_path / "lines")])
    gpu.main()
    assert capsys.readouterr().out.count("| device | card |") == 1
