r"""Effect of our resize on a student: trained and scored on our pixels, and on Pillow's antialiased ones.

    python benchmarks/pixels_student.py --images DIR --val DIR --teacher mocov2 --checkpoint FILE --pixels 64 --out DIR \
        --seeds 3

In the second arm, Pillow's antialiased bilinear resize replaces ours everywhere: in the teacher's crops, in the student's,
and in evaluation. Crops, colours, codec, seeds and schedule are the same. Prints a JSON object. Repeat the command to
continue.
"""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fkd_ssl import cli
from fkd_ssl.arrays import UInt8Array
from fkd_ssl.eval import stats

ARMS = ("ours", "antialiased")
PROBES = ("knn_top1", "linear_top1")


def antialiased(view: UInt8Array, crop: UInt8Array) -> None:
    view[:] = np.asarray(Image.fromarray(crop).resize(view.shape[:2], Image.Resampling.BILINEAR))


def score(run: str, images: str, val: str) -> None:
    """Returns which test images a run's features classify correctly: bool [probes, n]; cached in the run folder."""
    from fkd_ssl.commands import resolve
    from fkd_ssl.eval import knn, logreg
    from fkd_ssl.eval.features import extract_split
    from fkd_ssl.images import scan

    model = resolve.model_of(run)
    split = extract_split(model.features, scan(images), scan(val), pixels=model.pixels, workers=1, progress=False)
    both = [knn.evaluate_features(k=20, **split.common), logreg.evaluate(progress=False, **split.common)]
    whole = Path(run, "new.npy")  # renamed when it is complete
    np.save(whole, np.stack([result["correct"] for result in both]))
    whole.replace(Path(run, "correct.npy"))


def as_arm(arm: str, *command: object) -> None:
    """Runs a command of fkd-ssl, or `score`, with an arm's resize."""
    line = [sys.executable, __file__, "--as", arm, *map(str, command)]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)


def arm_scores(args: argparse.Namespace, arm: str) -> npt.NDArray[np.bool_]:
    """Returns the scores of each seed: bool [seeds, probes, n]."""
    store = args.out / f"store-{arm}"
    weights = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    as_arm(
        arm,
        "precompute",
        "--images",
        args.images,
        "--store",
        store,
        "--teacher",
        args.teacher,
        *weights,
        "--pixels",
        args.pixels,
        "--crops",
        args.crops,
        "--codec",
        "Flat",
    )
    for seed in range(args.seeds):
        run = args.out / f"{arm}-seed{seed}"
        if not (run / "correct.npy").exists():
            as_arm(
                arm,
                "train",
                "--images",
                args.images,
                "--store",
                store,
                "--student",
                args.student,
                "--pixels",
                args.pixels,
                "--epochs",
                args.epochs,
                "--lr",
                args.lr,
                "--warmup_epochs",
                1,
                "--batch_size",
                128,
                "--workers",
                1,
                "--seed",
                seed,
                "--out",
                run,
            )
            as_arm(arm, "score", run, args.images, args.val)
    return np.stack([np.load(args.out / f"{arm}-seed{seed}" / "correct.npy") for seed in range(args.seeds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--student", default="mobilenet_v3_small")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--crops", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    correct = {arm: arm_scores(args, arm) for arm in ARMS}
    table: dict[str, Any] = {"seeds": args.seeds}
    for k, probe in enumerate(PROBES):
        ours, other = (correct[arm][:, k] for arm in ARMS)
        difference, low, high = stats.paired_bootstrap(ours, other)
        means = {arm: round(100 * float(correct[arm][:, k].mean()), 2) for arm in ARMS}
        interval = {"ours_minus_antialiased": round(difference, 2), "low": round(low, 2), "high": round(high, 2)}
        table[probe] = {**means, **interval, "equal": stats.equal(low, high)}
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as"]:
        if sys.argv[2] == "antialiased":
            vars(importlib.import_module("fkd_ssl.crops.replay"))["_resize"] = antialiased
        if sys.argv[3] == "score":
            score(*sys.argv[4:])
        else:
            sys.exit(cli.main(sys.argv[3:]))
    else:
        main()
