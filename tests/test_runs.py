"""Run folders: new, resumed, done, or refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from fkd_ssl import runs
from fkd_ssl.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 3e-4
    name: str = "a: b"
    store: str | None = None


def test_a_folder_that_is_not_there_or_empty_is_new(tmp_path: Path) -> None:
    assert runs.peek(tmp_path / "none", Config()) == "new"
    assert runs.peek(tmp_path, Config()) == "new"
    assert not (tmp_path / "none").exists()


def test_open_run_writes_the_config_and_then_resumes(tmp_path: Path) -> None:
    folder, state = runs.open_run(tmp_path / "deep" / "run", Config())
    assert (folder, state) == (tmp_path / "deep" / "run", "new")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"lr": 3e-4, "name": "a: b", "store": None}
    assert runs.open_run(folder, Config()) == (folder, "resume")


def test_a_finished_run_is_done(tmp_path: Path) -> None:
    folder, _ = runs.open_run(tmp_path / "run", Config())
    runs.finish(folder, {"steps": 3})
    assert runs.peek(folder, Config()) == "done"
    results = runs.read_results(folder)
    assert results["steps"] == 3
    assert {"python", "fkd_ssl", "torch", "lightly", "faiss-cpu"} <= set(results["versions"])


def test_another_config_is_refused_and_named(tmp_path: Path) -> None:
    runs.open_run(tmp_path / "run", Config())
    with pytest.raises(RequestError, match=r"run of another config \(lr is 0\.0003 there, 0\.1 here\); choose another --out"):
        runs.open_run(tmp_path / "run", Config(lr=0.1))


def test_files_that_are_no_run_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match=r"exists and is not a run of fkd-ssl; choose another --out"):
        runs.open_run(tmp_path, Config())
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thesis.tex", "years of work")]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RequestError, match=r"run: is a file; --out must name a folder"):
        runs.peek(tmp_path / "run", Config())


@pytest.mark.parametrize("content", [None, "{", ""])
def test_results_that_are_missing_or_torn_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(RequestError, match=r"not a finished run: results\.json"):
        runs.read_results(tmp_path)


def test_difference_names_at_most_three_keys() -> None:
    found, wanted = dict.fromkeys("abcd", 1), dict.fromkeys("abcd", 2)
    assert runs.difference(found, wanted) == "a is 1 there, 2 here; b is 1 there, 2 here; c is 1 there, 2 here"


def test_numbers_are_compared_and_not_their_spelling(tmp_path: Path) -> None:
    runs.open_run(tmp_path / "run", Config(lr=2))
    assert runs.peek(tmp_path / "run", Config(lr=2.0)) == "resume"


@pytest.mark.parametrize("content", ["- a list\n", "a: [torn\n", "", "other: 1\n", "\x00\xff"])
def test_somebody_elses_config_yaml_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(RequestError, match=r"holds a run of another config \(.*\); choose another --out"):
        runs.open_run(tmp_path, Config())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("config.yaml", content.encode("latin-1"))]


def test_results_json_is_plain_json(tmp_path: Path) -> None:
    runs.finish(tmp_path, {"knn": None})
    assert json.loads((tmp_path / "results.json").read_text())["knn"] is None


def test_keys_that_only_say_how_a_run_is_run_may_differ(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Free:
        lr: float = 0.1
        workers: int = 2
        FREE: ClassVar = ("workers",)

    runs.open_run(tmp_path / "run", Free())
    assert runs.peek(tmp_path / "run", Free(workers=0)) == "resume"
    with pytest.raises(RequestError, match=r"another config \(lr is 0\.1 there, 0\.2 here\)"):
        runs.peek(tmp_path / "run", Free(lr=0.2, workers=0))
