"""plan, subset, recode and verify --repair on the command line."""

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PLAN = "plan --images train --teacher own_teacher:make"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


class TestPlan:
    def test_it_says_what_a_store_costs_and_writes_nothing(self, work: Path, call: Any) -> None:
        before = contents(work)
        status, out, _ = call(f"{PLAN} --crops 10")
        assert status == 0
        assert out.startswith("18 images x 10 crops = 180 targets, D = 16; ")
        assert "SQ8           36" in out
        assert "<- --codec" in out
        assert out.endswith("it prints crops per second; this plan is for 180 crops\n")
        assert {name: data for name, data in contents(work).items() if "__pycache__" not in name} == {
            name: data for name, data in before.items() if "__pycache__" not in name
        }

    def test_json_is_consistent(self, work: Path, call: Any) -> None:
        status, out, _ = call(f"{PLAN} --crops 10 --codec SQ4 --limit 7 --json")
        plan = json.loads(out)
        assert (status, plan["images"], plan["targets"], plan["codec"], plan["fits"]) == (0, 7, 70, "SQ4", True)
        assert {codec: size["bytes_per_crop"] for codec, size in plan["codecs"].items()} == {
            "Flat": 84,
            "SQfp16": 52,
            "SQ8": 36,
            "SQ6": 32,
            "SQ4": 28,
            "OPQ16,PQ16x8": 36,
        }

    def test_the_bytes_are_those_that_precompute_writes(self, work: Path, call: Any) -> None:
        plan = json.loads(call(f"{PLAN} --crops 200 --json").out)
        line = "precompute --images train --store new --teacher own_teacher:make --crops 200 --json"
        written = json.loads(call(line).out)
        assert plan["codecs"]["SQ8"]["bytes"] == pytest.approx(written["store_bytes"], rel=0.03)
        assert list(written["stages"]) == ["crops", "join", "transfer", "forward", "write"]
        assert written["teacher_busy"] == pytest.approx(written["stages"]["forward"] / written["seconds"])

    def test_a_number_of_images_and_a_speed_give_hours_and_a_price(self, work: Path, call: Any) -> None:
        line = "plan --count 100000000 --teacher own_teacher:make --crops 10 --crops_per_second 5000 --price 3"
        plan = json.loads(call(f"{line} --json").out)
        assert plan["targets"] == 10**9
        assert plan["codecs"]["SQ8"]["bytes"] == 10**9 * 36 + 10**8 * 100
        assert (plan["hours"], plan["cost"]) == (pytest.approx(55.556, abs=0.001), pytest.approx(166.667, abs=0.001))
        out = call(line).out
        assert out.startswith("100,000,000 images x 10 crops = 1,000,000,000 targets")
        assert "55.6 hours of one process at 5,000 crops per second, which cost 167" in out
        assert json.loads(call(f"{line} --limit 5 --json").out)["images"] == 5
        assert call(f"{line} --limit 0").err.endswith("--limit 0: at least one image is needed\n")

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ("--count 5", "expected --images, or --count instead"),
            ("--price 5", "--price needs --crops_per_second"),
            ("--crops_per_second 0", "--crops_per_second 0.0: must be positive"),
            ("--crops 0", "--crops 0: must be positive"),
            ("--codec SQ9", "codec 'SQ9': not supported"),
            ("--limit 0", "--limit 0: at least one image is needed"),
        ],
    )
    def test_what_is_refused(self, work: Path, call: Any, more: str, said: str) -> None:
        status, _, err = call(f"{PLAN} {more}")
        assert status == 2
        assert said in err

    def test_a_disk_that_is_too_small_is_said(self, work: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 9000, 9000))  # type: ignore[attr-defined]
        status, out, _ = call(f"{PLAN} --crops 10 --codec Flat")
        assert status == 0
        assert "does not fit  <- --codec" in out
        assert "9.0 kB free" in out

    def test_a_codec_that_precompute_will_refuse_is_said(self, work: Path, call: Any) -> None:
        status, out, _ = call(f"{PLAN} --crops 10 --codec PQ4x4")
        assert status == 0
        assert "too few targets  <- --codec" in out
        said = "codec PQ4x4 needs at least 624 targets for its training; there are 160 (one in 9 is held out)"
        assert f"precompute will refuse this: {said}" in out
        line = "precompute --images train --store new --teacher own_teacher:make --crops 10 --codec PQ4x4"
        answer = call(line)
        assert (answer.status, (work / "new").exists()) == (2, False)
        assert said in answer.err


