"""From unlabelled images to a student of a teacher with prototypes."""

import json
from pathlib import Path
from typing import Any

import pytest

PRETRAIN = (
    "pretrain --method swav --images train --out teacher --epochs 2 --batch_size 9 --pixels 32 --small_crops 1 "
    "--prototypes 10 --queue 9 --queue_epoch 1 --workers 0"
)


@pytest.mark.filterwarnings("ignore:queue 9")
def test_a_store_with_prototypes_is_made_entirely_here(work: Path, call: Any, train_line: str) -> None:
    status, out, _ = call(PRETRAIN)
    assert status == 0
    assert out == "teacher/checkpoint.pth.tar: pass it as --teacher swav --checkpoint teacher/checkpoint.pth.tar\n"
    made = "--teacher swav --checkpoint teacher/checkpoint.pth.tar"
    assert call(f"precompute --images train --store store {made} --crops 4 --pixels 32 --chunk_size 16").status == 0
    both = f"{train_line} --column make,swav"
    assert call(f"{both} --out both").status == 0
    assert call(f"{train_line} --out run --column swav --objective prototype_ce").status == 0
    assert json.loads((work / "run/results.json").read_text())["config"]["objective"] == "prototype_ce"
    status, _, err = call(f"{PRETRAIN} --prototypes 11")
    assert status == 2
    assert "another config (prototypes is 10 there, 11 here)" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--momentum 0.9", "swav has no such option; it belongs to mocov2"),
        ("--method mocov3", "mocov3"),
        ("--queue -1", "queue -1"),
    ],
)
def test_what_does_not_go_together_is_refused(work: Path, call: Any, options: str, said: str) -> None:
    answer = call(f"{PRETRAIN} {options}")
    assert (answer.status, answer.out) == (2, "")
    assert said in answer.err
    assert not (work / "teacher").exists()


@pytest.mark.filterwarnings("ignore:queue 9")
@pytest.mark.parametrize("method", ["swav", "mocov2"])
def test_damaged_images_stop_or_are_replaced_and_counted(work: Path, call: Any, method: str) -> None:
    moco = "pretrain --images train --out teacher --batch_size 9 --pixels 32 --queue 9 --workers 0"
    line = PRETRAIN if method == "swav" else moco
    Path("train/birch/3.png").write_bytes(b"no picture")
    stopped = call(f"{line} --epochs 2")
    assert stopped.status == 1
    advice = "remove it or pass --on_unreadable skip"
    assert f"train/birch/3.png: not a readable image: unknown image format; {advice}" in stopped.err
    skipped = call(f"{line} --epochs 2 --on_unreadable skip")
    assert skipped.status == 0, skipped.err
    assert skipped.err.count("warning: train/birch/3.png: not a readable image: unknown image format; skipped") == 1
    assert "warning: skipped 1 unreadable image" in skipped.err
    assert json.loads(Path("teacher/results.json").read_text())["unreadable_images"] == 1
