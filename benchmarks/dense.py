r"""Dense targets: students of one vector per crop, of a grid of tokens, and of both, by linear segmentation of CamVid.

    python examples/strong_teacher.py lite2.pth
    python benchmarks/dense.py --camvid camvid --imagenette imagenette --checkpoint lite2.pth --work runs/dense \
        --page docs/results/dense.md

The teacher is EfficientNet-Lite2, trained on ImageNet with labels. Students start from random weights and see the CamVid and
imagenette images without masks and labels. Then a linear layer is trained on the frozen map of each model with the masks of
CamVid's training images, and tested on CamVid's test images.

Every step is a command of fkd-ssl in a process of its own; finished ones are not repeated. --jobs N stops after N unfinished
ones. --page writes the page from what is finished; with --jobs 0, nothing is run.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import two_teachers

from fkd_ssl import runs

TEACHER, NAME = "timm/tf_efficientnet_lite2", "tf_efficientnet_lite2"
TOKENS = f"{NAME}-tokens"
COLUMNS = {"global": (NAME,), "dense": (TOKENS,), "both": (NAME, TOKENS)}
CODECS = ("Flat", "SQ8", "SQ4", "PCAR256,SQ8", "OPQ16_256,PQ16x8", "OPQ8_256,PQ8x8")
USED = "OPQ16_256,PQ16x8"
SHORT = {"mobilenet_v3_small": "MobileNetV3-Small", "timm/vit_tiny_patch16_224": "ViT-Tiny"}
# the same for every arm of a student
OPTIONS = {
    "mobilenet_v3_small": "--optimizer adam --lr 2e-3",
    "timm/vit_tiny_patch16_224": "--optimizer adamw --lr 1e-3 --weight_decay 0.05 --clip 1 --warmup_epochs 2",
}
OBJECTIVE = {"global": "cosine", "dense": "token_cosine", "both": "cosine+token_cosine"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student."""

    student: str
    arm: str
    seed: int
    source: str = "stored"
    codec: str = USED
    crops: int = 0
    """Stored crops per image, in a store of its own; 0 for `--crops`."""

    @property
    def name(self) -> str:
        """The name of its folders."""
        words = [SHORT[self.student], self.arm, self.source, *([] if self.codec == USED else [self.codec])]
        words += [*([f"C{self.crops}"] if self.crops else []), f"seed{self.seed}"]
        return "-".join(words).replace(",", "_")


def all_runs(seeds: int, more_crops: int = 0) -> list[Run]:
    """The runs, the most important ones first."""
    small, vit = SHORT
    arms = list(COLUMNS)
    codecs = [codec for codec in CODECS if codec != USED]
    found = [Run(student=small, arm=arm, seed=seed) for seed in range(seeds) for arm in arms]
    found += [Run(student=small, arm="dense", seed=seed, codec="Flat") for seed in range(seeds)]
    found += [Run(student=small, arm="dense", seed=0, source="online")]
    found += [Run(student=vit, arm=arm, seed=0) for arm in ("dense", "global", "both")]
    found += [Run(student=small, arm=arm, seed=0, source="online") for arm in ("global", "both")]
    found += [Run(student=small, arm="dense", seed=0, codec=codec) for codec in codecs[1:]]
    found += [Run(student=small, arm=arm, seed=seed, source="online") for seed in range(1, seeds) for arm in arms]
    more = [Run(student=small, arm=arm, seed=seed, codec="SQ8", crops=more_crops) for seed in range(seeds) for arm in arms]
    found += more if more_crops else []
    found += [Run(student=vit, arm=arm, seed=seed) for seed in range(1, seeds) for arm in arms]
    return found + [Run(student=vit, arm=arm, seed=seed, source="online") for seed in range(seeds) for arm in arms]