class TestSubset:
    def test_it_copies_and_says_what(self, work: Path, call: Any) -> None:
        before = contents(work / "store")
        (work / "some.txt").write_text("birch/3.png\nash/0.png\n\n")
        status, out, _ = call("subset store --out part --crops 2 --list some.txt")
        assert status == 0
        assert out.startswith("part: 2 images x 2 crops, targets of make; ")
        about = json.loads(call("inspect part --json").out)
        assert (about["images"], about["crops_per_image"]) == (2, 2)
        assert call("verify part --images train --teacher own_teacher:make").status == 0
        assert contents(work / "store") == before
        again = call("subset store --out part --crops 2 --list some.txt --json")
        assert json.loads(again.out) == {
            "store": "part",
            "images": 2,
            "crops_per_image": 2,
            "columns": ["make"],
            "store_bytes": about["bytes"],
        }

    @pytest.mark.parametrize("verb", ["subset ../store", "recode ../store --codec SQ8"])
    def test_into_the_empty_folder_where_one_stands(
        self, work: Path, call: Any, monkeypatch: pytest.MonkeyPatch, verb: str
    ) -> None:
        (work / "new").mkdir()
        monkeypatch.chdir(work / "new")
        status, out, _ = call(f"{verb} --out .")
        monkeypatch.chdir(work)
        assert status == 0
        assert out.startswith("." if "subset" in verb else str(work / "new/targets/make"))
        assert call("verify new").status == 0
        assert not list(work.glob(".unfinished-*"))

    def test_a_list_as_a_mac_writes_it(self, work: Path, call: Any) -> None:
        shutil.copy(work / "train/ash/0.png", work / "train/ash/\u00e4.png")
        assert call("precompute --images train --store fresh --teacher own_teacher:make --crops 2").status == 0
        (work / "some.txt").write_text("ash/a\u0308.png\n", encoding="utf-8")
        assert call("subset fresh --out part --list some.txt").status == 0
        assert (work / "part/images.txt").read_text(encoding="utf-8") == "ash/\u00e4.png\n"

    def test_without_teachers(self, work: Path, call: Any) -> None:
        assert call("precompute --images train --store store --teacher own_teacher:other --crops 4 --codec SQ8").status == 0
        assert json.loads(call("subset store --out part --column other --json").out)["columns"] == ["other"]

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ("--crops 5", "--crops 5: store holds 4 of each image"),
            ("--column mke", "no targets of 'mke'"),
            ("--list none.txt", "--list none.txt: cannot be read"),
            ("--list bad.txt", "lacks 1 of the requested images, for instance 'elm/0.png'"),
        ],
    )
    def test_what_is_refused(self, work: Path, call: Any, more: str, said: str) -> None:
        (work / "bad.txt").write_text("elm/0.png\n")
        status, _, err = call(f"subset store --out part {more}")
        assert status == 2
        assert said in err
        assert not (work / "part").exists()


class TestRecode:
    def test_another_column(self, work: Path, call: Any) -> None:
        before = contents(work / "store")
        status, out, err = call("recode store --codec SQ8")
        assert (status, "discarded" in err) == (0, False)
        assert (
            "store/targets/make-SQ8: make from Flat (64 bytes) to SQ8 (16 bytes); cosine to the source column's targets" in out
        )
        assert {name: data for name, data in contents(work / "store").items() if name in before} == before
        assert "recoded from Flat: information that it discarded cannot be recovered" in call("inspect store").out
        status, out, err = call("recode store --codec SQ4 --column make-SQ8 --to small --json")
        assert json.loads(out)["fidelity"]["source_codec"] == "SQ8"
        assert call("verify store --images train --teacher own_teacher:make --column small").status == 0
        assert "information that SQ8 discarded cannot be recovered" in call("recode store --codec SQ6 --column make-SQ8").err

    def test_into_a_store(self, work: Path, call: Any) -> None:
        assert call("recode store --codec SQ8 --out new").status == 0
        about = json.loads(call("inspect new --json").out)
        assert (list(about["columns"]), about["columns"]["make"]["codec"]) == (["make"], "SQ8")

    def test_what_is_refused(self, work: Path, call: Any) -> None:
        status, _, err = call("recode store --codec SQ8 --to make")
        assert status == 2
        assert "choose another --to or --out" in err


