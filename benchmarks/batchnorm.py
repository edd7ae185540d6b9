r"""kNN of one short training under several estimates of BatchNorm's statistics.

    python benchmarks/batchnorm.py --images imagenette/train --val imagenette/val --store store --epochs 10 --out runs/batchnorm

Train mode does not read running statistics, so one training serves all estimates. While it runs, the script keeps running
statistics with torchvision's momentum of MobileNetV3 (0.01), with a momentum at which the initial values have a weight of 1e-4
at the end, and with the library's 0.1. Then it estimates the statistics of the final weights again on other stored crops,
several times: with a momentum of 0.1, and as exact averages (as torch.optim.swa_utils.update_bn). Prints the kNN accuracy of
each.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fkd_ssl.data import StoredCrops, whole_batch
from fkd_ssl.eval import knn
from fkd_ssl.images import open_images
from fkd_ssl.store import open_store
from fkd_ssl.students import Student
from fkd_ssl.training import TrainConfig, engine

Statistics = dict[str, tuple[Tensor, Tensor]]  # running mean and variance by name of the layer


class Tracked(Student):
    """A student that keeps running statistics with further momenta."""

    momenta: tuple[float, ...] = ()
    made: "list[Tracked]" = []  # noqa: RUF012

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept: dict[float, Statistics] = {momentum: self.statistics() for momentum in self.momenta}
        for name, norm in self.norms().items():
            norm.register_forward_pre_hook(lambda norm, given, name=name: self._track(norm, name, given[0]))
        self.made.append(self)

    def norms(self) -> dict[str, Any]:
        """BatchNorm layers by name."""
        return {name: part for name, part in self.named_modules() if isinstance(part, _BatchNorm)}

    def statistics(self) -> Statistics:
        """A copy of the running statistics."""
        return {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in self.norms().items()}

    def use(self, statistics: Statistics) -> None:
        """Replaces the running statistics."""
        for name, norm in self.norms().items():
            norm.running_mean.copy_(statistics[name][0])
            norm.running_var.copy_(statistics[name][1])

    @torch.no_grad()
    def _track(self, norm: nn.Module, name: str, x: Tensor) -> None:
        if norm.training:
            now = torch.var_mean(x, [0, *range(2, x.ndim)])[::-1]
            for momentum, statistics in self.kept.items():
                for value, new in zip(statistics[name], now, strict=True):
                    value.lerp_(new, momentum)


def estimate_again(student: Tracked, data: StoredCrops, crops: int, batch_size: int, momentum: float | None, seed: int) -> None:
    """Estimates the running statistics of the final weights on stored crops of random images, in train mode.

    A momentum of None is the cumulative average of torch.optim.swa_utils.update_bn.
    """
    for norm in student.norms().values():
        norm.momentum = momentum
        if momentum is None:
            norm.reset_running_stats()
    order = np.random.default_rng(seed).permutation(len(data))
    images = batch_size // data.crops_per_image
    student.train()
    with torch.no_grad():
        for first in range(0, crops // data.crops_per_image - images + 1, images):
            rows = [(1, int(k)) for k in order[np.arange(first, first + images) % len(data)]]
            student.features(whole_batch(data.__getitems__(rows))["images"])
    student.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--val", required=True, type=Path)
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--student", default="mobilenet_v3_small")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--warmup_epochs", type=float, default=0)
    parser.add_argument("--crops_per_image", type=int, default=4)
    parser.add_argument("--counts", nargs="+", type=int, default=[2048], help="stored crops that are read again")
    parser.add_argument("--draws", type=int, default=3, help="repetitions of the estimates on the final weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()

    images, val, store = open_images(str(args.images)), open_images(str(args.val)), open_store(args.store)
    pixels = store.column().meta.teacher.pixels
    given = ("epochs", "batch_size", "lr", "warmup_epochs", "crops_per_image", "seed", "student")
    shared = {name: getattr(args, name) for name in given}
    config = TrainConfig(
        images=str(args.images),
        store=str(args.store),
        out=str(args.out),
        pixels=pixels,
        **shared,
    )
    options: dict[str, Any] = {"pixels": pixels, "seed": args.seed}
    data = StoredCrops(store, images, crops_per_image=args.crops_per_image, **options)
    steps = engine.total_steps(config, len(data))
    Tracked.momenta = (0.01, 1 - 1e-4 ** (1 / steps))
    engine.Student = Tracked  # type: ignore[misc]
    args.out.mkdir(parents=True)
    (args.out / ".lock").touch()
    engine.train(config, data, args.out, targets=[column.info for column in data.columns])
    student = Tracked.made[0].eval()

    def score() -> float:
        result = knn.evaluate(model=student.features, train=images, val=val, pixels=pixels, workers=1, progress=False)
        return round(float(result["top1"]), 2)

    final, scores = student.statistics(), {"momentum 0.1": score()}
    for momentum, statistics in student.kept.items():
        student.use(statistics)
        scores[f"momentum {momentum:.3g}"] = score()
    student.use(final)
    apart = StoredCrops(store, images, crops_per_image=1, **options)
    again: dict[str, list[float]] = {}
    for seed in range(args.draws):
        estimate_again(student, data, 40 * args.batch_size, args.batch_size, 0.1, seed)
        again.setdefault("momentum 0.1, over 40 other batches", []).append(score())
        for count in args.counts:
            estimate_again(student, apart, count, args.batch_size, None, seed)
            again.setdefault(f"{count:,} crops read again", []).append(score())
    print(json.dumps({"steps": steps, "knn_top1": scores, "estimated_again": again}, indent=2))


if __name__ == "__main__":
    main()
