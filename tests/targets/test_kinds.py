"""A kind of targets is added in one place: a grid [2, 2, D] is stored, verified, recoded and trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fkd_ssl import images
from fkd_ssl.arrays import Float32Array, UInt8Array
from fkd_ssl.crops import RECIPES
from fkd_ssl.data import StoredCrops, whole_batch
from fkd_ssl.errors import RequestError
from fkd_ssl.objectives import OBJECTIVES, Objective, make_objective
from fkd_ssl.store import open_store
from fkd_ssl.store.maintain.nearest import nearest
from fkd_ssl.store.maintain.recode import recode
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.targets import KINDS, Codec, Kind, Shape, TargetSpec, TeacherInfo
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.engine import train
from fkd_ssl.training.metrics import read_metrics

D = 8


class GridCodec:
    """Four tokens, each as signed bytes of a unit vector, or as float16."""

    def __init__(self, spec: str, shape: Shape) -> None:
        self.spec, self.shape = spec, shape
        self.code_size = int(np.prod(shape)) * (1 if spec == "bytes" else 2)

    def arrays(self) -> dict[str, Float32Array]:
        return {}

    def encode(self, targets: Float32Array) -> UInt8Array:
        flat = targets.reshape(len(targets), -1)
        stored = np.rint(flat * 127).astype(np.int8) if self.spec == "bytes" else flat.astype(np.float16)
        return stored.view(np.uint8)

    def decode(self, codes: UInt8Array) -> Float32Array:
        codes = np.ascontiguousarray(codes)
        flat = codes.view(np.int8) / np.float32(127) if self.spec == "bytes" else codes.view(np.float16).astype(np.float32)
        return flat.reshape(len(codes), *self.shape).astype(np.float32)


class Grid(Kind):
    """[2, 2, D], each token L2-normalised."""

    name = "grid"
    display_name = "grids of tokens"
    example_codecs = ("bytes", "half")
    larger = ("half",)

    def check_shape(self, shape: Shape) -> None:
        if len(shape) != 3:
            raise RequestError(f"targets of shape {list(shape)}: a grid has [h, w, D]")

    def describe(self, shape: Shape) -> str:
        return "x".join(map(str, shape))

    def of_output(self, output: Tensor) -> Tensor:
        return F.normalize(output.float(), dim=-1)

    def has_codec(self, codec: str) -> bool:
        return codec in self.example_codecs

    def default_codec(self, shape: Shape) -> str:
        return "bytes"

    def train(self, codec: str, sample: Float32Array) -> Codec:
        return GridCodec(codec, sample.shape[1:])

    def load(self, codec: str, shape: Shape, arrays: dict[str, npt.NDArray[Any]]) -> Codec:
        return GridCodec(codec, shape)

    def code_size(self, codec: str, shape: Shape) -> int:
        return GridCodec(codec, shape).code_size

    def parameter_shapes(self, codec: str, shape: Shape) -> dict[str, Shape]:
        return {}

    def sample_size(self, codec: str, shape: Shape) -> int:
        return 16


class TokenCosine(Objective):
    """1 - the mean cosine of a student's tokens and the teacher's."""

    kind = "grid"

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        tokens = F.normalize(student.view(target.shape), dim=-1)
        return 1 - (tokens * target).sum(dim=-1).mean()


class GridTeacher:
    """A random convolution whose map is pooled to 2 x 2."""

    def __init__(self) -> None:
        self.info = TeacherInfo(name="grid", spec=TargetSpec("grid", (2, 2, D)), network="convolution", pixels=32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.module = nn.Sequential(nn.Conv2d(3, D, 5, stride=2), nn.AdaptiveAvgPool2d(2)).eval()

    @torch.no_grad()
    def embed(self, crops: Tensor) -> Tensor:
        return self.info.spec.definition.of_output(self.module(crops / 255 - 0.45).permute(0, 2, 3, 1))


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "grid", Grid())
    monkeypatch.setitem(OBJECTIVES, "token_cosine", TokenCosine)


@pytest.mark.usefixtures("grid")
def test_a_grid_is_stored_verified_recoded_and_trained_on(image_folder: Path, tmp_path: Path) -> None:
    teacher, found = GridTeacher(), images.scan(image_folder)
    precompute(found, tmp_path / "store", teacher, crops=4, recipe=RECIPES["fkd"], pixels=32, chunk_size=16, codec="half")
    store = open_store(tmp_path / "store")
    column = store.column()
    assert (column.meta.codec, column.meta.code_size) == ("half", 2 * 4 * D)
    assert column.info.spec == TargetSpec("grid", (2, 2, D))
    report = verify(store, found, teacher=teacher, sample=5)
    assert report.problems == []
    assert report.cosine is not None
    assert report.cosine["min"] > 0.9999

    data = StoredCrops(store, found, crops_per_image=2, pixels=32)
    batch = whole_batch(data.__getitems__([(0, 0), (0, 3)]))
    assert batch["targets"].shape == (4, 2, 2, D)
    exact = teacher.embed(batch["images"])
    torch.testing.assert_close(batch["targets"], exact, rtol=0, atol=2e-3)

    small = recode(store, "bytes", to="small")
    assert (small.meta.code_size, small.meta.target) == (4 * D, column.meta.target)
    assert 0.99 < small.meta.fidelity["cosine_mean"] < 1
    np.testing.assert_allclose(small.codec.decode(small.shard(0)[0]), column.codec.decode(column.shard(0)[0]), atol=0.006)
    assert len(nearest(column, store.targets("grid", 0, slice(1)), count=3, crops=2, without=0)[0]) == 3

    config = TrainConfig(
        images=str(image_folder),
        out=str(tmp_path / "run"),
        targets="stored",
        store=str(store.folder),
        column="small",
        student="squeezenet1_1",
        objective="token_cosine",
        epochs=4,
        batch_size=16,
        crops_per_image=2,
        pixels=32,
        lr=1e-3,
        workers=0,
        log_every=1,
    )
    (tmp_path / "run").mkdir()
    data = StoredCrops(store, found, crops_per_image=2, pixels=32, column=["small"])
    train(config, data, tmp_path / "run", targets=[small.info])
    losses = [float(line["loss"] or 0) for line in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(RequestError, match=r"the targets of 'small' are grids of tokens: feature_kl is for embeddings"):
        make_objective("feature_kl", teacher=small.info)
    with pytest.raises(RequestError, match=r"codec SQ8: is not for grids of tokens, the targets of grid; choose, for inst"):
        recode(store, "SQ8", column="grid")
