"""Tokens from the command line: every verb on a store with a global column and a column of tokens of one network."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fkd_ssl.crops import replay
from fkd_ssl.images.decoding import read_image
from fkd_ssl.store import open_store
from fkd_ssl.teachers import load_teacher

NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    pixels = 64
    seen = 0

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Conv2d(3, 16, 16, stride=16), nn.Tanh())

    def forward(self, images):
        Net.seen += len(images)
        return self.body(images).mean((2, 3))


def net():
    return Net()


def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 4))
"""
BOTH = "--teacher maps:net,maps:net@tokens --grid 2"


@pytest.fixture
def maps(work: Path) -> Path:
    (work / "maps.py").write_text(NETWORK)
    return work


@pytest.fixture
def store(maps: Path, call: Any) -> Path:
    assert call(f"precompute --images train --store dense {BOTH} --crops 4 --codec SQ8").status == 0
    return maps / "dense"


def test_inspect_verify_and_recode(store: Path, call: Any) -> None:
    found = json.loads(call("inspect dense --json").out)
    columns = (
        {column["name"]: column for column in found["columns"]} if isinstance(found["columns"], list) else found["columns"]
    )
    assert set(columns) == {"net", "net-tokens"}
    assert "2 x 2 tokens, D = 16" in call("inspect dense").out
    answer = call("verify dense --images train --teacher maps:net@tokens")  # takes the grid from the store
    assert answer.status == 0, answer
    assert "0 problems" in answer.out
    small = call("recode dense --column net-tokens --codec SQ4 --to small")
    assert (small.status, "warning: " in small.err) == (0, False), small
    assert "warning: net: in PCA2,SQ8, with 2 bytes per crop, the " in call("recode dense --column net --codec PCA2,SQ8").err
    assert call("verify dense").status == 0


def test_plan_counts_the_bytes_of_all_tokens(maps: Path, call: Any) -> None:
    plan = json.loads(call("plan --images train --teacher maps:net@tokens --grid 4 --crops 10 --codec SQ8 --json").out)
    assert plan["shape"] == "4 x 4 tokens, D = 16"
    assert plan["codecs"]["SQ8"]["bytes_per_crop"] == 16 * 16 + 20
    assert plan["codecs"]["OPQ16,PQ16x8"]["bytes_per_crop"] == 16 * 16 + 20
    refused = call("plan --images train --teacher maps:net,maps:net@tokens --crops 10")
    assert (refused.status, "plan takes one teacher" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "--teacher maps:net@tokens --grid 7",
            "4 x 4 positions for crops of 64 x 64 px; a grid of 7 x 7 is too fine: choose --grid 4",
        ),
        ("--teacher maps:net@tokens", "a grid of 7 x 7 is too fine"),
        ("--teacher maps:net@tokens --grid 4 --pixels 32", "2 x 2 positions for crops of 32 x 32 px"),
        ("--teacher maps:net --grid 4", "--grid 4: no teacher gives tokens (net): name one NAME@tokens"),
        ("--teacher maps:net@tokens@tokens", "teacher maps:net@tokens@tokens: give @tokens once"),
        ("--teacher maps:flat@tokens", "teacher flat: Sequential: has no feature map"),
        ("--teacher maps:net@tokens --grid 4 --codec hard", "codec hard: is not for tokens"),
        ("--teacher maps:net@tokens --grid 4", "codec OPQ16,PQ16x8 needs at least 624 targets for its training; there are "),
    ],
)
def test_wrong_requests_leave_no_store(line: str, said: str, maps: Path, call: Any) -> None:
    answer = call(f"precompute --images train --store new --crops 2 {line}")
    assert answer.status == 2
    assert said in answer.err
    assert not (maps / "new").exists()


def picture(path: Path) -> Any:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB")).astype(int)


def test_show_draws_the_tokens(store: Path, call: Any) -> None:
    line = "show dense --images train --image ash/0.png --crops 2 --neighbours 0"
    assert call(f"{line} --column net --out plain.png").status == 0
    answer = call(f"{line} --column net-tokens --out tokens.png")
    assert answer.status == 0
    assert "their tokens in colours" in answer.out
    plain, tokens = picture(store.parent / "plain.png"), picture(store.parent / "tokens.png")
    assert tokens.shape != plain.shape or np.abs(tokens - plain).mean() > 1
    answer = call(f"{line} --column net --model runs/x --out other.png")
    assert answer.status == 2
    assert "is only for columns of tokens, and net has D = 16" in answer.err


