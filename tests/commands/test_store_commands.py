"""precompute, inspect and verify, and what they refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fkd_ssl.crops import RECIPES
from fkd_ssl.crops.operations import FLIP
from fkd_ssl.store import open_store

PRECOMPUTE = "precompute --images train --teacher own_teacher:make --crops 4 --codec Flat --chunk_size 16"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestPrecompute:
    def test_it_writes_a_store_and_says_so(self, work: Path, call: Any) -> None:
        status, out, err = call(f"{PRECOMPUTE} --store new")
        assert status == 0
        assert out.startswith("new: 72 crops in ")
        assert "18 images x 4 crops = 72 targets of 'make'" in err
        assert contents(work / "new") == contents(work / "store")

    def test_again_there_is_nothing_to_do(self, work: Path, call: Any) -> None:
        before = contents(work / "store")
        status, out, _ = call(f"{PRECOMPUTE} --store store")
        assert (status, out.split(";")[0]) == (0, "store: nothing to do")
        assert contents(work / "store") == before

    def test_the_scale_of_the_crops(self, work: Path, call: Any) -> None:
        assert call(f"{PRECOMPUTE} --store new --recipe simreg --min_scale 0.3 --max_scale 0.4").status == 0
        store = open_store(work / "new")
        assert store.manifest.recipe == replace(RECIPES["simreg"], scale=(0.3, 0.4))
        records = np.load(work / "new/crops/00000.npy")
        shares = records["height"] * 1.0 * records["width"] / (40 * 44)
        assert (shares > 0.28).all()
        assert (shares < 0.42).all()
        assert set(np.unique(records["flags"])) == {0, FLIP}
        assert call(f"{PRECOMPUTE} --store other --max_scale 0.1").status == 2  # below mocov2's minimum

    def test_json_is_one_object(self, work: Path, call: Any) -> None:
        status, out, _ = call(f"{PRECOMPUTE} --store new --json")
        assert status == 0
        assert json.loads(out)["crops"] == 72
        assert out.count("\n") == 1

    def test_another_teacher_is_another_column(self, work: Path, call: Any) -> None:
        assert call(f"{PRECOMPUTE} --store store --column second".replace(":make", ":other")).status == 0
        assert set(json.loads(call("inspect store --json").out)["columns"]) == {"make", "second"}

    @pytest.mark.parametrize(
        ("line", "status", "said"),
        [
            (f"{PRECOMPUTE} --store new".replace("train", "nowhere"), 2, "nowhere: no such folder of images"),
            (f"{PRECOMPUTE} --store new".replace("train", "empty"), 2, "empty: no images in this folder"),
            (f"{PRECOMPUTE} --store store".replace("train", "val"), 2, "store: was made from other images: it lists 18"),
            (f"{PRECOMPUTE} --store store --seed 1", 2, "its seed is 0, not 1"),
            (f"{PRECOMPUTE} --store store --limit 3", 2, "was made from other images: it lists 18"),
            (f"{PRECOMPUTE} --store thesis", 2, "thesis: holds 'thesis.tex', which is not part of a store"),
            (f"{PRECOMPUTE} --store new --codec SQ9", 2, "codec 'SQ9': not supported"),
            (f"{PRECOMPUTE} --store new --recipe mocov3", 2, "--recipe 'mocov3' is unknown; expected mocov2"),
            (f"{PRECOMPUTE} --store new --column a/b", 2, "a/b"),
            (f"{PRECOMPUTE} --store new".replace("own_teacher:make", "mocov"), 2, "did you mean mocov2?"),
            (f"{PRECOMPUTE} --store new".replace("own_teacher:make", "mocov2"), 2, "--checkpoint is needed"),
            (f"{PRECOMPUTE} --store new".replace(":make", ":mkae"), 2, "own_teacher:mkae"),
            (f"{PRECOMPUTE} --store new".replace(":make", ":broken"), 1, "ValueError: my own mistake"),
        ],
    )
    def test_what_is_refused(self, work: Path, call: Any, line: str, status: int, said: str) -> None:
        (work / "empty").mkdir()
        (work / "thesis").mkdir()
        (work / "thesis" / "thesis.tex").write_text("years of work")
        before = contents(work)
        answer = call(line)
        assert (answer.status, answer.out) == (status, "")
        assert said in answer.err
        after = contents(work)
        assert {name: after[name] for name in before} == before
        assert not (work / "new" / "manifest.json").exists() or "codec" in line or "a/b" in line

    def test_a_checkpoint_of_another_layout_is_refused(self, work: Path, call: Any) -> None:
        import torch

        torch.save({"state_dict": {"encoder_q.conv1.weight": torch.zeros(2)}}, work / "moco.pth")
        torch.save({"model": [1, 2]}, work / "other.pth")
        (work / "text.pth").write_text("no checkpoint")
        for family, name in (("swav", "moco.pth"), ("mocov2", "other.pth"), ("mocov2", "text.pth"), ("mocov2", "none.pth")):
            line = PRECOMPUTE.replace("own_teacher:make", family)
            status, _, err = call(f"{line} --store new --checkpoint {name}")
            assert status == 2
            assert name in err
        assert not (work / "new").exists()

    @pytest.mark.parametrize("data", [b"no picture at all", "torn"])
    def test_a_corrupt_image_stops_or_is_skipped(self, work: Path, call: Any, data: Any) -> None:
        path = work / "train/birch/3.png"
        path.write_bytes(path.read_bytes()[:700] if data == "torn" else data)
        status, out, err = call(f"{PRECOMPUTE} --store new")
        assert (status, out) == (1, "")
        assert "birch/3.png: not a readable image" in err
        assert call(f"{PRECOMPUTE} --store fresh --on_unreadable skip").status == 0
        about = json.loads(call("inspect fresh --json").out)
        assert (about["images"], about["readable"], about["skipped"]) == (18, 17, ["birch/3.png"])
        assert "skipped because they cannot be read: 1, for instance birch/3.png" in call("inspect fresh").out


class TestInspect:
    def test_it_describes(self, work: Path, call: Any) -> None:
        status, out, err = call("inspect store")
        assert (status, err) == (0, "")
        assert out.startswith("store: 18 images x 4 crops, ")
        assert "column make: Network, D = 16, seen at 32 px, fp32" in out
        assert "pixels normalised by mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in out
        assert "codec Flat: 84 bytes per crop with its record" in out

    def test_json(self, work: Path, call: Any) -> None:
        status, out, _ = call("inspect store --json")
        about = json.loads(out)
        assert (status, about["images"], about["readable"], about["crops_per_image"]) == (0, 18, 18, 4)
        assert about["columns"]["make"]["teacher"]["shape"] == [16]
        assert about["columns"]["make"]["missing_shards"] == []
        assert about["bytes"] == sum(len(data) for data in contents(work / "store").values())

    def test_half_a_store_is_said_to_be_one(self, work: Path, call: Any) -> None:
        for path in (work / "store/targets/make").glob("codes-*"):
            path.unlink()
        assert "NOT FINISHED: no targets yet for 1 of 1 shard" in call("inspect store").out

    def test_a_store_without_targets_or_crops_is_said_to_be_unfinished(self, work: Path, call: Any) -> None:
        (work / "store/targets/make").rename(work / "away")
        said = call("inspect store").out
        assert "NOT FINISHED: it has no targets" in said
        assert "the crops of" not in said
        for path in (work / "store/crops").iterdir():
            path.unlink()
        assert "NOT FINISHED: no crops yet for 1 of 1 shard" in call("inspect store").out
        about = json.loads(call("inspect store --json").out)
        assert (about["missing_crops"], about["columns"], about["readable"]) == ([0], {}, 0)

    @pytest.mark.parametrize(("store", "said"), [("nowhere", "no such folder"), ("train", "no manifest.json in it")])
    def test_what_is_no_store(self, work: Path, call: Any, store: str, said: str) -> None:
        status, out, err = call(f"inspect {store}")
        assert (status, out) == (2, "")
        assert f"{store}: not a store ({said})" in err


class TestVerify:
    def test_a_whole_store(self, work: Path, call: Any) -> None:
        status, out, _ = call("verify store --images train --teacher own_teacher:make --sample 16")
        assert status == 0
        assert out.rstrip().endswith(": 0 problems")
        assert "18 images, 16 crops" in out

    def test_json(self, work: Path, call: Any) -> None:
        status, out, _ = call("verify store --images train --teacher own_teacher:make --json")
        report = json.loads(out)
        assert (status, report["ok"], report["problems"]) == (0, True, [])
        assert report["cosine"]["min"] > 0.9999

    def test_a_changed_byte(self, work: Path, call: Any) -> None:
        path = work / "store/targets/make/codes-00000.npy"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
        status, out, _ = call("verify store")
        assert status == 1
        assert "codes-00000.npy: damaged" in out
        report = call("verify store --json")
        assert (report.status, json.loads(report.out)["ok"]) == (1, False)

    def test_another_teacher(self, work: Path, call: Any) -> None:
        status, out, _ = call("verify store --images train --teacher own_teacher:other")
        assert status == 1
        assert "1 problem" in out

    def test_a_changed_image(self, work: Path, call: Any) -> None:
        shutil.copy(work / "train/ash/0.png", work / "train/ash/1.png")
        status, out, _ = call("verify store --images train")
        assert status == 1
        assert "ash/1.png" in out

    @pytest.mark.parametrize(
        ("line", "said"),
        [("verify store --sample 0", "--sample 0"), ("verify store --teacher own_teacher:make", "--teacher needs --images")],
    )
    def test_what_is_refused(self, work: Path, call: Any, line: str, said: str) -> None:
        status, _, err = call(line)
        assert status == 2
        assert said in err