class Bench:
    """The experiment in a folder of work."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work
        self.left: int = args.jobs

    def say(self, note: Path, line: str) -> None:
        """Runs a command of fkd-ssl if its JSON `note` is missing. Ends the script if no job is left."""
        if note.exists():
            return
        if self.left == 0:
            raise StopIteration
        self.left -= 1
        print(f"{time.strftime('%H:%M:%S')} fkd-ssl {line}", file=sys.stderr, flush=True)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "fkd_ssl", *line.split()], stdout=subprocess.PIPE, text=True, check=True)
        values = json.loads(done.stdout) if "--json" in line else {}
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"command": line, "seconds": time.perf_counter() - started, **values}, indent=1) + "\n")

    def images(self) -> Path:
        """A folder of links to CamVid's training images, and to the first images of each class of imagenette."""
        folder = self.work / "images"
        two_teachers.subset(self.args.imagenette / "train", folder, self.args.per_class)
        (folder / "camvid").mkdir(exist_ok=True)
        for file in (self.args.camvid / "train" / "images").iterdir():
            link = folder / "camvid" / file.name
            if not link.exists():
                link.symlink_to(file.resolve())
        return folder

    def store(self, codec: str, crops: int = 0) -> tuple[Path, str]:
        """The store, and its column of tokens in a codec. One of another number of crops has both columns in that codec."""
        a, store = self.args, self.work / (f"store-C{crops}" if crops else "store")
        self.say(
            store.with_suffix(".json"),
            f"precompute --images {self.images()} --store {store} --teacher {TEACHER},{TEACHER}@tokens "
            f"--checkpoint {a.checkpoint},{a.checkpoint} --grid 7 --codec {codec if crops else 'Flat'} "
            f"--crops {crops or a.crops} --pixels {a.teacher_pixels} --recipe {a.recipe} --json",
        )
        if crops or codec == "Flat":
            return store, TOKENS
        column = codec.replace(",", "_")
        self.say(self.work / f"{column}.json", f"recode {store} --column {TOKENS} --codec {codec} --to {column} --json")
        return store, column

    def train(self, run: Run) -> None:
        """Trains and scores a student."""
        a, out = self.args, self.work / "runs" / run.name
        store, tokens = self.store(run.codec, run.crops)
        names = [tokens if column == TOKENS else column for column in COLUMNS[run.arm]]
        if run.source == "stored":
            targets = f"--store {store} --column {','.join(names)}"
        else:
            teachers = {NAME: TEACHER, TOKENS: f"{TEACHER}@tokens"}
            named = ",".join(teachers[column] for column in COLUMNS[run.arm])
            files = ",".join([str(a.checkpoint)] * len(names))
            grid = "" if run.arm == "global" else "--grid 7"
            targets = (
                f"--targets online --teacher {named} --checkpoint {files} {grid} --teacher_pixels {a.teacher_pixels} "
                f"--recipe {a.recipe}"
            )
        self.say(
            self.work / "trained" / f"{run.name}.json",
            f"train --images {self.images()} {targets} --student {run.student} --objective {OBJECTIVE[run.arm]} "
            f"{OPTIONS[run.student]} --epochs {a.epochs} --batch_size 32 --crops_per_image 2 --pixels {a.pixels} "
            f"--workers 1 --seed {run.seed} --out {out}",
        )
        self.segment(run.name, str(out))

    def segment(self, name: str, model: str, more: str = "") -> None:
        """Scores a model."""
        camvid = self.args.camvid
        train, val = (f"{camvid / part / 'images'},{camvid / part / 'masks'}" for part in ("train", "test"))
        self.say(
            self.work / "segmented" / f"{name}.json",
            f"segment --model {model} {more} --train {train} --val {val} --classes 11 --ignore 11 "
            f"--pixels {self.args.eval_pixels} --workers 1 --json",
        )

    def untrained(self, student: str, seed: int) -> None:
        """Scores a student with its initial weights."""
        import torch

        from fkd_ssl.students import Student
        from fkd_ssl.students.export import export

        name = f"{SHORT[student]}-untrained-seed{seed}"
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            torch.manual_seed(seed)
            export(Student(student, 2).eval(), path, layout=None, pixels=self.args.pixels)
        self.segment(name, str(path))

    def run(self) -> None:
        """Runs the unfinished steps."""
        self.store(USED)
        self.segment("teacher", f"teacher:{TEACHER}", f"--checkpoint {self.args.checkpoint}")
        started = set()
        for run in all_runs(self.args.seeds, self.args.more_crops):
            if run.student not in started:
                self.untrained(run.student, 0)
                started.add(run.student)
            self.train(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, required=True, help="folder with train and test, each with images and masks")
    parser.add_argument("--imagenette", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights of EfficientNet-Lite2")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=63, help="imagenette images per class")
    parser.add_argument("--crops", type=int, default=8, help="stored crops per image")
    parser.add_argument(
        "--more-crops", type=int, default=0, help="also train on a store with this number of crops per image, in SQ8"
    )
    parser.add_argument("--recipe", default="simreg")
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--teacher-pixels", type=int, default=224)
    parser.add_argument("--eval-pixels", type=int, default=352)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=-1, help="maximum number of unfinished commands to run")
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    try:
        bench.run()
    except StopIteration:
        print("stopped: repeat the command to continue", file=sys.stderr)
    if args.page is not None:
        args.page.write_text(page(args))


def values(work: Path, folder: str, name: str) -> dict[str, Any] | None:
    """The JSON of a finished command."""
    path = work / folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def mean(numbers: list[float]) -> str:
    """The mean, and the deviation if there are several."""
    deviation = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.1f}{deviation}"


