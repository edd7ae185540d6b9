r"""Two teachers on one set of crops: a store with two columns, and students of A, B and both, by kNN and linear probe.

python benchmarks/two_teachers.py --images imagenette/train --val imagenette/val \
    --a mocov2_r18_imagenette.pth.tar --out runs/two

A is an existing MoCo v2 checkpoint; B is SwAV, which is pretrained first. Every step is a command of fkd-ssl and is printed
before it runs. Repeat the command to continue. Prints the table of docs/results/two_teachers.md and writes table.json.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs" / "imagenette"
# the config's learning rate is B's, chosen by kNN among training images, and both teachers' too; A's by learning_rate.py
ARMS = {
    "A": "--column mocov2 --lr 1e-2",
    "B": "--column swav",
    "A+B": "--column mocov2,swav",
    "B, prototype_ce": "--column swav --objective prototype_ce",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--a", type=Path, required=True, help="teacher A's checkpoint, in MoCo's layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=200, help="number of images per class")
    parser.add_argument("--pretrain", default="", help="further options of SwAV's pretraining, as one argument")
    parser.add_argument("--crops", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    out: Path = args.out
    images = subset(args.images, out / "images", args.per_class)
    say(f"pretrain --config {CONFIGS / 'pretrain_swav_resnet18.yaml'} --images {images} --out {out / 'swav'} {args.pretrain}")
    teachers = {"mocov2": args.a, "swav": out / "swav" / "checkpoint.pth.tar"}
    for family, checkpoint in teachers.items():
        say(
            f"precompute --images {images} --store {out / 'store'} --teacher {family} --checkpoint {checkpoint} --pixels 64 "
            f"--crops {args.crops}"
        )
    scores: dict[str, list[dict[str, float]]] = {}
    for arm, (family, checkpoint) in zip("AB", teachers.items(), strict=True):
        scores[f"teacher {arm}"] = [score(f"teacher:{family}", checkpoint, images, args.val, out / f"teacher_{arm}")]
    seeds = range(args.seeds)
    scores["untrained"] = [score(f"untrained{seed}", None, images, args.val, out / f"untrained-seed{seed}") for seed in seeds]
    for arm, options in ARMS.items():
        runs = [out / f"{arm.replace(', ', '_')}-seed{seed}" for seed in seeds]
        for seed, run in enumerate(runs):
            say(
                f"train --config {CONFIGS / 'two_teachers_mobilenet_v3_small.yaml'} --images {images} --store {out / 'store'} "
                f"--out {run} --seed {seed} {options}"
            )
        scores[f"student of {arm}"] = [score(str(run), None, images, args.val, run) for run in runs]
    (out / "table.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(table(scores, args.seeds))
    print(f"\n{platform.machine()}, Python {platform.python_version()}; versions: results.json of each run")


def subset(source: Path, folder: Path, per_class: int) -> Path:
    """Makes a folder of links to the first images of each class, by name."""
    for group in sorted(path for path in source.iterdir() if path.is_dir()):
        (folder / group.name).mkdir(parents=True, exist_ok=True)
        for file in sorted(group.iterdir())[:per_class]:
            link = folder / group.name / file.name
            if not link.exists():
                link.symlink_to(file.resolve())
    return folder


def say(line: str) -> None:
    """Runs a command of fkd-ssl."""
    print(f"fkd-ssl {line}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "fkd_ssl", *line.split()], stdout=subprocess.DEVNULL, check=True)


def score(name: str, checkpoint: Path | None, images: Path, val: Path, folder: Path) -> dict[str, float]:
    """Returns kNN and linear top-1 in percent at 64 px of a run, a teacher, or the initial student.

    Scores are cached in `folder`, so that no model is scored twice.
    """
    import torch

    from fkd_ssl.commands.resolve import model_of
    from fkd_ssl.eval import knn, logreg
    from fkd_ssl.eval.features import extract_split
    from fkd_ssl.images import scan
    from fkd_ssl.students import Student

    folder.mkdir(exist_ok=True)
    kept = folder / "scores.json"
    if not kept.exists():
        print(f"scoring {name}", file=sys.stderr, flush=True)
        if name.startswith("untrained"):
            torch.manual_seed(int(name.removeprefix("untrained")))
            features = Student("mobilenet_v3_small", 128).eval().features
        else:
            features = model_of(name, None if checkpoint is None else str(checkpoint)).features
        split = extract_split(features, scan(images), scan(val), pixels=64, workers=1, progress=False)
        top1 = {
            "knn": knn.evaluate_features(k=20, **split.common)["top1"],
            "linear": logreg.evaluate(progress=False, **split.common)["top1"],
        }
        kept.write_text(json.dumps(top1) + "\n")
    scores: dict[str, float] = json.loads(kept.read_text())
    return scores


def table(scores: dict[str, list[dict[str, float]]], seeds: int) -> str:
    """Returns the scores in Markdown: mean over seeds, and the deviation if there are several."""
    lines = [f"{seeds} seed{'s' if seeds > 1 else ''}\n", "| model | kNN top-1 | linear top-1 |", "|---|---|---|"]
    for name, runs in scores.items():
        cells = []
        for probe in ("knn", "linear"):
            values = [run[probe] for run in runs]
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{deviation}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
