"""The command line in this process: `call` returns status, standard output and standard error; `work` is a prepared folder."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from fkd_ssl import cli

TEACHER = '''
import torch
from torch import nn

class Network(nn.Module):
    """Colours in a coarse grid, mixed: a teacher that is better than chance."""

    pixels = 32

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mix = nn.Linear(48, 16, bias=False)

    def forward(self, pixels):
        return self.mix(nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1))

def make():
    return Network()

def other():
    return Network(seed=1)

class Prototyped(Network):
    """The same with prototypes, as a Teacher of one's own."""

def prototyped(checkpoint=None):
    from fkd_ssl.teachers import Teacher

    network = Prototyped(seed=2 if checkpoint is None else 3)
    prototypes = torch.eye(16).numpy()
    return Teacher(
        network, nn.Identity(), name="prototyped", shape=(16,), network="colours", pixels=32,
        arrays={"prototypes": prototypes},
    )

class Classifier(nn.Module):
    """Logits of the three colours, which it tells well."""

    pixels, kind = 32, "distribution"

    def __init__(self, sharpness=4.0):
        super().__init__()
        self.colours = nn.Parameter(torch.tensor([[60., 90., 190.], [70., 170., 80.], [190., 80., 60.]]) / 255)
        self.sharpness = sharpness

    def forward(self, pixels):
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        colour = pixels.mean(dim=(2, 3)) * std + mean
        return -self.sharpness * torch.cdist(colour, self.colours)

class Pooled(nn.Module):
    """Logits of the three colours by global average pooling and one linear layer, as label maps need it."""

    pixels, kind = 32, "distribution"

    def __init__(self):
        super().__init__()
        colours = Classifier().colours.detach()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.layers = nn.Sequential(nn.AvgPool2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
        self.layers[3].weight.data = 60 * colours * std  # of -30 |colour - c|^2 what is linear
        self.layers[3].bias.data = 60 * colours @ mean - 30 * (colours ** 2).sum(dim=1)

    def forward(self, pixels):
        return self.layers(pixels)

def pooled():
    return Pooled()

def classes():
    return Classifier()

def sharper():
    return Classifier(12.0)

def broken():
    raise ValueError("my own mistake")
'''
COLOURS = {"ash": (60, 90, 190), "birch": (70, 170, 80), "cedar": (190, 80, 60)}


class Answer(NamedTuple):
    status: int
    out: str
    err: str


Call = Callable[..., Answer]


def write_images(folder: Path, per_class: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for k in range(per_class):
            noise = generator.normal(0, 50, (40, 44, 3)) + np.array(colour)
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / name / f"{k}.png")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images `train` (3 x 6) and `val` (3 x 4), a teacher `own_teacher:make`, its lossless store `store`, C = 4."""
    folder = tmp_path_factory.mktemp("work")
    write_images(folder / "train", 6, seed=0)
    write_images(folder / "val", 4, seed=1)
    (folder / "own_teacher.py").write_text(TEACHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        args = "precompute --images train --store store --teacher own_teacher:make --crops 4 --codec Flat --chunk_size 16"
        assert cli.main(args.split()) == 0
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made` that a test may change, as the current folder."""
    folder = Path(shutil.copytree(made, tmp_path / "work"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "own_teacher", raising=False)  # of another test, which may have changed it
    return folder


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """call("train --images train", more=...) -> Answer; paths with blanks are passed as keywords."""

    def run(line: str, **options: Any) -> Answer:
        args = line.split() + [text for name, value in options.items() for text in (f"--{name}", str(value))]
        capfd.readouterr()
        try:
            status = cli.main(args)
        except SystemExit as stop:  # argparse exits after --help
            status = int(stop.code or 0)
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return Answer(status, said.out, said.err)

    return run


@pytest.fixture
def train_line() -> str:
    """The command line of a training of two steps on stored targets, without --out."""
    return (
        "train --images train --store store --student squeezenet1_1 --epochs 2 --batch_size 18 --crops_per_image 2 "
        "--pixels 32 --workers 0 --log_every 1 --checkpoint_interval 0"
    )
