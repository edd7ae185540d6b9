import multiprocessing
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# set before any test can start the server, whose processes start fast
multiprocessing.set_forkserver_preload(
    ["pytest", "torch", "torchvision", "faiss", "PIL.Image", "fkd_ssl.store.write.precompute"]
)
DRIVER = Path(__file__).with_name("driver.py")


@pytest.fixture
def pictures(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the images that a test may change."""
    return Path(shutil.copytree(image_folder, tmp_path / "pictures"))


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Returns every file of a folder, including hidden ones, with its bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    return read


@pytest.fixture(scope="session")
def start() -> Callable[..., multiprocessing.process.BaseProcess]:
    """start(**options) runs driver.py in a new process, forked from a server that has only imported modules."""
    context = multiprocessing.get_context("forkserver")

    def begin(**options: Any) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=runpy.run_path, args=(str(DRIVER), {"OPTIONS": options}))
        process.start()
        return process

    return begin
