"""Every code block of README and docs is run at small size, or at least parsed.

All pages are tested in the same way. A ```bash block is run by bash, with stand-ins for the programs that record their
arguments; a ```python block is executed. Then

- every call is parsed: `fkd-ssl` by its own parser, `torchrun` by torch's, scripts of benchmarks/ and examples/ by theirs;
- the blocks of a page run in order in one folder of tiny images, with the options that SMALL adds.

A page declares what it needs in addition to images and checkpoints, `<!-- given: store runs/resnet18 -->`. A block that
cannot run here has its reason in the line above it, `<!-- parsed only: needs a cluster -->`.
"""

import argparse
import functools
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torchvision import models

from fkd_ssl import cli
from fkd_ssl.errors import RequestError
from fkd_ssl.eval import sweep
from fkd_ssl.options import flat
from fkd_ssl.teachers import PRESETS
from fkd_ssl.training import TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
COLOURS = {"ash": (60, 90, 190), "birch": (70, 170, 80), "cedar": (190, 80, 60)}
IMAGES = {"imagenet/train": 8, "imagenet/val": 4, "imagenette/train": 8, "imagenette/val": 4, "photos": 8, "pictures": 8}
FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- parsed only: (?P<why>[^>]+) -->\n *)?"
    r"(?P<fence>```+)(?P<language>[^`\n]*)\n(?P<text>.*?)^(?P=indent)(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
SMALL = {
    "precompute": "--crops 4 --pixels 32 --chunk_size 16",
    "train": "--epochs 2 --pixels 32 --batch_size 8 --crops_per_image 2 --workers 0",
    "pretrain": "--epochs 1 --pixels 32 --batch_size 8 --workers 0",
    "subset": "--crops 2",
    "show": "--crops 4",
    "knn": "--pixels 32 --workers 0",
    "linear": "--pixels 32 --workers 0",
    "features": "--pixels 32 --workers 0",
    "retrieve": "--pixels 32 --workers 0",
}
"""Added to a verb's call where it runs; of an option given twice the last one counts."""
SCRIPTS = {
    "benchmarks/store_sizes.py": "",
    "benchmarks/imagenet.py": "",
    "benchmarks/figures.py": "",
    "benchmarks/store_scale.py": "--images 3000 --crops 4 --workers 1 --reads 50",
    "benchmarks/remote_store.py": "--shards 1 --crops 4 --workers 0 --rounds 1 --latency 0",
    "benchmarks/geometry.py": "--limit 3 --pixels 32",
    "benchmarks/colours.py": "--limit 3 --pixels 32",
    "benchmarks/device_crops.py": "--limit 2 --pixels 32 --crops_per_image 2 --rounds 1",
}
"""Likewise for the scripts that are quick enough to run here; the others are parsed."""
PARSED_ONLY = {
    "teachers fetch": "downloads",
    "compare": "minutes; tests/commands/test_whole_line.py runs one",
    "demo": "minutes; .ci/run runs it",
}
"""Verbs that are parsed and not run here, and why."""
LANGUAGES = {"bash", "python", "text", "bibtex", "yaml"}
STANDINS = ("fkd-ssl", "python", "torchrun", "pip", "make", "pytest", "ray", "sbatch", "bash")
SLURM = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_NNODES": "2", "SLURM_JOB_ID": "1", "SLURM_NODELIST": "a,b"}

Call = list[str]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    why: str | None
    """Why it is parsed and not run, as the comment above it says; None where it is run."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Returns the blocks of a page in order, without directives of the site's generator."""
    text = page.read_text()
    return [
        Block(
            page=str(page.relative_to(ROOT)),
            line=text.count("\n", 0, found.start("fence")) + 1,
            language=found["language"].strip(),
            text=textwrap.dedent(found["text"]),
            why=found["why"],
        )
        for found in FENCE.finditer(text)
        if not found["language"].startswith("{")
    ]


def given_to(page: Path) -> list[str]:
    """Returns what a page needs in addition to images and checkpoints: `<!-- given: runs/resnet18 store=another_name -->`."""
    return [name for line in re.findall(r"<!-- given: ([^>]+) -->", page.read_text()) for name in line.split()]


def write_images(folder: Path, per_class: int, seed: int) -> None:
    """Writes class folders of noise around a colour, 60 to 120 px per side."""
    generator = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for k in range(per_class):
            height, width = (int(side) for side in generator.integers(60, 121, size=2))
            noise = generator.normal(0, 50, (height, width, 3)) + np.array(colour)
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / name / f"{k}.jpg", quality=92)


