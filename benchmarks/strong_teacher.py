r"""Students of a strong teacher: stored, online and without it; how many crops; codecs; class probabilities.

    python examples/strong_teacher.py lite2.pth
    python benchmarks/strong_teacher.py crops students --imagenette imagenette --tiny100 tiny100 --checkpoint lite2.pth \
        --work runs/strong --seeds 2 --pages docs/results

- `rates`: objectives and learning rates, 20 epochs of 1,000 images, scored by kNN on other training images. Test images are not
  used. The other experiments take the best objective and rate. `label_rates` is the same for class probabilities and labels.
- `crops`: do stored targets overfit? C = 1, 4, 25 and 100 stored crops per image compared with online, in 60 epochs.
- `codecs`: the same training on the same crops, with targets of fewer bytes.
- `students`: stored, online, labels, MoCo v2 without a teacher, on all images; kNN, linear and fine-tuned.
  With `--student`, another one: the table is written between the markers of `students-STUDENT`.
- `tiny100`: the same on 100 classes of Tiny-ImageNet.
- `probabilities`: FKD's supervised half. The targets are the teacher's probabilities of 1,000 classes.

The teacher sees crops of --teacher_pixels; the student trains on the same crops at --pixels. Every run is a command of fkd-ssl
in a process of its own. Repeat the command to continue: a finished run has a scores.json in WORK/runs and is not
started again. --pages writes the tables of strong_teacher.md, between its markers; with --render, nothing is run.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import learning_rate
import numpy as np
import strong_arms
import strong_tables
import students
import torch
import two_teachers
from strong_arms import Arm, Experiment, Stored

from fkd_ssl import files, runs
from fkd_ssl.commands import resolve
from fkd_ssl.eval import knn, logreg
from fkd_ssl.eval.features import extract, extract_split
from fkd_ssl.images import scan
from fkd_ssl.pretraining.engine import CHECKPOINT, STUDENT
from fkd_ssl.students import Student
from fkd_ssl.students.export import export
from fkd_ssl.teachers import load_teacher


class Bench:
    """The experiments in a folder of work."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work

    def images(self, name: str) -> Path:
        """Returns a folder of training images; `-small` is the first images of each class, `-other` the next ones."""
        whole: Path = getattr(self.args, name.partition("-")[0]) / "train"
        if name.endswith("-small"):
            return two_teachers.subset(whole, self.work / "images" / f"{name}-{self.args.small}", self.args.small)
        if name.endswith("-other"):
            folder = two_teachers.subset(whole, self.work / "images" / f"{name}-{self.args.small}", 2 * self.args.small)
            for link in self.images(name.replace("-other", "-small")).glob("*/*"):
                (folder / link.parent.name / link.name).unlink(missing_ok=True)
            return folder
        return whole

    def teacher(self, layer: str = "") -> dict[str, Any]:
        """Returns the options that name the teacher."""
        return {"teacher": f"{self.args.teacher}{layer}", "checkpoint": self.args.checkpoint}

    def folder(self, store: Stored) -> Path:
        """Returns the folder of a store."""
        return self.work / "stores" / store.name

    def store(self, wanted: Stored) -> Path:
        """Returns the folder of a store, and makes it if it is missing."""
        folder = self.folder(wanted)
        note = folder.with_suffix(".json")
        if note.exists():
            return folder
        folder.parent.mkdir(exist_ok=True)
        if wanted.source is not None:
            verb = "subset" if "crops" in wanted.options else "recode"
            made = self.command(verb, self.store(wanted.source), out=folder, **wanted.options, json=True)
        else:
            pixels, threads = self.args.teacher_pixels, 1
            made = self.command(
                "precompute",
                images=self.images(wanted.images),
                store=folder,
                **self.teacher(wanted.layer),
                pixels=pixels,
                crops=wanted.crops,
                threads=threads,
                **wanted.options,
                json=True,
            )
        files.replace(note, made.encode())
        return folder

    def run(self, experiment: str, arm: Arm, seed: int) -> Path:
        """Returns the folder of a run. Arms of two experiments share a folder if they are the same run."""
        name = arm.name
        if (experiment, name) == ("codecs", "SQ8"):
            experiment, name = "crops", "C=100"
        if experiment == "students" and arm.verb in strong_tables.UNTRAINED:
            experiment = "crops"
        folder = experiment if arm.verb == "teacher" else self.of_student(experiment)
        return self.work / "runs" / folder / f"{re.sub('[^a-zA-Z0-9.]+', '-', name)}-seed{seed}"

    def of_student(self, experiment: str) -> str:
        """Returns the name of an experiment, with the student's if that is not the default."""
        return experiment + (f"-{self.args.student.replace('/', '-')}" if self.args.student != strong_arms.STUDENT else "")

    def finish(self, name: str, experiment: Experiment, arm: Arm, seed: int) -> None:
        """Trains and scores a run that is not done."""
        run = self.run(name, arm, seed)
        if (run / "scores.json").exists():
            return
        print(f"{time.strftime('%H:%M:%S')} {name}: {arm.name}, seed {seed}", file=sys.stderr, flush=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        results: dict[str, Any] = {}
        if arm.verb in ("train", "pretrain"):
            self.command(arm.verb, **self.training(experiment, arm, seed), out=run)
            results = runs.read_results(run)
        run.mkdir(exist_ok=True)
        correct = self.score(name, experiment, arm, run, seed)
        if experiment.tuned and results and "top1" not in correct:
            correct["tuned"] = self.fine_tuned(experiment, run, seed)
        np.savez(run / "correct.npz", **correct)
        kept = ("train_seconds", "steps", "teacher_forwards", "data_wait", "images", "config")
        files.write_json(
            run / "scores.json",
            {probe: round(100 * float(hits.mean()), 2) for probe, hits in correct.items()}
            | {key: results[key] for key in kept if key in results}
            | {"versions": runs.versions()},
        )

    def training(self, experiment: Experiment, arm: Arm, seed: int) -> dict[str, Any]:
        """Returns the options of a run."""
        shared = {"images": self.images(experiment.images), "pixels": self.args.pixels, "workers": 1, "seed": seed}
        if arm.verb == "pretrain":  # two crops of an image in each epoch, for the student's own MoCo v2
            moco = {"arch": self.args.student, "epochs": round(experiment.epochs), "batch_size": 128, "momentum": 0.99}
            return {**shared, **moco, **strong_arms.ALONE.get(self.args.student, {})}
        if arm.store is not None:
            targets: dict[str, Any] = {"store": self.store(arm.store)}
        elif arm.options.get("targets") == "relabel":
            self.label_maps(experiment.images)
            targets = {}
        elif "targets" in arm.options:
            targets = {}
        else:
            targets = {"targets": "online", "teacher_pixels": self.args.teacher_pixels, **self.teacher(arm.layer)}
        options = {"student": self.args.student, "epochs": experiment.epochs, **experiment.options, **arm.options}
        return {**shared, **options, **targets, "batch_size": self.batch_size(experiment.images)}

    def batch_size(self, images: str) -> int:
        """Returns the number of crops in a batch. A few images need small batches for a few thousand steps."""
        return self.args.batch_size or (32 if images.endswith("-small") else 64)

    def label_maps(self, images: str) -> None:
        """Makes ReLabel's maps at the size of a whole image."""
        if not (self.work / "label-maps.json").exists():
            made = self.command(
                "label-maps",
                images=self.images(images),
                out=self.work / "label-maps",
                **self.teacher("@probabilities"),
                json=True,
            )
            files.replace(self.work / "label-maps.json", made.encode())

    def score(self, name: str, experiment: Experiment, arm: Arm, run: Path, seed: int) -> dict[str, Any]:
        """Returns which test images a model classifies correctly, bool [n], by probe."""
        whole = experiment.images.partition("-")[0]
        gallery, val = self.images(whole), getattr(self.args, whole) / "val"
        if name.endswith("rates"):
            gallery, val = self.images(experiment.images), self.images("imagenette-other")
        pixels = self.args.pixels
        if arm.verb == "untrained":
            torch.manual_seed(seed)
            student = Student(self.args.student, 128).eval()
            features, network = student.features, None
        else:
            weights = self.exported(run) if arm.verb == "pretrain" else run
            spec = (
                (str(weights), None)
                if arm.verb != "teacher"
                else (f"teacher:{self.teacher(arm.layer)['teacher']}", self.args.checkpoint)
            )
            model = resolve.model_of(*spec)
            features, network = model.features, model.network
            pixels = self.args.teacher_pixels if arm.verb == "teacher" else pixels
        split = extract_split(features, scan(gallery), scan(val), pixels=pixels, workers=1, progress=False)
        correct = {"knn": knn.evaluate_features(k=20, **split.common)["correct"]}
        if not name.endswith("rates"):
            correct["linear"] = logreg.evaluate(progress=False, **split.common)["correct"]
        classifier = {**experiment.options, **arm.options}.get("head") == "classifier" and arm.verb != "untrained"
        if classifier and network is not None:
            call = network if arm.verb == "train" else network.embed
            correct["top1"] = self.among(call, val, pixels)
        return correct

    def among(self, classify: Any, val: Path, pixels: int) -> Any:
        """Returns whether the most probable class among those of the test set is right, bool [n]."""
        images = scan(val)
        scores, labels = extract(classify, images, pixels=pixels, workers=1, progress=False)
        if scores.shape[1] != len(images.classes):
            from timm.data import ImageNetInfo

            names = ImageNetInfo().label_names()
            scores = scores[:, [names.index(name) for name in images.classes]]
        return scores.argmax(axis=1) == labels

    def exported(self, run: Path) -> Path:
        """Returns the student's file of a pretraining. A ResNet's is made here, since it is pretrained as a teacher."""
        path = run / STUDENT
        if not path.exists():
            student = Student(self.args.student, 128).eval()
            teacher = load_teacher("mocov2", checkpoint=run / CHECKPOINT)
            student.backbone.load_state_dict(teacher.backbone.state_dict())
            export(student, path, layout=None, pixels=self.args.pixels)
        return path

    def fine_tuned(self, experiment: Experiment, run: Path, seed: int) -> Any:
        """Fine-tunes a student on all labels; returns which test images it classifies correctly, bool [n]."""
        exported, out = run / STUDENT, run / "fine-tuned"
        self.command(
            "train",
            images=self.images(experiment.images),
            pixels=self.args.pixels,
            workers=1,
            seed=seed,
            student=self.args.student,
            init=exported if exported.exists() else run,
            **{**strong_arms.TUNING, **strong_arms.OPTIONS.get(self.args.student, {})},
            batch_size=self.batch_size(experiment.images),
            epochs=self.args.tuning_epochs,
            out=out,
        )
        return self.among(resolve.model_of(str(out)).network, getattr(self.args, experiment.images) / "val", self.args.pixels)

    def command(self, verb: str, *words: str | Path, **options: Any) -> str:
        """Runs a command of fkd-ssl; returns what it printed."""
        pairs = [(f"--{key}", *(() if value is True else (value,))) for key, value in options.items() if value is not None]
        return learning_rate.fkd_ssl(verb, *words, *(word for pair in pairs for word in pair))

    def table(self, name: str, experiment: Experiment) -> str:
        """Returns the table of an experiment, and draws its plot; empty if no arm is finished."""
        rows: list[strong_tables.Row] = []
        for arm in experiment.arms:
            runs_of = [self.run(name, arm, seed) for seed in range(self.args.seeds)]
            row = strong_tables.Row.read(arm.name, runs_of, self.folder(arm.store) if arm.store else None)
            rows += [row] if row else []
        if not rows:
            return ""
        if name == "probabilities" and self.args.pages:
            strong_tables.plot(rows, "top1", self.args.pages / "strong_teacher_labels.png")
        missing = [arm.name for arm in experiment.arms if arm.name not in [row.name for row in rows]]
        reference = next((row for row in rows if row.name == experiment.reference), None)
        parts = [strong_tables.table(rows, reference), strong_tables.about(rows, reference, missing)]
        pair = [row for name in experiment.pair or () for row in rows if row.name == name]
        if len(pair) == 2:
            parts.insert(1, strong_tables.compare(*pair))
        return "\n\n".join(parts)

    def choose(self, name: str, experiment: Experiment) -> None:
        """Saves the objective and the rate with the best kNN; of `label_rates` the best rate of each kind of targets."""
        scores = {arm.name: json.loads((self.run(name, arm, 0) / "scores.json").read_text())["knn"] for arm in experiment.arms}
        ordered = [arm.split() for arm in sorted(scores, key=scores.__getitem__)]
        objective, lr = ordered[-1]
        best = {"objective": objective, "lr": float(lr)} if name == "rates" else {kind: float(lr) for kind, lr in ordered}
        found = {"held_out_knn_top1": scores, "best": best}
        files.replace(self.work / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=strong_arms.EXPERIMENTS)
    parser.add_argument("--work", required=True, type=Path, help="folder for images, stores and runs")
    parser.add_argument("--imagenette", type=Path, help="folder with train and val")
    parser.add_argument("--tiny100", type=Path, help="folder with train and val")
    parser.add_argument("--teacher", default="timm/tf_efficientnet_lite2")
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--teacher_pixels", type=int, default=128)
    parser.add_argument("--student", default=strong_arms.STUDENT)
    parser.add_argument("--pixels", type=int, default=64, help="side of the student's crops")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds; rates and label_rates always have one")
    parser.add_argument("--epochs", type=float, help="epochs of all runs")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="ARM", help="patterns of arms, such as 'C*'")
    parser.add_argument("--objective", help="instead of the best of rates")
    parser.add_argument("--lr", type=float, help="instead of the best of rates")
    parser.add_argument(
        "--objectives", nargs="+", default=["cosine", "feature_kl(temperature=0.05)"], help="what rates compares"
    )
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2], help="what rates compares")
    parser.add_argument(
        "--classifier_lr", type=float, help="of students that are classifiers, instead of the best of label_rates"
    )
    parser.add_argument("--tuning_epochs", type=float, default=10)
    parser.add_argument("--batch_size", type=int, help="crops in a batch: by default 32 for 1,000 images and 64 for all")
    parser.add_argument("--small", type=int, default=100, help="images per class of rates, crops, codecs and probabilities")
    parser.add_argument("--pages", type=Path, help="folder of strong_teacher.md, whose tables are replaced")
    parser.add_argument("--render", action="store_true", help="only print and write the tables of what is finished")
    args = parser.parse_args()
    bench = Bench(args)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    args.work.mkdir(parents=True, exist_ok=True)
    for seed in range(0 if args.render else args.seeds):
        for name in args.experiments:
            experiment = strong_arms.EXPERIMENTS[name](args)
            for arm in experiment.arms:
                if students.named(arm, args.only) and not (seed and (name.endswith("rates") or arm.verb == "teacher")):
                    bench.finish(name, experiment, arm, seed)
            if name.endswith("rates"):
                bench.choose(name, experiment)
    for name in args.experiments:
        text = bench.table(name, strong_arms.EXPERIMENTS[name](args))
        print(f"## {name}\n\n{text}\n")
        if args.pages and text:
            strong_tables.write(args.pages / "strong_teacher.md", bench.of_student(name), text)


if __name__ == "__main__":
    main()