def test_show_draws_a_students_tokens_beside_them(store: Path, call: Any) -> None:
    train = "train --images train --store dense --column net-tokens --student resnet18 --pixels 64 --epochs 1"
    answer = call(f"{train} --crops_per_image 2 --batch_size 12 --workers 0 --out run")
    assert answer.status == 0, answer
    line = "show dense --images train --image ash/0.png --crops 2 --neighbours 0 --column net-tokens"
    assert call(f"{line} --out alone.png").status == 0
    assert call(f"{line} --model run --out beside.png").status == 0
    alone, beside = picture(store.parent / "alone.png"), picture(store.parent / "beside.png")
    third = slice(24 + 2 * 184, 24 + 2 * 184 + 168)  # right of the crop and its stored tokens
    assert (alone[-200:-60, third] == 255).all()
    assert beside[-200:-60, third].mean() < 250


def test_online_global_targets_and_tokens_need_one_forward_pass(maps: Path, call: Any) -> None:
    line = f"train --images train --targets online {BOTH} --student resnet18 --pixels 64 --epochs 2 --crops_per_image 2"
    before = sys.modules["maps"].Net.seen if "maps" in sys.modules else 0
    answer = call(f"{line} --batch_size 12 --workers 0 --out run")
    assert answer.status == 0, answer
    results = json.loads((maps / "run" / "results.json").read_text())
    assert results["crops_seen"] == results["teacher_forwards"] == 36
    assert sys.modules["maps"].Net.seen - before <= 36 + 12  # and a few when the teachers are loaded


def test_precompute_runs_a_network_that_is_named_twice_once(maps: Path, call: Any) -> None:
    """The sample of each codec is all of these crops."""
    line = "precompute --images train --crops 4 --codec SQ8 --chunk_size 12"
    assert call(f"{line} --store both {BOTH}").status == 0
    seen = sys.modules["maps"].Net.seen
    assert call(f"{line} --store again {BOTH}").status == 0
    both = sys.modules["maps"].Net.seen - seen
    seen = sys.modules["maps"].Net.seen
    assert call(f"{line} --store again --teacher maps:net --column other").status == 0
    assert both - 3 * 72 < 12
    assert 2 * 72 <= sys.modules["maps"].Net.seen - seen < 2 * 72 + 12


def test_recorded_tokens_are_those_of_precompute(maps: Path, call: Any) -> None:
    line = f"train --images train --targets online {BOTH} --student resnet18 --pixels 64 --epochs 2 --crops_per_image 2"
    answer = call(f"{line} --batch_size 12 --workers 0 --out run --record recorded --codec SQ8 --seed 0")
    assert answer.status == 0, answer
    answer = call("verify recorded --images train --teacher maps:net@tokens --column net-tokens")
    assert answer.status == 0, answer


def test_subset_repair_extend_publish_and_pull(maps: Path, call: Any) -> None:
    """The tokens of a trained codec survive each verb, and a row that is added has the teacher's."""
    line = f"precompute {BOTH} --images some --store dense --crops 4 --codec PCA8,SQ8"
    shutil.copytree("train", "some")
    late = Path("some/birch/5.png")
    late.rename("late.png")
    assert call(line).status == 0
    before = tokens_of("dense")
    Path("late.png").rename(late)
    answer = call(f"{line} --extend --grid 4".replace("--grid 2 ", ""))
    assert (answer.status, "this column's" in answer.err) == (2, True), answer.err
    assert call(f"{line} --extend").status == 0
    whole = tokens_of("dense")
    assert all(np.array_equal(whole[name], values) for name, values in before.items())
    assert whole.keys() - before.keys() == {"birch/5.png"}
    check = "--images some --teacher maps:net@tokens --column net-tokens"
    assert call(f"verify dense {check}").status == 0  # also embeds crops of the new row
    codes = next(Path("dense/targets/net-tokens").glob("codes-*.npy"))
    data = bytearray(codes.read_bytes())
    data[-1] ^= 1
    codes.write_bytes(data)
    assert call("verify dense").status == 1
    assert call(f"verify dense {check} --repair").status == 0
    assert call("publish dense web").status == 0
    assert call("pull web --out pulled --column net-tokens --crops 3").status == 0
    assert call("subset dense --out part --column net-tokens --crops 3").status == 0
    for name, crops in (("dense", 4), ("pulled", 3), ("part", 3)):
        found = tokens_of(name)
        assert found.keys() == whole.keys()
        assert all(np.array_equal(found[key], values[:crops]) for key, values in whole.items())
    store, teacher = open_store("dense"), load_teacher("maps:net@tokens", grid=2)
    record = store.crops(list(store.paths).index("birch/5.png"), slice(None))
    crops = torch.from_numpy(replay(read_image(late), record, 64))
    assert (teacher.embed(crops).numpy() * whole["birch/5.png"]).sum(axis=-1).min() > 0.9


def tokens_of(folder: str) -> dict[str, Any]:
    """The decoded tokens [C, 2, 2, 16] of each image."""
    store = open_store(folder)
    return {name: store.targets("net-tokens", row, slice(None)) for row, name in enumerate(store.paths)}
