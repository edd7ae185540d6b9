"""Speed of training students: bare (data in memory), on stored targets, and online, in alternation in one run.

    python benchmarks/training_speed.py --images DIR [--cache DIR] --store STORE --checkpoint FILE \
        --pairs mocov2:mobilenet_v3_small:64 mocov2:resnet18:64 swav_w4:resnet18:64:2:1

A pair is TEACHER:STUDENT:PIXELS[:STEPS[:ROUNDS]]. `mocov2` and `swav` are read from --checkpoint. `mocov2_r50` and `swav_w4`
are ResNet-50 and SwAV's ResNet-50 of four times the width with random weights, since only their size matters here. All pairs
use the store's targets, whatever the teacher. Prints crops per second of each, the ratios, and the ratio that the sizes of
the two networks predict: the time of one teacher forward and one student step, each alone, with the data in memory. Rounds
alternate, and the best of each is taken. `cache` is stored training on --cache, a smaller copy of the images, with scaled
boxes.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import nn
from torchvision.models.resnet import Bottleneck

from fkd_ssl.commands import resolve
from fkd_ssl.data import Batch, Loader, StoredCrops, replay_on_device, whole_batch
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.images import scan
from fkd_ssl.objectives import make_objective
from fkd_ssl.store import open_store
from fkd_ssl.students import Student
from fkd_ssl.teachers import Teacher
from fkd_ssl.teachers.resnet import Architecture, WidthResNet

RANDOM = {"mocov2_r50": 1, "swav_w4": 4}  # width of a ResNet-50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--cache")
    parser.add_argument("--store", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--column")
    parser.add_argument("--pairs", nargs="+", default=["mocov2:mobilenet_v3_small:64"])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--crops_per_image", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device_crops", action="store_true", help="workers only decode; the device makes the crops")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps([measure(args, *pair.split(":")) for pair in args.pairs], indent=2))


def teacher_of(name: str, checkpoint: str | None) -> Teacher:
    if name not in RANDOM:
        return resolve.teacher_of(name, checkpoint)
    torch.manual_seed(0)
    backbone = WidthResNet(Architecture(block=Bottleneck, depths=(3, 4, 6, 3), width=RANDOM[name], base_width=64))
    wide = 2048 * RANDOM[name]
    hidden = 2048 if RANDOM[name] == 1 else wide
    norm = [nn.BatchNorm1d(hidden)] if name.startswith("swav") else []
    head = nn.Sequential(nn.Linear(wide, hidden), *norm, nn.ReLU(), nn.Linear(hidden, 128))
    network = f"{name}, random weights"
    return Teacher(backbone, head, name=name, shape=(128,), network=network).to(resolve.device())


def measure(args: argparse.Namespace, teacher_name: str, student_name: str, side: str, *numbers: str) -> dict[str, Any]:
    pixels = int(side)
    steps = int(numbers[0]) if numbers else args.steps
    rounds = int(numbers[1]) if len(numbers) > 1 else args.rounds
    store = open_store(args.store)
    folders = {"stored": scan(args.images)} | ({"cache": scan(args.cache)} if args.cache else {})
    teacher = teacher_of(teacher_name, args.checkpoint)
    device = resolve.device()
    student = Student(student_name, store.column(args.column).meta.target.size).to(device)
    objective = make_objective("feature_kl")
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)

    def batches(source: str, with_targets: bool) -> Iterator[Batch]:
        data = StoredCrops(
            store,
            folders[source],
            crops_per_image=args.crops_per_image,
            pixels=pixels,
            column=args.column,
            with_targets=with_targets,
            scale_boxes=source == "cache",
            decode_only=args.device_crops,
        )
        sampler = PassSampler(len(data), args.batch_size // args.crops_per_image, steps + 4, seed=0)
        return iter(Loader(data, sampler, workers=args.workers, collate=whole_batch, prefetch=4))

    def on_device(batch: Batch) -> Batch:
        return replay_on_device(move_data_to_device(batch, device))

    held = on_device(next(batches("stored", True)))

    def step(batch: Batch, target: torch.Tensor) -> None:
        optimizer.zero_grad()
        objective(student(batch["images"]), target).backward()
        optimizer.step()

    def timed(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return steps * args.batch_size / (time.perf_counter() - start)

    def from_loader(source: str, online: bool) -> float:
        loader = batches(source, not online)

        def one() -> None:
            batch = on_device(next(loader))
            step(batch, teacher.embed(batch["images"]).clone() if online else batch["targets"])

        for _ in range(4 if steps > 4 else 1):  # the workers start
            one()
        return timed(one)

    works: dict[str, Callable[[], float]] = {
        "bare": lambda: timed(lambda: step(held, held["targets"])),
        "forward": lambda: timed(lambda: teacher.embed(held["images"])),
        **{source: lambda source=source: from_loader(source, online=False) for source in folders},  # type: ignore[misc]
        "online": lambda: from_loader("stored", online=True),
    }
    best = dict.fromkeys(works, 0.0)
    for _ in range(rounds):
        for name, run in works.items():
            best[name] = max(best[name], run())
    predicted = 1 + best["bare"] / best["forward"]
    result = {
        "student": student_name,
        "teacher": teacher.info.network,
        "pixels": pixels,
        "steps": steps,
        "device": str(device),
        "device_crops": args.device_crops,
        "crops_per_second": {name: round(rate, 1) for name, rate in best.items()},
        **{f"{source}_over_bare": round(best[source] / best["bare"], 3) for source in folders},
        **{f"{source}_over_online": round(best[source] / best["online"], 3) for source in folders},
        "predicted_stored_over_online": round(predicted, 3),
    }
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


if __name__ == "__main__":
    main()
