"""The package's public names, and the cost of its import."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import fkd_ssl

PUBLIC = ("open_store", "replay", "StoredCrops", "objectives", "teachers", "eval", "crops", "store", "students", "training")
HEAVY = ("torch", "torchvision", "lightly", "pytorch_lightning", "faiss", "cv2", "numpy", "sklearn", "jsonargparse")


def loaded_after(statement: str) -> set[str]:
    """Returns the heavy packages that a new interpreter has imported after a statement."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded_after("import fkd_ssl, fkd_ssl.errors, fkd_ssl.cli") == set()


def test_configs_need_no_torch() -> None:
    assert "torch" not in loaded_after("import fkd_ssl.training.config, fkd_ssl.commands.train, fkd_ssl.commands.compare")


def test_only_the_command_line_imports_commands() -> None:
    imports = re.compile(
        r"^\s*(?:from fkd_ssl\.commands\b|import fkd_ssl\.commands\b|from fkd_ssl import .*\bcommands\b)", re.M
    )
    root = Path(__file__).parents[1]
    modules = [path for room in ("fkd_ssl", "eval", "teachers") for path in (root / room).rglob("*.py")]
    importing = [str(path.relative_to(root)) for path in modules if imports.search(path.read_text())]
    assert len(modules) > 100
    assert [path for path in importing if not path.startswith("fkd_ssl/commands/")] == ["fkd_ssl/cli.py"]


def test_no_command_is_long() -> None:
    """The work of a verb belongs in named functions; its `run` only calls them in order."""
    long = []
    for path in (Path(__file__).parents[1] / "fkd_ssl/commands").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "run":
                lines = (node.end_lineno or 0) - node.lineno + 1
                long += [f"{path.name}: {lines}"] if lines > 80 else []
    assert long == []


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_there_and_listed(name: str) -> None:
    assert getattr(fkd_ssl, name) is not None
    assert name in dir(fkd_ssl)


def test_the_mapped_packages_import_under_the_librarys_name() -> None:
    import fkd_ssl.eval
    import fkd_ssl.teachers

    assert fkd_ssl.eval.__name__ == "fkd_ssl.eval"
    assert fkd_ssl.teachers.__name__ == "fkd_ssl.teachers"
    assert callable(fkd_ssl.eval.knn_predict)
    assert callable(fkd_ssl.teachers.load_teacher)
    assert {"knn_predict", "linear", "wilson"} <= set(dir(fkd_ssl.eval))


def test_nothing_is_imported_under_a_bare_name() -> None:
    code = (
        "import sys, fkd_ssl; fkd_ssl.eval.knn_predict; fkd_ssl.teachers\n"
        "print('eval' in sys.modules, 'teachers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_lazy_names_are_the_modules_own() -> None:
    from fkd_ssl.crops import replay
    from fkd_ssl.data import StoredCrops
    from fkd_ssl.store import open_store

    assert (fkd_ssl.replay, fkd_ssl.StoredCrops, fkd_ssl.open_store) == (replay, StoredCrops, open_store)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fkd_ssl' has no attribute 'open_stores'"):
        fkd_ssl.open_stores  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'fkd_ssl\.eval' has no attribute 'knm'"):
        fkd_ssl.eval.knm  # noqa: B018


def test_the_version_is_the_distributions() -> None:
    assert fkd_ssl.__version__ == version("fkd_ssl")


def test_errors_carry_exit_statuses() -> None:
    from fkd_ssl import errors

    assert errors.FkdError.exit_status == errors.ImageError.exit_status == errors.StoreError.exit_status == 1
    assert errors.RequestError.exit_status == errors.CheckpointError.exit_status == 2


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["/bin/false", None])
def test_a_wheel_without_the_compiled_part_is_for_any_platform(compiler: str | None, tmp_path: Path) -> None:
    source = Path(__file__).parents[1]
    for name in ("fkd_ssl", "teachers", "eval"):
        shutil.copytree(source / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(source / name, tmp_path)
    environment = os.environ if compiler is None else {**os.environ, "CC": compiler}
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        compiled = any("_avx2" in name and name.endswith((".so", ".pyd")) for name in archive.namelist())
    assert compiled == (not wheel.name.endswith("-py3-none-any.whl"))
    assert not (compiled and compiler)
