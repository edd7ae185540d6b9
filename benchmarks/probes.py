"""Probes on cached features compared with the published ones on random crops: accuracy and time on one model.

    python benchmarks/probes.py --images DIR --val DIR --model teacher:mocov2 --checkpoint FILE --pixels 64 --out DIR

Every protocol runs as `fkd-ssl linear` in a process of its own, from image files to accuracy, so the time of sweep and
logreg includes computing the features. With --together, the protocols on crops share one pass, and the time of each is that
of the whole pass. The reference is --reference; differences to it are in top-1 points, with the 90 % interval of the paired
bootstrap. Finished parts are not run again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from fkd_ssl.commands.results import read_array
from fkd_ssl.eval import stats

ON_FEATURES = ("sweep", "logreg")
PROTOCOLS = ("simclr", "moco", "swav", "simsiam", *ON_FEATURES)


def score(protocols: list[str], out: Path, args: argparse.Namespace) -> float:
    """Runs protocols in one process; returns its seconds."""
    protocol = ",".join(protocols)
    took = args.out / f"{protocol}.seconds"
    command = [sys.executable, "-m", "fkd_ssl", "linear", "--protocol", protocol, "--model", args.model, "--train"]
    command += [args.images, "--val", args.val, "--workers", str(args.workers), "--out", str(out)]
    command += [] if args.checkpoint is None else ["--checkpoint", args.checkpoint]
    command += [] if args.pixels is None else ["--pixels", str(args.pixels)]
    if args.epochs is not None and protocols[0] not in ON_FEATURES:
        command += ["--epochs", str(args.epochs)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if not took.exists():
        took.write_text(str(time.perf_counter() - started))
    return float(took.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--reference", default="simclr", choices=PROTOCOLS, help="protocol that the others are compared with")
    parser.add_argument("--epochs", type=int, help="epochs of the probes on crops, for a trial run")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys([args.reference, *args.protocols]))
    together = [name for name in names if args.together and name not in ON_FEATURES]
    seconds = dict.fromkeys(together, score(together, args.out, args)) if len(together) > 1 else {}
    seconds |= {name: score([name], args.out / name, args) for name in names if name not in seconds}
    print(f"| protocol | top-1 | minus {args.reference} (90 % interval) | seconds | times as fast as {args.reference} |")
    print("|---|---|---|---|---|")
    for name in names:
        top1 = json.loads((args.out / name / "results.json").read_text())["top1"]
        gain, low, high = stats.paired_bootstrap(read_array(args.out / name), read_array(args.out / args.reference))
        speed = seconds[args.reference] / seconds[name]
        print(f"| {name} | {top1:.2f} | {gain:+.2f} ({low:+.2f} to {high:+.2f}) | {seconds[name]:.1f} | {speed:.1f} |")


if __name__ == "__main__":
    main()
