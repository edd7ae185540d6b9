r"""Runs configs of configs/imagenette at their full length, each with the best of three learning rates for its student.

    python benchmarks/configs.py configs/imagenette/seed_*.yaml --images imagenette/train --val imagenette/val --store store \
        --teacher mocov2 --checkpoint mocov2_r18_imagenette.pth.tar --out runs/configs

The rates are a third, one and three times the config's own, or those of --rates; a single one is used without a search. For
each rate, the config is trained for --rate_epochs on stored targets of nine tenths of the training images and scored by kNN
on the other tenth. Test images are not used. With the best rate, the config is trained unchanged, on --store or, if it has
`targets: online`, with --teacher, and scored by kNN and by logistic regression on --val. --options are further options of
train, such as --init of a second step.

Prints a table with a row per config. Repeat the command to continue after a kill. OUT/NAME/rates.json has the held-out
scores.
"""

import argparse
import json
import math
import shlex
from pathlib import Path
from typing import Any

import yaml
from learning_rate import fkd_ssl, split

from fkd_ssl.options import flat
from fkd_ssl.training import TrainConfig

FACTORS = (1 / 3, 1.0, 3.0)


def rounded(rate: float) -> float:
    """Rounds to two digits, for a config."""
    return float(f"{rate:.2g}")


def marked(cell: str, best: bool) -> str:
    """Returns a cell, in bold if it is the best."""
    return f"**{cell}**" if best else cell


def done(folder: Path, *command: str | float | Path) -> dict[str, Any]:
    """Returns the results.json of a command; runs the command if the file is missing."""
    if not (folder / "results.json").exists():
        fkd_ssl(*command, "--out", folder)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


class Bench:
    """The settings that all configs share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.fit, self.held_out = split(args.images, args.out)
        self.weights = ["--teacher", args.teacher, *(["--checkpoint", args.checkpoint] if args.checkpoint else [])]

    def rate(self, config: Path, values: dict[str, Any]) -> tuple[float, dict[str, float]]:
        """Returns the best learning rate, and the held-out kNN of each; a single rate is not searched."""
        rates = self.args.rates or [rounded(values["lr"] * factor) for factor in FACTORS]
        if len(rates) == 1:
            return rates[0], {}
        crops, pixels = max(math.ceil(self.args.rate_epochs), values["crops_per_image"]), values["pixels"]
        store = self.args.out / f"store-{pixels}px-{crops}"
        fkd_ssl(
            "precompute",
            "--images",
            self.fit,
            "--store",
            store,
            *self.weights,
            "--pixels",
            pixels,
            "--crops",
            crops,
            *shlex.split(self.args.precompute),
        )
        scores = {}
        for lr in rates:
            command = ["train", "--config", config, "--targets", "stored", "--images", self.fit, "--store", store, "--lr", lr]
            command += ["--val", self.held_out, "--knn_every", 1000, "--epochs", self.args.rate_epochs]
            if "," in (drops := values.get("lr_decay", "")):  # scaled to the shorter training
                share = self.args.rate_epochs / values["epochs"]
                command += ["--lr_decay", ",".join(f"{share * float(epoch):g}" for epoch in drops.split(","))]
            found = done(self.args.out / config.stem / f"rate-{lr:g}", *command, *shlex.split(self.args.options))
            scores[f"{lr:g}"] = round(found["knn_top1"], 2)
        best = max(scores, key=scores.__getitem__)
        (self.args.out / config.stem / "rates.json").write_text(json.dumps({"held_out_knn_top1": scores, "best": best}))
        return float(best), scores

    def row(self, config: Path) -> list[str]:
        """Returns a config's row of the table."""
        values = flat(yaml.safe_load(config.read_text()), TrainConfig)
        lr, scores = self.rate(config, values)
        out, args = self.args.out / config.stem, self.args
        more = self.weights if values.get("targets") == "online" else ["--store", args.store]
        command = ["train", "--config", config, "--images", args.images, *more, "--lr", lr]
        command += ["--val", args.val, "--knn_every", 10]
        run = done(out / "run", *command, *shlex.split(args.options))
        probe = done(
            out / "logreg",
            "linear",
            "--protocol",
            "logreg",
            "--model",
            out / "run",
            "--train",
            args.images,
            "--val",
            args.val,
            "--workers",
            1,
        )
        student = run["student"]
        return [
            config.stem,
            f"{student['parameters'] / 1e6:.1f}, {student['multiply_adds'] / 1e6:.0f}",
            ", ".join(marked(f"{rate}: {top1:.1f}", float(rate) == lr) for rate, top1 in scores.items())
            or f"{lr:g}, the only one",
            f"{run['epochs']:g}",
            f"{run['knn_top1']:.2f}",
            f"{probe['top1']:.2f}",
            f"{run['train_seconds'] / 60:.0f}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--val", required=True, type=Path)
    parser.add_argument("--store", type=Path, help="with the teacher's targets of all images, for configs of stored targets")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--rate_epochs", type=float, default=5)
    parser.add_argument("--options", default="", help="options of train, as one argument")
    parser.add_argument("--precompute", default="", help="options of precompute for the store of the rates, as one argument")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    print("| config | M parameters, M multiply-adds | held-out kNN by learning rate | epochs | kNN | logreg | minutes |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for config in args.configs:
        print(f"| {' | '.join(bench.row(config))} |", flush=True)


if __name__ == "__main__":
    main()
