"""Processor time, page faults and peak memory of commands on a CPU, with the library's settings of glibc's malloc and without.

    OMP_NUM_THREADS=1 python benchmarks/malloc.py --images DIR

The networks have random weights. Each command runs in a process of its own, including its start; processor time hardly depends
on other work of the machine. Linux with glibc only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

import timm
import torch

DEFAULTS = {"MALLOC_PERTURB_": "0"}  # changes nothing itself, but any variable of malloc switches the library's settings off


def measure(command: list[str], variables: dict[str, str]) -> dict[str, float]:
    """Runs a command, with its workers. The peak memory is that of its largest process."""
    environment = {**os.environ, **variables}
    process = subprocess.Popen([sys.executable, "-m", "fkd_ssl", *command], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return {
        "user_seconds": round(usage.ru_utime, 1),
        "system_seconds": round(usage.ru_stime, 1),
        "page_faults": usage.ru_minflt,
        "peak_megabytes": round(usage.ru_maxrss * 1024 / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--teacher", default="tf_efficientnet_lite2", help="a model of timm")
    parser.add_argument("--student", default="mobilenet_v3_small")
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--crops", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30, help="of training, with batches of 128 crops")
    works = ["precompute", "features", "train_stored", "train_online", "with_workers"]
    parser.add_argument("--works", nargs="+", default=works)
    args = parser.parse_args()

    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, store = f"{folder}/teacher.pth", f"{folder}/store"
        torch.manual_seed(0)
        torch.save(timm.create_model(args.teacher).state_dict(), checkpoint)
        data = ["--images", args.images, "--pixels", str(args.pixels)]
        teacher = ["--teacher", f"timm/{args.teacher}", "--checkpoint", checkpoint]
        epochs = str(args.steps * 128 / args.limit)
        train = ["train", *data, "--student", args.student, "--batch_size", "128", "--epochs", epochs]
        commands = {
            "precompute": ["precompute", *data, *teacher, "--limit", str(args.limit), "--crops", str(args.crops)],
            "features": ["features", *data, "--model", f"timm/{args.teacher}", "--checkpoint", checkpoint, "--workers", "0"],
            "train_stored": [*train, "--store", store, "--workers", "0"],
            "train_online": [*train, *teacher, "--targets", "online", "--store", store, "--workers", "0"],
            "with_workers": [*train, "--store", store, "--workers", "1"],
        }
        subprocess.run(
            [sys.executable, "-m", "fkd_ssl", *commands["precompute"], "--store", store], check=True, stdout=subprocess.DEVNULL
        )  # for the trainings; unmeasured
        for work in args.works:
            out = {"precompute": "--store", "features": "--features"}.get(work, "--out")
            modes = {"glibc": DEFAULTS, "library": {}}
            row = {mode: measure([*commands[work], out, f"{folder}/{work}-{mode}"], modes[mode]) for mode in modes}
            seconds = {mode: row[mode]["user_seconds"] + row[mode]["system_seconds"] for mode in modes}
            rows[work] = {
                **row,
                "speedup": round(seconds["glibc"] / seconds["library"], 2),
                "peak_ratio": round(row["library"]["peak_megabytes"] / row["glibc"]["peak_megabytes"], 2),
            }
            print(json.dumps({work: rows[work]}), file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