def write_checkpoint(path: Path) -> None:
    """A random ResNet-18 in MoCo v2's layout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = models.resnet18()
        network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    torch.save({"arch": "resnet18", "state_dict": {f"module.encoder_q.{k}": v for k, v in network.state_dict().items()}}, path)


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages may need: image folders, `teacher.pth.tar`, `store`, `runs/resnet18`; tests copy it."""
    folder = tmp_path_factory.mktemp("stock")
    for name, per_class in IMAGES.items():
        write_images(folder / name, per_class, seed=name.endswith("val"))
    write_checkpoint(folder / "teacher.pth.tar")
    lines = (
        "precompute --images imagenet/train --store store --teacher mocov2 --checkpoint teacher.pth.tar --crops 4 --pixels 32",
        "train --images imagenet/train --store store --student resnet18 --epochs 1 --pixels 32 --batch_size 8 --workers 0 "
        "--out runs/resnet18",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        for line in lines:
            assert cli.main(line.split()) == 0
    return folder


@pytest.fixture
def place(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """place(page) -> the folder in which the page's blocks run; it becomes the current folder."""
    folder = tmp_path / "place"

    def make(page: Path) -> Path:
        folder.mkdir()
        for name in (*IMAGES, *given_to(page)):
            what, _, other = name.partition("=")
            shutil.copytree(stock / what, folder / (other or what), dirs_exist_ok=True)
        for name in {"teacher.pth.tar", *re.findall(r"[\w./-]+\.pth\.tar", page.read_text())}:
            (folder / Path(name).name).symlink_to(stock / "teacher.pth.tar")
        for name in ("configs", "benchmarks", "examples", "tests"):
            (folder / name).symlink_to(ROOT / name)
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        return folder

    yield make
    for name, module in list(sys.modules.items()):  # modules of a page, since another page may have the same names
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


def pages(*languages: str) -> list[Any]:
    """The pages that have such blocks, as parameters."""
    found = [page for page in PAGES if any(block.language in languages for block in blocks_of(page))]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in found]


@functools.cache
def standins(folder: Path) -> str:
    """A PATH of programs that record their arguments in $CALLS and do nothing; srun starts its command."""
    for name in STANDINS:
        (folder / name).write_text('#!/bin/sh\nprintf \'%s\\0\' "${0##*/}" "$@" "$(printf \'\\1\')" >> "$CALLS"\n')
    (folder / "srun").write_text('#!/bin/sh\nwhile case "$1" in -*) true;; *) false;; esac; do shift; done\nexec "$@"\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def calls_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """calls_of(block, folder) -> the calls of a bash block, as bash understands it.

    For a block that is only parsed, a file that it reads may be missing; nothing else may be wrong.
    """
    path = standins(tmp_path_factory.mktemp("bin"))

    def calls(block: Any, folder: Path, *, runs: bool) -> list[Call]:
        log = folder / ".calls"
        log.write_bytes(b"")
        env = {**os.environ, **SLURM, "PATH": path, "CALLS": str(log)}
        bash = shutil.which("bash")
        assert bash is not None
        done = subprocess.run(
            [bash, "-euc" if runs else "-uc", block.text], cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        wrong = done.returncode if runs else re.search("syntax error|unbound variable|command not found", done.stderr)
        assert not wrong, f"{block}: {done.stderr}"
        return [call.split("\0")[:-1] for call in log.read_text().split("\1\0")[:-1]]

    return calls


def inner(call: Call) -> Call:
    """Returns verb and options of fkd-ssl in a call, however it is started; empty for another program."""
    if call[0] == "fkd-ssl":
        return call[1:]
    if call[:3] == ["python", "-m", "fkd_ssl"]:
        return call[3:]
    if call[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        started = get_args_parser().parse_args(call[1:])
        return list(started.training_script_args) if started.module and started.training_script == "fkd_ssl" else []
    return []


def check(call: Call) -> None:
    """Parses a call with its program's parser."""
    if found := inner(call):
        verb, *options = found
        if verb == "--help":
            return
        assert verb in cli.VERBS, f"no verb {verb}"
        if options != ["--help"]:
            cli.parse(verb, cli.command_of(verb), options)
    elif call[0] in ("python", "torchrun"):
        script = next(word for word in call if word.endswith(".py"))
        parse_script(Path(script), call[call.index(script) + 1 :])
    elif call[0] == "make":
        assert re.search(rf"^{call[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {call[1]}"
    elif call[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [name for word in call for group in re.findall(r"\[(.*)\]", word) for name in group.split(",")]
        assert set(named) <= set(extras)
    elif call[0] in ("pytest", "bash"):
        assert all((ROOT / word).exists() for word in call[1:] if "/" in word)
    else:
        assert call[0] in ("ray", "sbatch"), f"nobody knows {call[0]}"


class ParsedError(Exception):
    """Raised when a script has parsed its options, to stop it there."""


def parse_script(script: Path, options: list[str]) -> None:
    """Runs a script until it has parsed its options."""
    read = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        read(self, *args, **kwargs)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(script), *options])
        patch.syspath_prepend(str((ROOT / script).parent))  # scripts import other scripts of their folder
        with pytest.raises(ParsedError):
            runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("page", pages(*LANGUAGES, ""))
def test_every_block_says_its_language(page: Path) -> None:
    assert [str(block) for block in blocks_of(page) if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("page", pages("bash", "python", "yaml"))
def test_it_parses(page: Path, calls_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of every command exists; every Python block compiles; every YAML block has options of train."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page):
        try:
            if block.language == "python":
                compile(block.text, str(block), "exec")
            elif block.language == "yaml":
                TrainConfig(images="i", store="s", out="o", **flat(yaml.safe_load(block.text), TrainConfig))
            elif block.language == "bash":
                for call in calls_of(block, tmp_path, runs=False):
                    check(call)
        except Exception as error:
            raise AssertionError(f"{block}: {error}") from error


@pytest.mark.parametrize(
    "line",
    [
        "fkd-ssl trian --images x",
        "fkd-ssl train --imagse x",
        "torchrun --nproc-per-node 2 -m fkd_ssl train --imagse x",
        "torchrun --nprocs 2 -m fkd_ssl train --images x --out y --store z",
        "python benchmarks/geometry.py --images x --limits 3",
        "python benchmarks/nothing.py --images x",
        "make tests",
        "pip install .[nothing]",
        "pytest tests/nothing.py",
        "conda install x",
    ],
)
def test_what_is_wrong_is_noticed(line: str) -> None:
    with pytest.raises((RequestError, AssertionError, SystemExit, FileNotFoundError)):
        check(line.split())


@pytest.mark.slow
@pytest.mark.parametrize("page", pages("bash", "python"))
def test_it_runs(page: Path, place: Any, calls_of: Any, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """The blocks of a page, in their order, in one folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sweep, "MIN_STEPS", 10)
    folder = place(page)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language == "python":
            run_python(block, names, folder)
        elif block.language == "bash" and not block.why:
            for call in calls_of(block, folder, runs=True):
                capfd.readouterr()
                status = run(call)
                said = capfd.readouterr()
                assert status == 0, f"{block}: {' '.join(call)}: {said.out}{said.err}"


def run_python(block: Any, names: dict[str, Any], folder: Path) -> None:
    """Executes a block; one that begins with a file name is saved as that file and imported."""
    if file := re.match(r"# (\w+)\.py\b", block.text):
        (folder / f"{file[1]}.py").write_text(block.text)
        importlib.invalidate_caches()
        if not block.why:
            importlib.import_module(file[1])
    elif not block.why:
        exec(compile(block.text, str(block), "exec"), names)  # noqa: S102


def run(call: Call) -> int:
    """Returns the exit status of a call at small size; 0 for a call that does not run here."""
    options = inner(call)
    if options and call[0] != "torchrun" and "--help" not in options:
        verb = options[0]
        if not {verb, " ".join(options[:2])} & set(PARSED_ONLY):
            try:
                return cli.main([*options, *SMALL.get(verb, "").split(), *small_teacher(options)])
            except SystemExit as stop:
                return int(stop.code or 0)
    elif call[0] == "python" and call[1] in SCRIPTS:
        done = subprocess.run([sys.executable, *call[1:], *SCRIPTS[call[1]].split()], check=False)
        return done.returncode
    return 0


def small_teacher(options: Call) -> Call:
    """Replaces a preset's weights, which are missing here, by any checkpoint of its layout."""
    return ["--teacher", "mocov2", "--checkpoint", "teacher.pth.tar"] if set(options) & set(PRESETS) else []
