"""Chooses a student's learning rate on a held-out part of the training images. Test images are not used.

    python benchmarks/learning_rate.py --images DIR --teacher mocov2 --checkpoint FILE --student mobilenet_v3_small \
        --pixels 64 --epochs 10 --lrs 3e-4 1e-3 3e-3 --out DIR

One image in ten, in the order of a hash, is held out. A store is made of the others, a student is trained on it at each
rate, and scored by kNN on the held-out images. Prints one JSON object. Repeat the command to continue.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

from fkd_ssl.images import scan

HELD_OUT = 10  # one image in ten is held out


def split(images: Path, out: Path) -> tuple[Path, Path]:
    """Makes folders of links to nine tenths of the images and to the rest."""
    parts = out / "fit", out / "held_out"
    found = scan(images)
    order = sorted(found.names, key=lambda path: hashlib.blake2b(f"held out\n{path}".encode()).digest())
    for k, path in enumerate(order):
        link = parts[k % HELD_OUT == 0] / path
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((images / path).resolve())
    return parts


def fkd_ssl(*command: str | float | Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", "fkd_ssl", *map(str, command)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--student", default="mobilenet_v3_small")
    parser.add_argument("--objectives", nargs="+", default=["feature_kl"])
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--warmup_epochs", type=float, default=1)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()

    fit, held_out = split(args.images, args.out)
    store = args.out / "store"
    weights = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    fkd_ssl(
        "precompute",
        "--images",
        fit,
        "--store",
        store,
        "--teacher",
        args.teacher,
        *weights,
        "--pixels",
        args.pixels,
        "--crops",
        math.ceil(args.epochs),
    )
    scores: dict[str, dict[str, float]] = {}
    for objective in args.objectives:
        for lr in args.lrs:
            run = args.out / f"{objective}-{lr:g}"
            fkd_ssl(
                "train",
                "--images",
                fit,
                "--store",
                store,
                "--student",
                args.student,
                "--pixels",
                args.pixels,
                "--epochs",
                args.epochs,
                "--batch_size",
                args.batch_size,
                "--objective",
                objective,
                "--lr",
                lr,
                "--warmup_epochs",
                args.warmup_epochs,
                "--workers",
                1,
                "--out",
                run,
            )
            scored = json.loads(fkd_ssl("knn", "--model", run, "--train", fit, "--val", held_out, "--json"))
            scores.setdefault(objective, {})[f"{lr:g}"] = round(scored["top1"], 2)
    best = {objective: max(rates, key=rates.__getitem__) for objective, rates in scores.items()}
    print(json.dumps({"student": args.student, "epochs": args.epochs, "held_out_knn_top1": scores, "best": best}, indent=2))


if __name__ == "__main__":
    main()
