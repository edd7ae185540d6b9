"""Installs the built wheel in a clean environment; imports it, runs its doctests and checks its types there.

The environment shares the packages of the project's own (they are gigabytes), but not the project's folder, so that a file
missing from the wheel is found. Run by `make check`.
"""

import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib import import_module
from pathlib import Path

MODULES = """
import importlib, pkgutil, doctest, sys
import fkd_ssl
failed = tested = 0
for info in pkgutil.walk_packages(fkd_ssl.__path__, "fkd_ssl."):
    if info.name.endswith(("__main__", "._avx2")):
        continue
    result = doctest.testmod(importlib.import_module(info.name))
    failed, tested = failed + result.failed, tested + result.attempted
assert sys.argv[1] in fkd_ssl.__file__, fkd_ssl.__file__
import fkd_ssl.teachers, fkd_ssl.eval
assert sys.argv[1] in fkd_ssl.teachers.__file__ and sys.argv[1] in fkd_ssl.eval.__file__
from fkd_ssl.crops import replay_digest
replay_digest()
assert str("fkd_ssl.crops._avx2" in sys.modules) == sys.argv[2], "compiled in one of both environments only"
print(f"doctests: {tested} run, {failed} failed")
sys.exit(bool(failed) or not tested)
"""


def main() -> None:
    wheel = next(Path(sys.argv[1]).glob("*.whl")).resolve()
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "clean"
        venv.create(clean, with_pip=True)
        python = clean / "bin" / "python"
        site = next(clean.glob("lib/python*/site-packages"))
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel))
        # after the wheel's folder on the path, so that the wheel takes precedence over the editable install
        (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        compiled = import_module("fkd_ssl.crops.replay")._avx2 is not None
        run(python, "-c", MODULES, str(clean), str(compiled), cwd=folder)
        run(python, "-m", "fkd_ssl", "--version", cwd=folder)
        run(
            python,
            "-m",
            "mypy",
            "--strict",
            "--config-file",
            str(Path("pyproject.toml").resolve()),
            "-p",
            "fkd_ssl",
            cwd=folder,
        )


def run(*command: object, cwd: str | None = None) -> None:
    status = subprocess.run([str(word) for word in command], cwd=cwd, check=False).returncode
    if status:
        sys.exit(f"failed with status {status}: {' '.join(map(str, command[:4]))}")


if __name__ == "__main__":
    main()
