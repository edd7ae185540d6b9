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


LINEAR = {"optimizer": "adam", "lr": 3e-4, "lr_decay": "linear", "weight_decay": 0, "precision": "32-true"}
ALL = {"optimizer": "sgd", "weight_decay": 1e-4, "decay_all": True, "lr_decay": "cosine", "warmup_epochs": 0}
PUBLISHED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "mocov2_*": (LINEAR, ["recipe s2bnn"]),
    "swav_w4_*": ({**LINEAR, "epochs": 100, "batch_size": 512}, ["recipe s2bnn"]),
    "fkd_resnet*": (
        {**ALL, "lr": 0.1, "epochs": 300, "batch_size": 1024, "single_crop_epochs": 4, "precision": "32-true"},
        ["--max_scale 0.936", "lr 0.1 x batch / 512", "at random"],
    ),
    "fkd_[!r]*": (
        {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05, "decay_all": False, "warmup_epochs": 5, "drop_path": 0},
        ["--max_scale 0.936", "1e-5", "at random"],
    ),
    "meal_v2_*": (
        {"lr": 0.01, "lr_decay": "100,180", "weight_decay": 0, "crops_per_image": 8, "single_crop_epochs": 0},
        ["discriminator", "at random"],
    ),
    "seed_*": ({**ALL, "lr": 0.03, "epochs": 200, "precision": "16-mixed"}, ["one crop of each image"]),
    "simreg_*": (
        {**ALL, "lr": 0.05, "epochs": 130, "head": "simreg", "precision": "32-true"},
        ["--recipe simreg", "@backbone", "one crop of each image"],
    ),
}
"""Of the authors' code: the options of configs for ImageNet, and what their first lines must say."""


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_the_options_are_those_of_the_published_code(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, words = PUBLISHED[pattern]
    found = sorted((ROOT / "configs/imagenet").glob(f"{pattern}.yaml"))
    assert found
    for path in found:
        config = parsed(path, monkeypatch)
        assert {name: getattr(config, name) for name in options} == options, path.name
        assert "online" not in path.name or config.recipe == "s2bnn"
        comment = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
        assert [word for word in (*words, "Not run here") if word not in comment] == [], path.name
