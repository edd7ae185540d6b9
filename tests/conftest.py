"""Shared fixtures: a folder of small smooth images, a tiny real network as teacher, and stores made of both."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn

from fkd_ssl import images
from fkd_ssl.crops import RECIPES
from fkd_ssl.store import Store, open_store
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.targets import TargetSpec, TeacherInfo

torch.set_num_threads(1)  # only tiny networks; the same bytes in every process that loads this file

CLASSES = {"ash": (60, 90, 190), "birch": (70, 170, 80), "cedar": (190, 80, 60)}
PER_CLASS = 8

MakeStore = Callable[..., Store]


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs and uses Triton's interpreter for --device_crops, unless the GPU tests are selected.

    Tests compare bits with those of a CPU, or expect messages about a machine without a GPU.
    """
    chosen = config.getoption("markexpr")
    if "gpu" not in chosen or "not gpu" in chosen:
        os.environ["TRITON_INTERPRET"], os.environ["CUDA_VISIBLE_DEVICES"] = "1", ""
        _let_triton_count_with_new_numpy()


def _let_triton_count_with_new_numpy() -> None:
    """Lets the interpreter of Triton 3.6 (of torch 2.11) convert arrays of one element to int, which NumPy 2.4 refuses."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def smooth_image(seed: int, height: int, width: int, colour: tuple[int, int, int] = (128, 128, 128)) -> npt.NDArray[np.uint8]:
    """A smooth texture around a colour, uint8 [H, W, 3]: an enlarged coarse random grid."""
    grid = np.random.default_rng(seed).normal(0, 45, (7, 7, 3)) + np.array(colour)
    coarse = Image.fromarray(grid.clip(0, 255).astype(np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def write_images(folder: Path, *, per_class: int = PER_CLASS, seed: int = 0) -> Path:
    """Writes `<class>/NNN.jpg`, sides of 60 to 120 pixels."""
    generator = np.random.default_rng(seed)
    for label, (name, colour) in enumerate(CLASSES.items()):
        (folder / name).mkdir(parents=True)
        for k in range(per_class):
            height, width = (int(n) for n in generator.integers(60, 121, size=2))
            picture = smooth_image(1000 * seed + 100 * label + k, height, width, colour)
            Image.fromarray(picture).save(folder / name / f"{k:03d}.jpg", quality=92)
    return folder


class TinyTeacher:
    """A random convolutional network, the same in every process; satisfies fkd_ssl.store.write.rows.Teacher."""

    def __init__(self, seed: int = 0, name: str = "tiny") -> None:
        self.info = TeacherInfo(
            name=name,
            spec=TargetSpec("embedding", (16,)),
            network="random convolutions",
            licence="none",
            checkpoint_sha256=f"{seed:064x}",
            pixels=32,
        )
        self.calls = 0
        self.crops_seen = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = nn.Sequential(
                nn.Conv2d(3, 12, 5, stride=2),
                nn.ReLU(),
                nn.Conv2d(12, 24, 3, stride=2),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(96, 16),
            ).eval()
            with torch.no_grad():  # centred on coarse noise, so that targets point in all directions
                noise = nn.functional.interpolate(torch.rand(64, 3, 4, 4), size=32, mode="bilinear")
                self.module[-1].bias -= self.module((noise - 0.45) / 0.225).mean(dim=0)

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Targets float32 [B, 16] of crops uint8 [B, 3, H, W]."""
        assert images.dtype == torch.uint8
        self.calls += 1
        self.crops_seen += len(images)
        mean, std = torch.tensor(self.info.mean).view(3, 1, 1), torch.tensor(self.info.std).view(3, 1, 1)
        return nn.functional.normalize(self.module((images.float() / 255 - mean) / std), dim=1)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Moves the library's cache folder out of the user's home, also for processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FKD_SSL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smooth() -> Callable[..., npt.NDArray[np.uint8]]:
    """smooth(seed, height, width) -> uint8 [H, W, 3]."""
    return smooth_image


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<class>/NNN.jpg`, 3 classes x 8 pictures; to be read only."""
    return write_images(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture
def tiny_teacher() -> TinyTeacher:
    """A network with D = 16 for crops of 32 pixels, which counts its calls."""
    return TinyTeacher()


@pytest.fixture(scope="session")
def new_teacher() -> Callable[..., TinyTeacher]:
    """new_teacher(seed=0, name="tiny") -> another such network."""
    return TinyTeacher


@pytest.fixture
def unprivileged(tmp_path: Path) -> Callable[[], AbstractContextManager[None]]:
    """`with unprivileged():` drops root's rights, so that permissions apply."""

    @contextmanager
    def lower() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        for folder in (tmp_path, *tmp_path.parents[:3]):
            folder.chmod(folder.stat().st_mode | 0o011)  # pytest's own folders; pytest-xdist adds one level
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return lower


@pytest.fixture
def make_store(image_folder: Path) -> MakeStore:
    """make_store(folder, **options of precompute) -> Store; `images` (folder or set) and `teacher` among them."""

    def make(folder: Path, **options: Any) -> Store:
        given = options.pop("images", image_folder)
        image_set = images.open_images(given)
        teacher = options.pop("teacher", None) or TinyTeacher()
        asked: dict[str, Any] = {"crops": 4, "recipe": RECIPES["mocov2"], "pixels": 32, "chunk_size": 16, **options}
        precompute(image_set, folder, teacher, **asked)
        return open_store(folder)

    return make
