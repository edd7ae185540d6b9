"""Cost of recording: online training that stores its targets, compared with the same training that does not.

    python benchmarks/recording.py --images DIR --teacher mocov2 --checkpoint FILE --pixels 64 --out DIR --repeats 3

Both are whole commands, in alternation, from start to results.json, so recording's time includes planning the store,
training its codec and writing it. Prints a JSON object: seconds of each, the ratio of the fastest, the seconds outside
the training (which do not grow with its length), the ratio of the fastest seconds in training, and the time of precomputing
the store, which recording saves.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def seconds(*command: str | float | Path) -> float:
    """Returns the wall-clock seconds of a command of fkd-ssl."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fkd_ssl", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--student", default="mobilenet_v3_small")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()

    weights = ["--checkpoint", args.checkpoint] if args.checkpoint else []
    teacher = ["--images", args.images, "--teacher", args.teacher, *weights, "--pixels", args.pixels]
    training = [
        "train",
        *teacher,
        "--targets",
        "online",
        "--student",
        args.student,
        "--epochs",
        args.epochs,
        "--batch_size",
        args.batch_size,
        "--workers",
        args.workers,
    ]
    taken: dict[str, list[float]] = {"online": [], "recorded": []}
    for k in range(args.repeats):
        taken["online"].append(seconds(*training, "--out", args.out / f"online{k}"))
        taken["recorded"].append(seconds(*training, "--record", args.out / f"store{k}", "--out", args.out / f"recorded{k}"))
    crops = 4 * math.ceil(args.epochs / 4)  # the epochs, rounded down to a multiple of crops_per_image
    precompute = seconds("precompute", *teacher, "--crops", crops, "--store", args.out / "precomputed")
    subprocess.run([sys.executable, "-m", "fkd_ssl", "verify", args.out / "store0"], check=True, stdout=subprocess.DEVNULL)
    fastest = {name: min(values) for name, values in taken.items()}
    own = {
        name: [json.loads((args.out / f"{name}{k}" / "results.json").read_text())["train_seconds"] for k in range(args.repeats)]
        for name in taken
    }
    result = {
        "seconds": {name: [round(value, 1) for value in values] for name, values in taken.items()},
        "recorded_over_online": round(fastest["recorded"] / fastest["online"], 4),
        "around_training": {name: round(min(np.subtract(taken[name], own[name])), 1) for name in taken},
        "training_over_online": round(min(own["recorded"]) / min(own["online"]), 4),
        "precompute_over_online": round(precompute / fastest["online"], 4),
        "epochs": args.epochs,
        "crops": crops,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
