"""Peak memory of precompute and of train at two sizes of the image set, which must not grow with the number of images.

    python benchmarks/memory.py --images DIR --teacher mocov2 --checkpoint FILE --pixels 64 --sizes 1000 7000

Each measurement runs in a process of its own. Training takes 60 steps at each size, so that only the set differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def peak(*command: str) -> int:
    """Returns the peak resident memory in bytes of a command, without its workers."""
    process = subprocess.Popen([sys.executable, "-m", "fkd_ssl", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--student", default="mobilenet_v3_small")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--crops", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs=2, default=(1000, 7000))
    args = parser.parse_args()
    teacher = ["--teacher", args.teacher, *(["--checkpoint", args.checkpoint] if args.checkpoint else [])]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            store, common = str(Path(folder) / f"store{size}"), ["--images", args.images, "--pixels", str(args.pixels)]
            precompute = peak(
                "precompute", *common, "--store", store, *teacher, "--crops", str(args.crops), "--limit", str(size)
            )
            out, epochs = str(Path(folder) / f"run{size}"), str(60 * 128 / size)
            train = peak(
                "train",
                *common,
                "--store",
                store,
                "--out",
                out,
                "--student",
                args.student,
                "--epochs",
                epochs,
                "--batch_size",
                "128",
                "--lr",
                "1e-3",
            )
            rows[size] = {"precompute_megabytes": round(precompute / 1e6), "train_megabytes": round(train / 1e6)}
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
