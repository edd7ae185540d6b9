"""The command line itself: verbs, options, YAML files, help, and messages about mistakes."""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from fkd_ssl import __version__, cli, files, options

GOLDEN = Path(__file__).parent / "options.json"
VERBS = [verb for verb in cli.VERBS if importlib.util.find_spec(f"fkd_ssl.commands.{verb.replace('-', '_')}")]


def options_of(verb: str) -> dict[str, dict[str, Any]]:
    config = cli.command_of(verb).Config
    home = {name: {"section": group} for group, names in options.groups_of(config).items() for name in names}
    return {
        f.name: {
            "type": inspect.formatannotation(f.type),
            "default": "(required)" if f.default is MISSING else f.default,
            **home.get(f.name, {}),
        }
        for f in fields(config)
    }


def test_options_are_golden() -> None:
    """Scripts rely on the options. To change them on purpose: UPDATE_GOLDEN=1 pytest ..."""
    found = {verb: options_of(verb) for verb in VERBS}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_every_option(verb: str, call: Any) -> None:
    status, out, err = call(f"{verb} --help")
    assert (status, err) == (0, "")
    assert f"usage: fkd-ssl {verb}" in out
    positionals = getattr(cli.command_of(verb), "POSITIONALS", ())
    for name in options_of(verb):
        assert (name if name in positionals else f"--{name}") in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_help(verb: str) -> None:
    config = cli.command_of(verb).Config
    assert all(cli.option_helps(config)[name] for name in options_of(verb))


def test_help_answers_at_once_and_without_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); from fkd_ssl.cli import main; status = main(['--help'])\n"
        "heavy = [m for m in ('torch', 'numpy', 'faiss', 'lightly', 'jsonargparse') if m in sys.modules]\n"
        "print('SEEN', status, heavy, time.perf_counter() - start < 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "SEEN 0 [] True"
    assert all(f"\n  {verb} " in done.stdout for verb in cli.VERBS)


def test_a_verbs_help_needs_no_torch() -> None:
    code = (
        "import sys; from fkd_ssl.cli import main\n"
        "try: main(['train', '--help'])\n"
        "finally: print('SEEN', 'torch' in sys.modules)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "SEEN False"
    assert time.perf_counter() - started < 10


def test_the_module_and_the_version() -> None:
    done = subprocess.run([sys.executable, "-m", "fkd_ssl", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


class TestMistakes:
    """Each exits with status 2, prints one line on standard error, and no traceback (`call` checks this)."""

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("trian --out x", "fkd-ssl trian: unknown verb 'trian'; did you mean train?"),
            ("xyzzy", "unknown verb 'xyzzy'; fkd-ssl --help lists them"),
            ("train --imagse x", "fkd-ssl train: no option --imagse; did you mean --images?"),
            ("train --batch-size 4", "no option --batch-size; did you mean --batch_size?"),
            ("knn --temprature=4", "no option --temprature; did you mean --temperature?"),
            ("inspect store --jason", "no option --jason; did you mean --json?"),
            ("train --images i --out o --store s --epochs many", "--epochs many: expected a number"),
            ("train --images i --out o --store s --batch_size 1.5", "--batch_size 1.5: expected a whole number"),
            ("train --images i --out o --optimizer adagrad", "--optimizer adagrad: expected adam, adamw, sgd or lars"),
            ("train --images i --out o --logger csv", "--logger csv: expected tensorboard, wandb or mlflow"),
            ("train --images i --out o --pixels", "--pixels: its value is missing"),
            ("train --images i --out o --compile=maybe", "--compile: takes no value; write --compile or --no_compile"),
            ("linear --model m --train t --val v --lr [1,2]", "--lr [1, 2]: expected a number"),
            ("train --images i --out o --store s --batch_size 256 --crops_per_image 3", "batch_size 256: counts crops"),
            ("train --images i --out o", "targets stored: --store is needed"),
            ("train --images i --store s", "--out must be given"),
            ("knn --model m --train t", "val"),
            ("inspect", "STORE must be given"),
            ("precompute --images i --store s --teacher t stray", "stray"),
        ],
    )
    def test_on_the_command_line(self, call: Any, line: str, said: str) -> None:
        status, out, err = call(line)
        assert (status, out) == (2, "")
        assert said in err
        assert err.startswith(f"fkd-ssl {line.split()[0]}: ")
        assert err.count("\n") == 1

    @pytest.mark.parametrize("line", ["--help", "train --help", "train --images i --out o --print_config"])
    def test_a_reader_that_ends_early(self, line: str) -> None:
        """As in `fkd-ssl --help | head -1`."""
        code = f"import sys, time\nfrom fkd_ssl.cli import main\ntime.sleep(0.5)\nsys.exit(main({line.split()}))"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        assert (process.wait(timeout=60), err) == (0, "")

    def test_nothing_asked_shows_the_verbs(self, call: Any) -> None:
        status, out, _ = call("")
        assert status == 2
        assert "usage: fkd-ssl VERB" in out

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("data:\n  imagse: i\n", "no key 'imagse' in the section 'data'; did you mean images?"),
            ("images: i\n", "key 'images': belongs in the section 'data'; indent it below data:"),
            ("student: resnet18\n", "key 'student': belongs in the section 'student'; indent it below student:"),
            ("data:\n  lr: 1\n", "key 'lr': belongs in the section 'optimizer', not in 'data'"),
            ("optimiser:\n  lr: 1\n", "no section 'optimiser'; did you mean optimizer?; there are data, targets, student, "),
            ("{images: i, 1: 2}\n", "key 'images': belongs in the section 'data'"),
            ("data: {images: i}\nengine: {out: o}\ntargets: {store: s}\noptimizer: {epochs: many}\n", "--epochs"),
            ("data: {images: i}\nengine: {out: o}\ntargets: {store: s}\noptimizer:\n  lr: {a: 1}\n", "--lr"),
            ("data: [i\n", ""),
            ("- images\n", ""),
        ],
    )
    def test_in_a_yaml_file(self, call: Any, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "a.yaml").write_text(text)
        status, out, err = call("train", config=tmp_path / "a.yaml")
        assert (status, out) == (2, "")
        assert said in err

    def test_a_config_that_is_not_there(self, call: Any, tmp_path: Path) -> None:
        status, _, err = call("train", config=tmp_path / "none.yaml")
        assert status == 2
        assert "none.yaml" in err


