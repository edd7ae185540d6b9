r"""What makes a student good: the objective, the number of stored crops, crops per image in a batch, ReActNet's two steps.

    python benchmarks/students.py EXPERIMENT --images imagenette/train --val imagenette/val --teacher mocov2 \
        --checkpoint mocov2_r18_imagenette.pth.tar --out runs/students

- `rates` comes first, since each objective has its own learning rate: students of 8 epochs on nine tenths of the training
  images, scored on the other tenth. Test images are not used. OUT/rates.json keeps the best by kNN for the other
  experiments.
- `objectives`: each for 30 epochs on the same stored crops.
- `per_image`: M = 1, 2, 4 and 8 crops per image in a batch. An epoch is one crop of every image, so all train equally long.
- `crops`: do stored targets overfit? C = 1, 4, 25 and 100 stored crops per image compared with online, in 100 epochs of
  2,000 images. M is 1 in all arms, since C = 1 allows no more. With C = 100 no crop is used twice.
- `many`: C = 400 compared with online, beyond 400 epochs, on 500 images with one seed.
- `reactnet`: a quarter of the width, from scratch, compared with half the epochs in each of two steps, on the same store.

All students are probed with all training images, including those of `crops` and `many`, which were trained on a part of
them.

Every run is `fkd-ssl train` in a process of its own. Repeat the command to continue. The same command may run several times
at once: each process takes runs that no other one has locked, and prints what is finished; --only selects arms by name. When
all runs are done it prints the whole table. OUT/EXPERIMENT.json also has it, with settings and versions. Seconds are each
run's own wall-clock time: compare them only between runs with the same number of processes beside them.
"""

import argparse
import fcntl
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import learning_rate
import numpy as np
import pixels_student
import two_teachers

from fkd_ssl import files, runs
from fkd_ssl.eval import stats
from fkd_ssl.training.metrics import read_metrics

