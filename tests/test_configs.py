"""The first lines of every config in configs/ are a valid command line, for an existing student."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fkd_ssl import cli
from fkd_ssl.comparison.config import CompareConfig
from fkd_ssl.students import check_student
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.training import defaults
from fkd_ssl.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def parsed(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the config dataclass of the command in the file's first lines."""
    monkeypatch.chdir(ROOT)
    comment = re.sub(r"\\\n# +", "", path.read_text()).split("\n", 1)[0]
    program, verb, *args = comment.removeprefix("# ").split()
    assert program == "fkd-ssl"
    assert args[:2] == ["--config", str(path.relative_to(ROOT))]
    return cli.parse(verb, cli.command_of(verb), args)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(path, monkeypatch)
    assert "student" not in vars(config) or config.student in path.read_text()
    if isinstance(config, TrainConfig | CompareConfig):  # published values, whatever the number of images
        open_ = [name for name in ("pixels", "batch_size", "lr", "warmup_epochs") if getattr(config, name) is None]
        assert not open_, f"{path.name} must state {open_}"
    if isinstance(config, TrainConfig):
        from fkd_ssl.training.engine import check_batch

        check_batch(config, 5000)


def test_the_page_on_comparing_has_the_options_of_the_published_table(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/comparison.md").read_text()
    command = re.search(r"```bash\nfkd-ssl compare (.*?)\n```", page, re.DOTALL)
    assert command is not None
    shown = vars(cli.parse("compare", cli.command_of("compare"), shlex.split(command[1].replace("\\\n", " "))))
    published = vars(parsed(ROOT / "configs/imagenette/compare_mobilenet_v3_small.yaml", monkeypatch))
    own = {"images", "val", "checkpoint", "out", "further_arms"}
    assert {name: shown[name] for name in shown.keys() - own} == {name: published[name] for name in shown.keys() - own}
    table = (ROOT / "docs/results/comparison.md").read_text()
    assert f'--further_arms "{shown["further_arms"]}"' in table
    assert set(shown["further_arms"].split()) < set(published["further_arms"].split())


SMALL = sorted({path for path in CONFIGS if path.parent.name == "imagenette" and "student:" in path.read_text()})


@pytest.mark.parametrize("path", SMALL, ids=lambda path: str(path.stem))
def test_its_student_and_objective_are_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fkd_ssl.training.engine import objectives_of

    config = parsed(path, monkeypatch)
    check_student(config.student, config.pixels, head=config.head, stem=config.stem, width=config.width)
    if isinstance(config, TrainConfig):
        kind = "distribution" if config.head == "classifier" else "embedding"
        config = defaults.resolve(config, images=7000, pixels=64, kinds=[kind])
        objectives_of(config, [TeacherInfo(name="t", spec=TargetSpec(kind, (128,)))])


def test_every_imagenet_run_has_a_small_twin() -> None:
    large = {path.stem.replace("_w4", "") for path in CONFIGS if path.parent.name == "imagenet"}
    small = {path.stem for path in CONFIGS if path.parent.name == "imagenette"}
    alone = {path for path in large if path.startswith(("fkd_", "meal_v2_"))}  # one small config replaces all of them
    assert {"fkd_resnet18", "meal_v2_resnet18"} <= small
    assert large - small - alone == {"mocov2_resnet18_stored", "swav_resnet18_prototype_ce"}  # with pages of their own