class TestRepair:
    VERIFY = "verify store --images train --teacher own_teacher:make --repair"

    @pytest.mark.parametrize(
        "name", ["crops/00000.npy", "crops/00000.json", "targets/make/codes-00000.npy", "images.txt", "images.npy"]
    )
    def test_a_flipped_bit_is_mended(self, work: Path, call: Any, name: str) -> None:
        before = contents(work / "store")
        flip(work / "store" / name)
        status, out, err = call(self.VERIFY)
        assert status == 0
        assert Path(name).stem in err
        assert out.rstrip().endswith(": 0 problems")
        assert contents(work / "store") == before

    def test_without_the_teacher_it_says_what_it_needs(self, work: Path, call: Any) -> None:
        flip(work / "store/targets/make/codes-00000.npy")
        status, out, _ = call("verify store --repair --json")
        report = json.loads(out)
        assert (status, report["ok"]) == (1, False)
        assert report["damage"] == [{"kind": "codes", "shard": 0, "column": "make"}]
        assert "to make it again, pass --images, --teacher" in report["repaired"][0]

    def test_unasked_nothing_is_touched(self, work: Path, call: Any) -> None:
        flip(work / "store/targets/make/codes-00000.npy")
        before = contents(work / "store")
        assert call("verify store --images train --teacher own_teacher:make").status == 1
        assert contents(work / "store") == before

    def test_what_cannot_be_mended_is_said(self, work: Path, call: Any) -> None:
        flip(work / "store/manifest.json")
        status, _, err = call(self.VERIFY)
        assert status == 1
        assert "manifest.json" in err


class TestShow:
    LINE = "show store --images train --image ash/0.png --crops 3"

    def test_a_sheet_is_drawn(self, work: Path, call: Any) -> None:
        status, out, _ = call(f"{self.LINE.removesuffix('--crops 3')} --neighbours 2 --among 4")
        assert status == 0
        assert out.startswith(
            "sheet.png: ash/0.png: the first 4 of 4 stored crops, each with its nearest crops of 17 other images"
        )
        with Image.open("train/ash/0.png") as image, Image.open("sheet.png") as picture:
            large = round(448 * min(1, image.height / image.width))
            assert (picture.width, picture.height) == (1136, 88 + large + 24 + 4 * (168 + 16 + 6 + 3 * 21) + 8)
        assert call(self.LINE).status == 0  # replaces its own sheet
        Path("sheet.png").write_bytes(edited := Path("sheet.png").read_bytes() + b"edited")
        again = call(self.LINE)
        assert (again.status, "sheet.png: exists and is not an unchanged sheet" in again.err) == (2, True)
        assert Path("sheet.png").read_bytes() == edited

    def test_a_name_in_another_unicode_form_is_found(self, work: Path, call: Any) -> None:
        """macOS stores names in NFD; the store lists them in NFC, and a shell may complete either."""
        decomposed = unicodedata.normalize("NFD", "café.png")
        for path in Path("train").glob("*/0.png"):
            path.rename(path.with_name(decomposed))
        line = "precompute --images train --store other --teacher own_teacher:make --crops 4 --chunk_size 16"
        assert call(line).status == 0
        show = "show other --images train --neighbours 3 --out {}.png --image ash/{}"
        assert call(show.format("nfc", "café.png")).status == 0
        assert call(show.format("nfd", decomposed)).status == 0
        assert Path("nfc.png").read_bytes() == Path("nfd.png").read_bytes()

    def test_without_neighbours_no_teacher_is_needed(self, work: Path, call: Any) -> None:
        shutil.rmtree("store/targets")
        assert call(f"{self.LINE} --neighbours 0 --out other.png").status == 0
        assert "has no targets yet" in call(self.LINE).err

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("--image ash/9.png", "store has no such image; did you mean ash/"),
            ("--crops 5", "crops 5: store holds 4 crops of each image"),
            ("--crops 0", "crops 0: must be between 1 and 24"),
            ("--among 5", "crops 5: store holds 4"),
            ("--column other", "no targets of 'other'"),
            ("--images nowhere", "nowhere: no such folder of images"),
            ("--images val", "val: lacks 1 of the 1 images of store, for instance 'ash/4.png': give the images that the store"),
        ],
    )
    def test_what_is_refused(self, work: Path, call: Any, change: str, message: str) -> None:
        refused = call(f"{self.LINE} {change}")
        assert refused.status in (1, 2)
        assert message in refused.err
        assert not Path("sheet.png").exists()

    def test_an_image_that_was_skipped(self, work: Path, call: Any) -> None:
        Path("train/ash/0.png").write_bytes(b"no picture")
        line = "precompute --images train --store other --teacher own_teacher:make --crops 4 --chunk_size 16"
        assert call(f"{line} --on_unreadable skip").status == 0
        assert "it was skipped" in call(self.LINE.replace("store", "other", 1)).err