OBJECTIVES = ("feature_kl", "cosine", "queue_kl", "relational")
PROBES = {"knn_top1": "kNN", "linear_top1": "linear"}
QUEUE = 4096  # of queue_kl, as in configs/imagenette: far fewer than the crops of a training
EPOCHS = {"rates": 8, "objectives": 30, "crops": 100, "many": 500, "per_image": 30, "reactnet": 30}
SUBSET = {"crops": 2000, "many": 500}
REFERENCES = {"objectives": "feature_kl", "crops": "online", "many": "online", "per_image": "M=4", "reactnet": "one step"}
ONE_SEED = ("rates", "many")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of a table: runs that differ only in their seed."""

    name: str
    """Name in the table, for --only and --skip."""
    folder: str
    """Folder of its runs, without the seed. Arms of two experiments share a folder if they are the same run."""
    options: dict[str, Any]
    """Options of train, in addition to those of all students."""
    images: Path
    """Training images."""
    crops: int | None = None
    """C, stored crops per image; None for online training."""
    cut_from: int | None = None
    """C of the larger store that these crops are the first of."""
    start: "Arm | None" = None
    """Arm whose final weights are its initial weights."""


def fitting(args: argparse.Namespace) -> list[str]:
    """Returns the objectives that the teacher supports."""
    return [*OBJECTIVES, *(["prototype_ce"] if args.teacher.startswith("swav") else [])]


def rates(args: argparse.Namespace) -> list[Arm]:
    pairs = [(name, lr) for name in fitting(args) for lr in args.lrs]
    return [student(args, f"{name} {lr:g}", f"rate-{name}-{lr:g}", lr, objective=name) for name, lr in pairs]


def objectives(args: argparse.Namespace) -> list[Arm]:
    return [student(args, name, name, rate(args, name), objective=name) for name in fitting(args)]


def per_image(args: argparse.Namespace) -> list[Arm]:
    lr = rate(args, "feature_kl")
    # four are the objectives' own run
    return [student(args, f"M={m}", "feature_kl" if m == 4 else f"m{m}", lr, m=m) for m in (1, 2, 4, 8)]


def crops(args: argparse.Namespace) -> list[Arm]:
    return [*(part(args, "crops", c, 100) for c in (1, 4, 25, 100)), part(args, "crops", None)]


def many(args: argparse.Namespace) -> list[Arm]:
    return [part(args, "many", 400, 400), part(args, "many", None)]


def reactnet(args: argparse.Namespace) -> list[Arm]:
    lr = args.rate.get("reactnet", 1e-3)
    half = {"epochs": args.epochs / 2}
    # the networks of configs/imagenette/mocov2_reactnet*_stored.yaml
    first = student(args, "first step alone", "reactnet-first", lr, student="reactnet_step1", width=0.25, **half)
    second = student(args, "two steps", "reactnet-two", lr, start=first, student="reactnet", width=0.25, **half)
    return [student(args, "one step", "reactnet-one", lr, student="reactnet", width=0.25), first, second]


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], list[Arm]]] = {
    "rates": rates,
    "objectives": objectives,
    "crops": crops,
    "many": many,
    "per_image": per_image,
    "reactnet": reactnet,
}


def student(
    args: argparse.Namespace,
    name: str,
    folder: str,
    lr: float | None,
    *,
    objective: str = "feature_kl",
    m: int = 4,
    start: Arm | None = None,
    **options: Any,
) -> Arm:
    """Returns an arm on stored crops of all images: as many crops as epochs, if M divides them."""
    expression = f"queue_kl(queue={QUEUE})" if objective == "queue_kl" else objective
    options |= {"objective": expression, "lr": lr, "crops_per_image": m}
    return Arm(name=name, folder=folder, options=options, images=args.images, crops=max(8, math.ceil(args.epochs)), start=start)


def part(args: argparse.Namespace, kind: str, c: int | None, most: int | None = None) -> Arm:
    """Returns an arm on a part of the images with one crop per image in a batch: the first `c` of `stored` crops, or online."""
    groups = sum(path.is_dir() for path in args.images.iterdir())
    name, options = "online" if c is None else f"C={c}", {"lr": rate(args, "feature_kl"), "crops_per_image": 1}
    with lock(args.out / "images.lock", wait=True):
        images = two_teachers.subset(args.images, args.out / f"images-{args.subset}", args.subset // groups)
    return Arm(
        name=name,
        folder=f"{kind}-{'online' if c is None else c}",
        options=options,
        images=images,
        crops=c,
        cut_from=None if c == most else most,
    )


def rate(args: argparse.Namespace, objective: str) -> float | None:
    """Returns an objective's learning rate: given, or found by `rates`; None if unknown, which only a new run needs."""
    found = args.out / "rates.json"
    known = {**(json.loads(found.read_text())["best"] if found.exists() else {}), **args.rate}
    return known.get(objective)


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[int | None]:
    """Returns the descriptor of a lock, None if another process has it. It is released with this process and its children."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            number: int | None = file.fileno()
        except BlockingIOError:
            number = None
        yield number


def run_of(args: argparse.Namespace, arm: Arm, seed: int) -> Path:
    return Path(args.out / f"{arm.folder}-seed{seed}")


def store_of(args: argparse.Namespace, images: Path, c: int, cut_from: int | None = None) -> Path:
    """Returns a store of `c` crops per image; makes it if it is missing, and keeps its cost beside it."""
    store, note, guard = (Path(args.out / f"store-{images.name}-{c}{suffix}") for suffix in ("", ".json", ".lock"))
    whole = None if cut_from is None else store_of(args, images, cut_from)
    with lock(guard, wait=True):
        if note.exists():
            return store
        if whole is not None:
            made = learning_rate.fkd_ssl("subset", whole, "--out", store, "--crops", c, "--json")
        else:
            weights = ["--checkpoint", args.checkpoint] if args.checkpoint else []
            made = learning_rate.fkd_ssl(
                "precompute",
                "--images",
                images,
                "--store",
                store,
                "--teacher",
                args.teacher,
                *weights,
                "--pixels",
                args.pixels,
                "--crops",
                c,
                "--json",
            )
            if json.loads(made)["busy"]:
                sys.exit(f"{store}: another process is writing it; start again when that is done")
        files.replace(note, made.encode())
    return store


def finish(args: argparse.Namespace, arm: Arm, seed: int) -> bool:
    """Trains and scores a run, if needed; returns False if another process is doing so."""
    run = run_of(args, arm, seed)
    if (run / "correct.npy").exists():
        return True
    if arm.start is not None and not finish(args, arm.start, seed):
        return False
    with lock(args.out / f"{run.name}.lock") as number:
        if number is None:
            return False
        if not (run / "results.json").exists():
            # the training inherits the lock, and keeps it if this process is killed
            subprocess.run(training(args, arm, seed), check=True, stdout=sys.stderr, pass_fds=(number,))
        if not (run / "correct.npy").exists():
            print(f"scoring {run}", file=sys.stderr, flush=True)
            pixels_student.score(str(run), str(args.images), str(args.val))
    return True


def training(args: argparse.Namespace, arm: Arm, seed: int) -> list[str]:
    """Returns the command of a run."""
    options = {
        "images": arm.images,
        "student": args.student,
        "pixels": args.pixels,
        "epochs": args.epochs,
        "workers": 1,
        "batch_size": args.batch_size,
        "seed": seed,
        "out": run_of(args, arm, seed),
        **arm.options,
    }
    if options["lr"] is None:
        sys.exit(f"{arm.name}: its learning rate is not known; run `rates` first, or say --rate OBJECTIVE=1e-2")
    options["warmup_epochs"] = min(1, options["epochs"] / 2)
    if arm.crops is None:
        options |= {"targets": "online", "teacher": args.teacher}
        options |= {"checkpoint": args.checkpoint} if args.checkpoint else {}
    else:
        options["store"] = store_of(args, arm.images, arm.crops, arm.cut_from)
    if arm.start is not None:
        options["init"] = run_of(args, arm.start, seed)
        options["seed"] += 100  # another order and first crop than in step 1
    return [sys.executable, "-m", "fkd_ssl", "train", *(str(word) for k, v in options.items() for word in (f"--{k}", v))]


def row(args: argparse.Namespace, arm: Arm, reference: Arm | None) -> dict[str, Any]:
    """Returns an arm's scores, their differences to the reference, and the cost of the training."""
    seeds = range(args.seeds)
    parts = [arm] if arm.start is None else [arm.start, arm]
    results = [[runs.read_results(run_of(args, one, seed)) for one in parts] for seed in seeds]
    seconds = [sum(result["train_seconds"] for result in of_seed) for of_seed in results]
    found: dict[str, Any] = {
        "arm": arm.name,
        "lr": results[0][-1]["config"]["lr"],
        "steps": sum(result["steps"] for result in results[0]),
        "stored": arm.crops,
        "images": results[0][0]["images"],
        "train_seconds": seconds,
        "crops_a_second": sum(r["crops_seen"] for of_seed in results for r in of_seed) / sum(seconds),
        "data_wait": [of_seed[-1]["data_wait"] for of_seed in results],
        "teacher_forwards": sum(result["teacher_forwards"] for result in results[0]),
    }
    here = correct(args, arm)
    for k, probe in enumerate(PROBES):
        found[probe] = (100 * here[:, k].mean(axis=1)).round(2).tolist()
        if reference is not None and arm is not reference:
            gain, low, high = stats.paired_bootstrap(here[:, k], correct(args, reference)[:, k])
            found[f"{probe}_minus"] = {"difference": gain, "low": low, "high": high, "equal": stats.equal(low, high)}
    return found


