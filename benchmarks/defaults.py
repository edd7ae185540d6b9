r"""Students of train's own defaults beside those of S2-BNN's options, on small sets of images.

    python benchmarks/defaults.py imagenette tiny100 imagenette:100 --epochs 30 5 30 --crops 16 4 16 --teacher mocov2 \
        --checkpoint mocov2_r18_imagenette.pth.tar --pixels 64 --out runs/defaults

A set is a folder with `train` and `val`; FOLDER:N uses the first N training images of each class. Every set has its own epochs
and stored crops per image. One student of each seed is trained with batch_size, lr and warmup_epochs left out, and one with
S2-BNN's 256, 3e-4 and 0, which `train` uses for large sets. All are scored by kNN. Prints a table. To continue after a kill, or
to add seeds, run it again.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from learning_rate import fkd_ssl

from fkd_ssl.images import scan

ARMS: dict[str, list[str | float]] = {
    "defaults": [],
    "s2bnn": ["--batch_size", 256, "--lr", 3e-4, "--warmup_epochs", 0],
}


def first_of_each_class(train: Path, count: int, out: Path) -> Path:
    """A folder of links to the first images of each class."""
    seen: dict[str, int] = {}
    for name in sorted(scan(train).names):
        label = name.split("/")[0]
        seen[label] = seen.get(label, 0) + 1
        link = out / name
        if seen[label] <= count and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((train / name).resolve())
    return out


def results_of(run: Path, *command: str | float | Path) -> dict[str, Any]:
    """The results.json of a run, which is started unless it is done."""
    if not (run / "results.json").exists():
        fkd_ssl(*command, "--out", run)
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    return results


def rows_of(args: argparse.Namespace, spec: str, epochs: float, crops: int) -> list[str]:
    """The table's rows of one set."""
    folder, _, count = spec.partition(":")
    out = args.out / Path(folder).name / (f"first-{count}" if count else "all")
    train, val = Path(folder) / "train", Path(folder) / "val"
    if count:
        train = first_of_each_class(train, int(count), out / "train")
    weights = ["--teacher", args.teacher, *(["--checkpoint", args.checkpoint] if args.checkpoint else [])]
    fkd_ssl("precompute", "--images", train, "--store", out / "store", "--crops", crops, "--pixels", args.pixels, *weights)
    images = len(scan(train))
    rows = []
    for arm, options in ARMS.items():
        runs = []
        for seed in range(args.seeds):
            command: list[Any] = ["train", "--images", train, "--store", out / "store", "--val", val, "--knn_every", epochs]
            command += ["--student", args.student, "--epochs", epochs, "--workers", args.workers, "--seed", seed, *options]
            runs.append(results_of(out / f"{arm}-seed{seed}", *command))
        config, scores = runs[0]["config"], [run["knn_top1"] for run in runs]
        deviation = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        cells = [f"{Path(folder).name}, {images:,} images, {epochs:g} epochs", arm]
        cells += [f"{config['batch_size']}, {config['lr']:g}, {config['warmup_epochs']:.2g}", f"{runs[0]['steps']:,}"]
        cells += [f"{statistics.mean(scores):.2f}{deviation}", f"{statistics.mean(r['train_seconds'] for r in runs):.0f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help="folders with train and val, each with :N for the first N images of a class")
    parser.add_argument("--epochs", nargs="+", type=float, default=[30], help="of each set, or one number for all")
    parser.add_argument("--crops", nargs="+", type=int, default=[16], help="stored crops per image, likewise")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--student", default="mobilenet_v3_small")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()

    print(
        "| set | options | batch size, lr, warm-up epochs | steps | kNN top-1 | training seconds |\n|---|---|---|---|---|---|"
    )
    for k, spec in enumerate(args.sets):
        print("\n".join(rows_of(args, spec, args.epochs[k % len(args.epochs)], args.crops[k % len(args.crops)])), flush=True)


if __name__ == "__main__":
    main()
