"""Run folders: new, resumed, done, or refused."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from fkd_ssl import locks, runs
from fkd_ssl.errors import FkdError, ImageError, RequestError


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 3e-4
    name: str = "a: b"
    store: str | None = None


def begin(out: Path, config: Any, inputs: dict[str, str]) -> str:
    with runs.open_run(out, config, inputs) as (folder, state):
        assert folder == out
        assert (out / runs.LOCK).exists()
    assert not (out / runs.LOCK).exists()
    return state


def test_a_folder_that_is_not_there_or_empty_is_new(tmp_path: Path) -> None:
    assert runs.peek(tmp_path / "none", Config()) == "new"
    assert runs.peek(tmp_path, Config()) == "new"
    assert not (tmp_path / "none").exists()


def test_open_run_writes_the_config_and_then_resumes(tmp_path: Path) -> None:
    with runs.open_run(tmp_path / "deep" / "run", Config(), {}) as (folder, state):
        assert (folder, state) == (tmp_path / "deep" / "run", "new")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"lr": 3e-4, "name": "a: b", "store": None}
    assert begin(folder, Config(), {}) == "resume"


def test_a_finished_run_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begin(folder, Config(), {})
    runs.finish(folder, {"steps": 3})
    assert runs.peek(folder, Config()) == "done"
    results = runs.read_results(folder)
    assert results["steps"] == 3
    assert {"python", "fkd_ssl", "torch", "lightly", "faiss-cpu"} <= set(results["versions"])


def test_another_config_is_refused_and_named(tmp_path: Path) -> None:
    begin(tmp_path / "run", Config(), {})
    with pytest.raises(RequestError, match=r"run of another config \(lr is 0\.0003 there, 0\.1 here\); choose another --out"):
        begin(tmp_path / "run", Config(lr=0.1), {})


def test_files_that_are_no_run_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RequestError, match=r"exists and is not a run of fkd-ssl; choose another --out"):
        begin(tmp_path, Config(), {})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thesis.tex", "years of work")]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RequestError, match=r"run: is a file; --out must name a folder"):
        runs.peek(tmp_path / "run", Config())


@pytest.mark.parametrize("content", [None, "{", ""])
def test_results_that_are_missing_or_torn_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(RequestError, match=r"results\.json: .*; not a finished run"):
        runs.read_results(tmp_path)


def test_at_most_three_changes_are_named(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Four:
        a: int = 1
        b: int = 1
        c: int = 1
        d: int = 1

    begin(tmp_path, Four(), {})
    with pytest.raises(RequestError, match=r"\(a is 1 there, 2 here; b is 1 there, 2 here; c is 1 there, 2 here\)"):
        runs.peek(tmp_path, Four(a=2, b=2, c=2, d=2))


def test_numbers_are_compared_and_not_their_spelling(tmp_path: Path) -> None:
    begin(tmp_path / "run", Config(lr=2), {})
    assert runs.peek(tmp_path / "run", Config(lr=2.0)) == "resume"


@pytest.mark.parametrize("content", ["- a list\n", "a: [torn\n", "", "other: 1\n", "\x00\xff"])
def test_somebody_elses_config_yaml_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(RequestError, match=r"holds a run of another config \(.*\); choose another --out"):
        begin(tmp_path, Config(), {})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("config.yaml", content.encode("latin-1"))]


def test_results_json_is_plain_json(tmp_path: Path) -> None:
    runs.finish(tmp_path, {"knn": None})
    assert json.loads((tmp_path / "results.json").read_text())["knn"] is None


def test_keys_that_only_say_how_a_run_is_run_may_differ(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Free:
        lr: float = 0.1
        workers: int = 2
        EXECUTION: ClassVar[tuple[str, ...]] = ("workers",)

    begin(tmp_path / "run", Free(), {})
    assert runs.peek(tmp_path / "run", Free(workers=0)) == "resume"
    with pytest.raises(RequestError, match=r"another config \(lr is 0\.1 there, 0\.2 here\)"):
        runs.peek(tmp_path / "run", Free(lr=0.2, workers=0))


def test_a_missing_key_has_its_default_and_an_unknown_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lr: 0.0003\n")  # of a version that had no `name` and `store`
    assert runs.peek(tmp_path, Config()) == "resume"
    with pytest.raises(RequestError, match=r"another config \(name is 'a: b' there, 'c' here\)"):
        runs.peek(tmp_path, Config(name="c"))
    (tmp_path / "config.yaml").write_text("lr: 0.0003\nmuon: true\n")
    with pytest.raises(RequestError, match=r"another config \(this version has no option 'muon'\)"):
        runs.peek(tmp_path, Config())


def test_defaults_that_depend_on_other_options_are_those_of_the_config(tmp_path: Path) -> None:
    from fkd_ssl.pretraining.config import PretrainConfig

    (tmp_path / "config.yaml").write_text("images: a\nout: b\nmethod: swav\n")
    assert runs.peek(tmp_path, PretrainConfig(images="a", out="b", method="swav", prototypes=3000)) == "resume"
    with pytest.raises(RequestError, match=r"another config \(prototypes is 3000 there, 30 here\)"):
        runs.peek(tmp_path, PretrainConfig(images="a", out="b", method="swav", prototypes=30))


@dataclass(frozen=True, kw_only=True)
class Placed:
    images: str
    val: str | None = None
    PATHS: ClassVar[tuple[str, ...]] = ("images", "val")


def test_paths_may_change_but_not_whether_there_is_one(tmp_path: Path) -> None:
    begin(tmp_path, Placed(images="a"), {"images": "x"})
    assert runs.peek(tmp_path, Placed(images="/scratch/a"), {"images": "x"}) == "resume"
    with pytest.raises(RequestError, match=r"another config \(val is None there, 'v' here\)"):
        runs.peek(tmp_path, Placed(images="a", val="v"))


def test_changed_inputs_are_refused_once_something_was_saved(tmp_path: Path) -> None:
    config = Placed(images="a")
    begin(tmp_path, config, {"images": f"3 images, sha256 {'a' * 64}"})
    assert begin(tmp_path, config, {"images": "4 images"}) == "resume"
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        RequestError, match=r"images changed since the run began \(then 4 images, now 5 images, sha256 b{12}\.\.\.\); restore"
    ):
        begin(tmp_path, config, {"images": f"5 images, sha256 {'b' * 64}"})
    with pytest.raises(RequestError, match=r"store changed since the run began \(then missing, now s\)"):
        begin(tmp_path, config, {"images": "4 images", "store": "s"})
    runs.finish(tmp_path, {})
    with pytest.raises(RequestError, match=r"images changed"):
        runs.peek(tmp_path, config, {"images": "5 images"})
    assert runs.peek(tmp_path, config, {"images": "4 images"}) == "done"
    assert runs.peek(tmp_path, config) == "done"


def test_a_damaged_image_may_be_repaired_and_nothing_else_changed(tmp_path: Path) -> None:
    config, key = Placed(images="a"), "contents of images"
    begin(tmp_path, config, {"images": "x", key: "1"})
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RequestError, match=r"contents of images changed"):
        runs.peek(tmp_path, config, {"images": "x", key: "2"})
    with pytest.raises(ImageError, match="bad"), runs.open_run(tmp_path, config, {"images": "x", key: "1"}):
        raise ImageError("bad.png")
    with pytest.raises(RequestError, match=r"run began \(then x, now y\)"):
        begin(tmp_path, config, {"images": "y", key: "2"})
    assert begin(tmp_path, config, {"images": "x", key: "2"}) == "resume"
    with pytest.raises(RequestError, match=r"contents of images changed"):
        begin(tmp_path, config, {"images": "x", key: "3"})


def test_a_checkpoint_says_which_run_it_is_of(tmp_path: Path) -> None:
    config, inputs, path = Config(), {"images": "x", "contents of images": "1"}, tmp_path / "last.ckpt"
    found = runs.identity(config, inputs)
    runs.check_identity(path, found, config, inputs)
    runs.check_identity(path, found, config, None)
    with pytest.raises(RequestError, match=r"last.ckpt: holds a run of another config \(lr is 0.0003 there, 1 here\)"):
        runs.check_identity(path, found, Config(lr=1), inputs)
    with pytest.raises(RequestError, match=r"last.ckpt: images changed since the run began \(then x, now y\)"):
        runs.check_identity(path, found, config, {**inputs, "images": "y"})
    for foreign in (None, {}, {"config": 1, "inputs": {}}):
        with pytest.raises(RequestError, match=r"last.ckpt: has no config and inputs of its run; delete it"):
            runs.check_identity(path, foreign, config, inputs)


def test_two_users_of_a_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    run = tmp_path / "run"
    with runs.open_run(run, Config(), {}):
        for second in (lambda: begin(run, Config(), {}), lambda: runs.peek(run, Config())):
            with pytest.raises(
                RequestError, match=r"another process is using .*run: wait until it ends, or choose another --out"
            ):
                second()
        monkeypatch.setenv("RANK", "1")  # a process of the same training
        assert runs.peek(run, Config()) == "resume"
        with runs.open_run(run, Config(), None) as (_, state):
            assert state == "resume"
        monkeypatch.delenv("RANK")
    assert begin(run, Config(), {}) == "resume"


def test_what_a_killed_process_left_does_not_stop_a_run_and_goes(tmp_path: Path) -> None:
    for name in (".lock", ".tmp-config.yaml-0123456789ab"):
        (tmp_path / name).write_text("")
    assert runs.peek(tmp_path, Config()) == "new"
    assert begin(tmp_path, Config(), {}) == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "inputs.json"}


def test_a_folder_that_was_removed_or_replaced_is_not_finished(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with runs.open_run(run, Config(), {}):
        run.rename(tmp_path / "moved")
        with pytest.raises(FkdError, match=r"run: the run folder was removed or replaced"):
            runs.finish(run, {})
        run.mkdir()
        (run / runs.LOCK).write_text("")
        with pytest.raises(FkdError, match=r"run: the run folder was removed or replaced"):
            runs.finish(run, {})
    assert [path.name for path in run.iterdir()] == [runs.LOCK]  # another process's


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _sparse(path: Path) -> None:
    os.truncate(path, 2**40)


DAMAGES = {
    "pipe": _pipe,
    "sparse": _sparse,
    "deep": lambda path: path.write_text("[" * 50_000),
    "list": lambda path: path.write_text("[1]"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\0"),
    "date": lambda path: path.write_text("lr: 2001-99-99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [runs.CONFIG, runs.INPUTS, runs.RESULTS])
def test_damaged_files_of_a_run_are_refused_at_once(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "run"
    begin(folder, Config(), {"images": "1"})
    (folder / "last.ckpt").write_text("")  # so that the inputs are compared
    runs.finish(folder, {})
    DAMAGES[damage](folder / name)
    with pytest.raises(RequestError, match=rf"run.*{re.escape(name)}"):
        runs.read_results(folder) if name == runs.RESULTS else runs.peek(folder, Config(), {"images": "1"})


def test_a_config_of_aliases_is_not_spelled_out(tmp_path: Path) -> None:
    begin(tmp_path / "run", Config(), {})
    lines = ["lr: &a [x, x]"] + [
        f"store: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
    ]
    (tmp_path / "run/config.yaml").write_text("\n".join(lines))
    with pytest.raises(RequestError, match=r"its config\.yaml cannot be read"):
        runs.peek(tmp_path / "run", Config())