def row(work: Path, what: list[str], names: list[str], *, size: str = "") -> str | None:
    """Returns a row of the table, the mean over the finished runs with these names; None if no run is finished."""
    scores = [found for name in names if (found := values(work, "segmented", name)) is not None]
    if not scores:
        return None
    trained = [runs.read_results(work / "runs" / name) for name in names if (work / "runs" / name / "results.json").exists()]
    seconds = f"{statistics.mean(run['train_seconds'] for run in trained):,.0f}" if trained else ""
    cells = [mean([score[key] for score in scores]) for key in ("miou", "knn_miou", "pixel_accuracy")]
    return f"| {' | '.join([*what, *cells, size, seconds, str(len(scores))])} |"


def page(args: argparse.Namespace) -> str:
    """The page of results."""
    work: Path = args.work
    head = ["model", "targets", "", "mIoU", "kNN mIoU", "pixel accuracy", "bytes per crop", "seconds", "seeds"]
    lines = [row(work, ["EfficientNet-Lite2", "(the teacher)", ""], ["teacher"])]
    sizes = code_sizes(work / "store")
    more = {f"stored, {args.more_crops} crops": {"codec": "SQ8", "crops": args.more_crops}} if args.more_crops else {}
    sources: dict[str, dict[str, Any]] = {"stored": {}, **more, "online": {"source": "online"}}
    order = [(student, source, arm) for student in SHORT for source in sources for arm in COLUMNS]
    untrained = set()
    for student, source, arm in order:
        if student not in untrained:
            lines.append(row(work, [SHORT[student], "(untrained)", ""], [f"{SHORT[student]}-untrained-seed0"]))
            untrained.add(student)
        of = sources[source]
        names = [Run(student=student, arm=arm, seed=seed, **of).name for seed in range(args.seeds)]
        known = sizes if source == "stored" else code_sizes(work / f"store-C{args.more_crops}")
        size = sum(known.get(of.get("codec", USED) if column == TOKENS else NAME, 0) for column in COLUMNS[arm])
        lines.append(row(work, [SHORT[student], arm, source], names, size=f"{size:,}" if source != "online" else ""))
    codecs = [
        row(
            work,
            [codec, f"{fidelity(work, codec):.3f}"],
            [Run(student="mobilenet_v3_small", arm="dense", seed=seed, codec=codec).name for seed in range(args.seeds)],
            size=f"{sizes.get(codec, 0):,}",
        )
        for codec in CODECS
    ]
    made = json.loads((work / "store.json").read_text())
    another = f" That of {args.more_crops} crops has both kinds in SQ8." if args.more_crops else ""
    return f"""# Dense targets: measurements

Made by `benchmarks/dense.py` with `--per-class {args.per_class} --crops {args.crops} --epochs {args.epochs}`.
The teacher, EfficientNet-Lite2, sees crops of {args.teacher_pixels} px and gives a grid of 7 x 7 tokens.
Students see the same crops at {args.pixels} px.
Training images: 367 of CamVid and {10 * args.per_class} of imagenette, without masks and labels.

mIoU in percent: a linear layer on the frozen map (`fkd-ssl segment`, short side {args.eval_pixels} px), trained on CamVid's 367
training images and tested on its 233 test images; kNN mIoU: nearest neighbours, without training.

{table(head, lines)}

Targets: `global` is one vector per crop ({sizes.get(NAME, 0):,} bytes, exact), `dense` the tokens in {USED}; in `both`, the two
losses have equal weights. `online` runs the teacher on fresh crops. The store has {args.crops} crops per image.{another}
Making the store of {args.crops} crops, with the exact tokens, took {made["seconds"]:,.0f} s.
Seconds are those of training on a shared machine, and vary between runs.

## Codecs

Students `dense`, stored, in different codecs. Cosine: decoded to exact tokens.

{table(["codec", "cosine", "mIoU", "kNN mIoU", "pixel accuracy", "bytes per crop", "seconds", "seeds"], codecs)}

{platform.machine()}, Python {platform.python_version()}, torch {runs.versions()["torch"]}.
"""


def table(head: list[str], lines: list[str | None]) -> str:
    """A table in Markdown."""
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *filter(None, lines)])


def code_sizes(store: Path) -> dict[str, int]:
    """The bytes per crop of each column, by codec of the tokens; of the global column, by its name."""
    return {key: meta["code_size"] for key, meta in metas(store).items()}


def fidelity(work: Path, codec: str) -> float:
    """The mean cosine of decoded to exact tokens."""
    meta = metas(work / "store").get(codec, {})
    return float(meta.get("fidelity", {}).get("cosine_mean", float("nan")))


def metas(store: Path) -> dict[str, Any]:
    """The columns' meta.json, by codec of the tokens, or the name of the global column."""
    found = {}
    for path in sorted((store / "targets").glob("*/meta.json")):
        meta = json.loads(path.read_text())
        found[NAME if path.parent.name == NAME else meta["codec"]] = meta
    return found


if __name__ == "__main__":
    main()
