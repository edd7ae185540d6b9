"""Global targets and tokens of one network in one store: their forward passes, their values, and every verb on them."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fkd_ssl.crops import RECIPES, replay
from fkd_ssl.errors import RequestError
from fkd_ssl.images import decode, open_images
from fkd_ssl.store import open_store
from fkd_ssl.store.maintain.recode import recode
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.teachers import Teacher
from fkd_ssl.teachers.tokens import as_tokens, set_grid

CROPS, PIXELS, CHUNK = 6, 32, 16


class Network(nn.Module):
    """A 4 x 4 map of 16 channels for 32 px, and its mean; counts its forward passes and can stop in one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.Tanh())
        self.passes = 0
        self.stop_at: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == self.stop_at:
            raise KeyboardInterrupt
        return self.body(images).mean((2, 3))


def teachers(network: nn.Module, grid: int = 2) -> list[Teacher]:
    whole = Teacher(network, nn.Identity(), name="whole", shape=(16,), pixels=PIXELS)
    tokens = as_tokens(whole)
    set_grid([tokens], grid)
    return [whole, tokens]


def write(folder: Path, given: Any, image_folder: Path, codec: str = "SQ8") -> Any:
    return precompute(
        open_images(image_folder),
        folder,
        given,
        crops=CROPS,
        recipe=RECIPES["mocov2"],
        codec=codec,
        pixels=PIXELS,
        chunk_size=CHUNK,
        progress=False,
    )


def codes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("codes-*.npy"))}


def test_both_columns_come_from_one_pass_and_have_the_bytes_of_separate_ones(image_folder: Path, tmp_path: Path) -> None:
    network = Network()
    both = teachers(network)
    network.passes = 0
    write(tmp_path / "both", both, image_folder)
    chunks = 24 * CROPS // CHUNK
    assert network.passes == 3 * chunks  # two codecs' samples, which are all crops here, and one pass for the codes
    for teacher in both:
        write(tmp_path / "separate", teacher, image_folder)
    assert network.passes == 3 * chunks + 4 * chunks
    assert set(codes(tmp_path / "both")) == {"targets/whole-tokens/codes-00000.npy", "targets/whole/codes-00000.npy"}
    assert codes(tmp_path / "both") == codes(tmp_path / "separate")


@pytest.mark.parametrize("stop_at", [1, 9, 20, 24])
def test_a_killed_run_continues(stop_at: int, image_folder: Path, tmp_path: Path) -> None:
    network = Network()
    both = teachers(network)
    write(tmp_path / "whole", both, image_folder)
    network.passes, network.stop_at = 0, stop_at
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "killed", both, image_folder)
    network.stop_at = None
    write(tmp_path / "killed", both, image_folder)
    assert codes(tmp_path / "killed") == codes(tmp_path / "whole")


def test_stored_tokens_are_those_of_the_replayed_crop(image_folder: Path, tmp_path: Path) -> None:
    """Of mirrored crops too: their tokens are those of the mirrored pixels, not mirrored tokens."""
    network = Network()
    write(tmp_path / "store", teachers(network), image_folder, codec="Flat")
    store, images = open_store(tmp_path / "store"), open_images(image_folder)
    found_flips = set()
    for row in range(4):
        records = np.asarray(store.crops(row, slice(None)))
        pixels = torch.from_numpy(replay(decode(images.read(row), "it"), records, PIXELS))
        mean, std = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)
        with torch.no_grad():
            found = network.body((pixels / 255 - mean) / std)
        halves = [found[:, :, y : y + 2, x : x + 2].mean((2, 3)) for y in (0, 2) for x in (0, 2)]
        expected = F.normalize(torch.stack(halves, dim=1), dim=-1).reshape(CROPS, 2, 2, 16)
        stored = torch.from_numpy(store.targets("whole-tokens", row, slice(None)))
        torch.testing.assert_close(stored, expected, rtol=1e-4, atol=1e-5)
        for record, tokens, other in zip(records, stored, expected.flip(2), strict=True):
            flipped = bool(record["flags"] & 1)
            found_flips.add(flipped)
            assert not flipped or not torch.allclose(tokens, other, atol=1e-3)
    assert found_flips == {False, True}


def test_verify_recode_and_subset(image_folder: Path, tmp_path: Path) -> None:
    network = Network()
    both = teachers(network)
    write(tmp_path / "store", both, image_folder, codec="Flat")
    store, images = open_store(tmp_path / "store"), open_images(image_folder)
    report = verify(store, images, both[1], column="whole-tokens", sample=20)
    assert not report.problems
    assert report.cosine is not None
    assert report.cosine["min"] > 0.9999
    made = recode(store, "SQ4", column="whole-tokens", to="small")
    assert (made.meta.code_size, made.meta.fidelity["sample"]) == (4 * 8, 24 * CROPS // 9)
    exact, decoded = (store.targets(name, 3, slice(None)) for name in ("whole-tokens", "small"))
    cosines = (exact * decoded).sum(-1)
    assert cosines.shape == (CROPS, 2, 2)
    assert 0.98 < cosines.mean() < 0.99999
    assert abs(cosines.mean() - made.meta.fidelity["cosine_mean"]) < 0.01
    subset(store, tmp_path / "part", paths=[store.paths[1], store.paths[4]], crops=3)
    part = open_store(tmp_path / "part")
    row = part.paths.index(store.paths[4])
    np.testing.assert_array_equal(part.targets("small", row, slice(None)), store.targets("small", 4, slice(0, 3)))


def test_large_codes_are_copied_and_recoded_in_pieces(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of tokens may be larger than the memory; here a piece is one row, or one crop."""
    write(tmp_path / "store", teachers(Network()), image_folder, codec="Flat")
    store = open_store(tmp_path / "store")
    whole = recode(store, "SQ8", column="whole-tokens", to="whole-pieces")
    subset(store, tmp_path / "one", crops=4)
    monkeypatch.setattr("fkd_ssl.store.maintain.recode._BLOCK", 100)
    monkeypatch.setattr("fkd_ssl.store.maintain.subset._PIECE", 1)
    pieces = recode(store, "SQ8", column="whole-tokens", to="small-pieces")
    np.testing.assert_array_equal(pieces.shard(0), whole.shard(0))
    subset(store, tmp_path / "two", crops=4, column=["whole-tokens", "whole", "whole-pieces"])
    assert codes(tmp_path / "two") == codes(tmp_path / "one")


def test_a_reader_of_the_documented_format_reads_tokens(image_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "store", teachers(Network()), image_folder)
    spec = importlib.util.spec_from_file_location("plain_reader", Path(__file__).parents[1] / "plain_reader.py")
    assert spec is not None
    assert spec.loader is not None
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    found = plain.read_store(tmp_path / "store")["columns"]["whole-tokens"]
    store = open_store(tmp_path / "store")
    assert found.shape == (24, CROPS, 2, 2, 16)
    for row in range(24):
        np.testing.assert_allclose(found[row], store.targets("whole-tokens", row, slice(None)), rtol=0, atol=1e-6)


def test_a_grid_finer_than_the_map_is_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="4 x 4 positions for crops of 32 x 32 px; a grid of 5 x 5 is too fine"):
        write(tmp_path / "store", teachers(Network(), grid=5), image_folder)