class TestConfigFiles:
    LINE = "train --images i --out o --store s --lr 1e-3 --student squeezenet1_1 --val v --knn_every 2.5"

    def test_print_config_round_trips(self, call: Any, tmp_path: Path) -> None:
        status, printed, _ = call(f"{self.LINE} --print_config")
        assert status == 0
        values = yaml.safe_load(printed)
        assert list(values) == ["data", "targets", "student", "objective", "optimizer", "engine", "logging"]
        assert (values["data"]["batch_size"], values["optimizer"]["lr"], values["optimizer"]["clip"]) == (None, 1e-3, None)
        assert (values["logging"]["val"], values["logging"]["knn_every"]) == ("v", 2.5)
        (tmp_path / "a.yaml").write_text(printed)
        train = importlib.import_module("fkd_ssl.commands.train")
        direct = cli.parse("train", train, self.LINE.split()[1:])
        assert cli.parse("train", train, ["--config", str(tmp_path / "a.yaml")]) == direct
        again = call("train --print_config", config=tmp_path / "a.yaml").out
        assert yaml.safe_load(again) == values

    def test_options_win_over_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(
            "data:\n  images: i\ntargets:\n  store: s\noptimizer:\n  lr: 0.5\n  epochs: 7\nengine:\n  out: o\nlogging:\n"
        )
        train = importlib.import_module("fkd_ssl.commands.train")
        config = cli.parse("train", train, ["--config", str(tmp_path / "a.yaml"), "--lr", "0.25"])
        assert (config.lr, config.epochs) == (0.25, 7)

    @pytest.mark.parametrize("verb", sorted(cli.VERBS))
    def test_a_flag_of_the_file_can_be_switched_off(self, tmp_path: Path, verb: str) -> None:
        command = cli.command_of(verb)
        fields = dataclasses.fields(command.Config)
        positionals = [
            f.name for f in fields if f.name in getattr(command, "POSITIONALS", ()) and f.default is dataclasses.MISSING
        ]
        flags = [field.name for field in fields if field.type is bool and field.name != "leave_one_out"]  # val is optional
        needed = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in positionals]
        needed += {"knn": ["val"], "train": ["store"], "retrieve": ["gallery"]}.get(verb, [])
        values = dict.fromkeys(needed, "x") | dict.fromkeys(flags, True)
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(options.nested(values, command.Config)))
        file = ["--config", str(tmp_path / "a.yaml")] if needed else []
        for flag in flags:
            lines = ([], [f"--no_{flag}"], [f"--no_{flag}", f"--{flag}"])
            found = [getattr(cli.parse(verb, command, ["x"] * len(positionals) + file + line), flag) for line in lines]
            assert found == [bool(needed), False, True]

    def test_a_runs_config_is_a_config_file(self, tmp_path: Path) -> None:
        from fkd_ssl import runs

        train = importlib.import_module("fkd_ssl.commands.train")
        config = cli.parse("train", train, self.LINE.split()[1:])
        (tmp_path / "config.yaml").write_text(runs.to_yaml(config))
        assert cli.parse("train", train, ["--config", str(tmp_path / "config.yaml")]) == config

    @pytest.mark.parametrize("given", ["3e-4", "0.0003"])
    def test_numbers_are_spelled_as_one_likes(self, given: str) -> None:
        train = importlib.import_module("fkd_ssl.commands.train")
        assert cli.parse("train", train, f"--images i --out o --store s --lr {given} --epochs 3".split()).lr == 3e-4