def correct(args: argparse.Namespace, arm: Arm) -> Any:
    """Returns which images each seed's student classifies correctly: bool [seeds, probes, n]."""
    return np.stack([np.load(run_of(args, arm, seed) / "correct.npy", allow_pickle=False) for seed in range(args.seeds)])


def table(rows: list[dict[str, Any]], reference: str | None) -> str:
    """Returns the rows in Markdown: mean over seeds, and the deviation if there are several."""
    online = any(row["teacher_forwards"] for row in rows)
    head = ["arm", "learning rate"]
    for name in PROBES.values():
        head += [f"{name} top-1", *([f"minus {reference}"] if reference else [])]
    head += ["steps", "training seconds", "crops per second", *(["teacher forwards"] if online else [])]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["arm"], f"{row['lr']:g}"]
        for probe in PROBES:
            cells += [mean(row[probe], 2), *([difference(row.get(f"{probe}_minus"))] if reference else [])]
        cells += [f"{row['steps']:,}", mean(row["train_seconds"], 0), f"{row['crops_a_second']:,.0f}"]
        lines.append([*cells, *([f"{row['teacher_forwards']:,}"] if online else [])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def difference(minus: dict[str, Any] | None) -> str:
    if minus is None:
        return ""
    return f"{minus['difference']:+.2f} ({minus['low']:+.2f} to {minus['high']:+.2f}{', equal' if minus['equal'] else ''})"


def best_rates(rows: list[dict[str, Any]], lrs: list[float]) -> dict[str, Any]:
    """Returns the held-out kNN of every objective and rate, and the best rate of each objective whose rates are done."""
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        objective, lr = row["arm"].split()
        scores.setdefault(objective, {})[lr] = row["knn_top1"][0]
    best = {name: float(max(found, key=found.__getitem__)) for name, found in scores.items() if len(found) == len(lrs)}
    return {"held_out_knn_top1": scores, "best": best}


def plot(args: argparse.Namespace, arms: list[Arm], out: Path) -> None:
    """Plots the loss minus its lower bound against seconds and epochs; a second step continues where the first one ended."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    starts = [arm.start for arm in arms]
    for k, arm in enumerate(arm for arm in arms if arm not in starts):
        for seed in range(args.seeds):
            points, ends = [], (0.0, 0.0)
            for one in [arm] if arm.start is None else [arm.start, arm]:
                lines = [line for line in read_metrics(run_of(args, one, seed) / "metrics.csv") if line["kl"] is not None]
                points += [(ends[0] + (r["seconds"] or 0), ends[1] + (r["epoch"] or 0), r["kl"]) for r in lines]
                ends = points[-1][:2]
            seconds, epochs, kl = zip(*points, strict=True)
            label = arm.name if seed == 0 else None
            for axis, values in zip(axes, (seconds, epochs), strict=True):
                axis.plot(values, kl, label=label, color=f"C{k % 10}", linewidth=1.2, linestyle=("-", "--", ":")[seed % 3])
    axes[0].set(xlabel="seconds of training", ylabel="loss minus its lower bound", yscale="log")
    axes[1].set(xlabel="epochs (one crop of every image)")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def report(args: argparse.Namespace, arms: list[Arm]) -> None:
    """Prints the table of the finished runs, and saves it with its settings."""
    name = REFERENCES.get(args.experiment)
    seeds = range(args.seeds)
    done = [arm for arm in arms if all((run_of(args, arm, seed) / "correct.npy").exists() for seed in seeds)]
    reference = next((arm for arm in done if arm.name == name), None)
    rows = [row(args, arm, reference) for arm in done]
    stores = {
        store.name: json.loads(Path(f"{store}.json").read_text())
        for arm in done
        if arm.crops is not None
        for store in [store_of(args, arm.images, arm.cut_from or arm.crops)]
    }
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    about = {"versions": runs.versions(), "machine": platform.machine(), "asked": asked, "stores": stores}
    files.replace(args.out / f"{args.experiment}.json", (json.dumps({"rows": rows, **about}, indent=1) + "\n").encode())
    if args.experiment == "rates":
        best = best_rates(rows, args.lrs)
        files.replace(args.out / "rates.json", (json.dumps(best, indent=1) + "\n").encode())
        print(json.dumps(best), file=sys.stderr)
    if rows:
        amount = f"{args.epochs:g} epochs of {rows[0]['images']:,} images, batches of {args.batch_size}"
        print(f"{args.experiment}: {amount}, {args.seeds} seed{'s' if args.seeds > 1 else ''}\n")
        print(table(rows, reference.name if reference else None))
    for store, made in stores.items():
        if made["crops"]:  # zero if a killed call had written everything
            print(f"\n{store}: {made['crops']:,} crops in {made['seconds']:.0f} s, {made['store_bytes'] / 1e6:.1f} MB")
    if args.plot and done:
        plot(args, done, args.plot)
    if missing := [arm.name for arm in arms if arm not in done]:
        print(f"not finished: {', '.join(missing)}", file=sys.stderr)


def pair(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--val", required=True, type=Path)
    parser.add_argument("--teacher", required=True, help="a teacher with prototypes (swav) adds prototype_ce to the objectives")
    parser.add_argument("--checkpoint")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds; rates and many always have one")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="ARM", help="patterns of arms, such as 'cosine*' or C=25")
    parser.add_argument("--skip", nargs="+", default=[], metavar="ARM", help="patterns of arms to leave out")
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2], help="learning rates that rates tries")
    parser.add_argument(
        "--rate", nargs="+", type=pair, default=[], metavar="OBJECTIVE=LR", help="learning rates, also reactnet=LR (1e-3)"
    )
    parser.add_argument("--epochs", type=float, help=f"epochs of all arms: {EPOCHS}")
    parser.add_argument("--subset", type=int, help=f"number of images, evenly over the classes: {SUBSET}")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--student", default="mobilenet_v3_small")
    parser.add_argument("--plot", type=Path, help="PNG of the loss curves")
    args = parser.parse_args()
    args.rate = dict(args.rate)
    args.epochs = args.epochs or EPOCHS[args.experiment]
    args.subset = args.subset or SUBSET.get(args.experiment)
    args.seeds = 1 if args.experiment in ONE_SEED else args.seeds
    args.out.mkdir(parents=True, exist_ok=True)
    if args.experiment == "rates":
        with lock(args.out / "images.lock", wait=True):
            args.images, args.val = learning_rate.split(args.images, args.out)
    arms = EXPERIMENTS[args.experiment](args)
    taken = [arm for arm in arms if named(arm, args.only) and not named(arm, args.skip)]
    if not taken:
        parser.error(f"--only, --skip: leave no arm of {', '.join(arm.name for arm in arms)}")
    for seed in range(args.seeds):
        for arm in taken:
            if not finish(args, arm, seed):
                print(f"{run_of(args, arm, seed)}: another lane is at it", file=sys.stderr, flush=True)
    report(args, arms)


def named(arm: Arm, patterns: list[str]) -> bool:
    return any(fnmatch(arm.name, pattern) for pattern in patterns)


if __name__ == "__main__":
    main()
