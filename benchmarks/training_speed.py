"""Speed of training a student: bare (data in memory), on stored targets, and online, in turn in one run.

    python benchmarks/training_speed.py --images DIR --store STORE --teacher mocov2 --checkpoint FILE \
        --student mobilenet_v3_small --pixels 64

Prints crops a second of each, the ratios, and what the two networks' sizes predict: the time of one teacher forward and
one student step, each alone, with the data in memory. Rounds are interleaved and the best of each is taken.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from fkd_ssl.commands import resolve
from fkd_ssl.data import Batch, StoredCrops, start_worker, whole_batch
from fkd_ssl.images import scan
from fkd_ssl.objectives import make_objective
from fkd_ssl.store import open_store
from fkd_ssl.students import Student
from fkd_ssl.training.sampler import PassSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--column")
    parser.add_argument("--student", default="mobilenet_v3_small")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--crops_per_image", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    images, store = scan(args.images), open_store(args.store)
    teacher = resolve.teacher_of(args.teacher, args.checkpoint)
    device = resolve.device()
    student = Student(args.student, teacher.dim).to(device)
    objective = make_objective("feature_kl")
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)

    def batches(with_targets: bool) -> Iterator[Batch]:
        data = StoredCrops(
            store,
            images,
            crops_per_image=args.crops_per_image,
            pixels=args.pixels,
            teacher=args.column,
            with_targets=with_targets,
        )
        sampler = PassSampler(len(data), args.batch_size // args.crops_per_image, args.steps + 4, seed=0)
        return iter(
            DataLoader(
                data,
                batch_sampler=sampler,
                num_workers=args.workers,
                collate_fn=whole_batch,
                worker_init_fn=start_worker,
                prefetch_factor=4 if args.workers else None,
            )
        )

    held = next(batches(True))

    def step(batch: Batch, target: torch.Tensor) -> None:
        optimizer.zero_grad()
        objective(student(batch["images"]), target.to(device)).backward()
        optimizer.step()

    def timed(run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return args.steps * args.batch_size / (time.perf_counter() - start)

    def bare() -> float:
        return timed(lambda: [step(held, held["targets"]) for _ in range(args.steps)] and None)

    def forward() -> float:
        return timed(lambda: [teacher.embed(held["images"]) for _ in range(args.steps)] and None)

    def stored() -> float:
        source = batches(True)
        for _ in range(4):  # workers start
            step(batch := next(source), batch["targets"])
        return timed(lambda: [step(batch := next(source), batch["targets"]) for _ in range(args.steps)] and None)

    def online() -> float:
        source = batches(False)
        for _ in range(4):
            step(batch := next(source), teacher.embed(batch["images"]).clone())
        return timed(
            lambda: [step(batch := next(source), teacher.embed(batch["images"]).clone()) for _ in range(args.steps)] and None
        )

    best = dict.fromkeys(("bare", "forward", "stored", "online"), 0.0)
    for _ in range(args.rounds):
        for name, run in (("bare", bare), ("forward", forward), ("stored", stored), ("online", online)):
            best[name] = max(best[name], run())
    predicted = (1 / best["bare"] + 1 / best["forward"]) * best["bare"]
    print(
        json.dumps(
            {
                "student": args.student,
                "teacher": teacher.network,
                "pixels": args.pixels,
                "device": str(device),
                "crops_per_second": {name: round(rate, 1) for name, rate in best.items()},
                "stored_over_bare": round(best["stored"] / best["bare"], 3),
                "stored_over_online": round(best["stored"] / best["online"], 3),
                "predicted_stored_over_online": round(predicted, 3),
                "share_of_prediction": round(best["stored"] / best["online"] / predicted, 3),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