class TestInterrupts:
    @pytest.fixture
    def raising(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def patch(error: BaseException) -> None:
            def run(config: Any) -> int:
                raise error

            monkeypatch.setattr(importlib.import_module("fkd_ssl.commands.teachers"), "run", run)

        return patch

    def test_ctrl_c_during_an_import(self, tmp_path: Path) -> None:
        """Even if the module catches KeyboardInterrupt."""
        code = "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    raise RecursionError\n"
        (tmp_path / "own.py").write_text(code)
        (tmp_path / "images").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "images/0.png")
        line = "precompute --images images --store store --teacher own:network --crops 2"
        done = subprocess.run(
            [sys.executable, "-m", "fkd_ssl", *line.split()], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
        assert (done.returncode, done.stdout) == (130, "")
        assert done.stderr == "fkd-ssl precompute: stopped; repeat the command to continue\n"

    def test_ctrl_c_in_a_destructor(self, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        class Swallows:
            def __del__(self) -> None:
                signal.raise_signal(signal.SIGINT)

        def run(config: Any) -> int:
            Swallows()
            for _ in range(2000):  # a signal just before a long sleep would not end it
                time.sleep(0.01)
            return 0

        monkeypatch.setattr(importlib.import_module("fkd_ssl.commands.teachers"), "run", run)
        started = time.monotonic()
        status, out, err = call("teachers")
        assert (status, out, err) == (130, "", "fkd-ssl teachers: stopped; repeat the command to continue\n")
        assert time.monotonic() - started < 10
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_ctrl_c(self, call: Any, raising: Any) -> None:
        raising(KeyboardInterrupt())
        status, out, err = call("teachers")
        assert (status, out) == (130, "")
        assert "fkd-ssl teachers: stopped; repeat the command to continue" in err

    def test_a_full_disk(self, call: Any, raising: Any) -> None:
        raising(OSError(28, "No space left on device", "store/crops"))
        status, _, err = call("teachers")
        assert status == 1
        assert "fkd-ssl teachers: store/crops: No space left on device" in err

    def test_an_error_of_ours_has_its_own_status(self, call: Any, raising: Any) -> None:
        from fkd_ssl.errors import CheckpointError, ImageError

        for error, expected in ((ImageError("a.jpg: torn"), 1), (CheckpointError("c.pth: other"), 2)):
            raising(error)
            assert call("teachers") == (expected, "", f"fkd-ssl teachers: {error}\n")

    def test_a_bug_of_ours_is_not_hidden(self, raising: Any) -> None:
        raising(ZeroDivisionError("a bug"))
        with pytest.raises(ZeroDivisionError, match="a bug"):
            cli.main(["teachers"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("inspect gone", "gone: not a store (no such folder)"),
        ("inspect train", "train: not a store (no manifest.json in it)"),
        ("verify gone", "gone: not a store"),
        ("verify store --images gone", "gone: no such folder of images"),
        ("verify store --column nobody", "store: no column 'nobody'; there are ['make']"),
        ("subset gone --out x --crops 2", "gone: not a store"),
        ("subset store --out x --column nobody", "nobody"),
        ("recode gone --codec SQ8 --out x", "gone: not a store"),
        ("recode store --column nobody --codec SQ8 --out x", "store: no targets of 'nobody'"),
        ("export-fkd gone --out x", "gone: not a store"),
        ("import-fkd gone --images train --store x", "gone: "),
        ("label-maps --images gone --out x --teacher own_teacher:pooled", "gone: no such folder of images"),
        ("show gone --images train --image ash/0.png", "gone: not a store"),
        ("show store --images gone --image ash/0.png", "gone: no such folder of images"),
        ("show store --images train --image gone.png", "image 'gone.png'"),
        ("train --images train --targets stored --store gone --out x", "gone: not a store"),
        ("train --images gone --targets stored --store store --out x", "gone: no such folder of images"),
        ("train --images train --targets stored --store store --column nobody --out x", "store: no targets of 'nobody'"),
        (
            "train --images train --targets relabel --label_maps gone --head classifier --out x",
            "gone: not a folder of label",
        ),
        ("export --model gone --out x.safetensors", "gone: no such run or checkpoint"),
        ("knn --model own_teacher:make --train train --val gone", "gone: no such folder of images"),
        ("retrieve --model own_teacher:make --gallery train --query own_teacher.py", "own_teacher.py: not a readable image"),
        ("retrieve --model own_teacher:make --gallery gone --query train/ash/0.png", "gone: no such folder of images"),
        ("report gone", "gone: no such folder of results"),
    ],
)
def test_what_the_user_names_and_does_not_exist_is_a_wrong_request(work: Path, call: Any, line: str, said: str) -> None:
    answer = call(line)
    assert (answer.status, answer.out) == (2, "")
    assert said in answer.err
    assert not (work / "x").exists()


HOSTILE = "MIT\x1b]0;owned\x07\x1b[2J\x9b2J\u202eTIM\ud800\rlicence"
SHOWN = r"MIT\x1b]0;owned\x07\x1b[2J\x9b2J\u202eTIM\ud800\rlicence"


def test_a_strangers_words_control_no_terminal(work: Path, call: Any) -> None:
    """Licences and names with escapes, direction changes and lone surrogates, in a store's column and in errors."""
    path = work / "store/targets/make/meta.json"
    values = files.read_json(path)
    values["teacher"] |= {"licence": HOSTILE, "network": f"{HOSTILE}\nteacher forged: D = 1"}
    path.unlink()
    files.write_json(path, values)
    for sidecar in path.parent.glob("codes-*.json"):
        own = {**files.read_json(sidecar), "column": files.sha256(files.canonical(values))}
        sidecar.unlink()
        files.write_json(sidecar, own)
    answer = call("inspect store")
    assert answer.status == 0
    assert f"licence {SHOWN};" in answer.out
    assert f"column make: {SHOWN}\\nteacher forged: D = 1, D = 16" in answer.out
    assert json.loads(call("inspect store --json").out)["columns"]["make"]["teacher"]["licence"] == HOSTILE
    error = call("knn --train train --val val", model=HOSTILE).err
    assert SHOWN in error
    assert all(char.isprintable() or char == "\n" for char in answer.out + error)


def test_on_and_off_in_a_config_are_words(tmp_path: Path, call: Any) -> None:
    """YAML reads them as booleans."""
    for verb, text, rest in (
        ("train", "data: {device_crops: on}", "--images i --out o --store s"),
        ("precompute", "device_crops: off", "--images i --store s --teacher t"),
    ):
        (tmp_path / "config.yaml").write_text(text)
        status, out, _ = call(f"{verb} --config {tmp_path}/config.yaml {rest} --print_config")
        assert status == 0
        assert f"device_crops: '{'on' if verb == 'train' else 'off'}'" in out
