"""Throughput of precompute relative to the bare forward of the same teacher, in one run.

    python benchmarks/precompute.py --images DIR --teacher mocov2 --checkpoint FILE --pixels 64
    python benchmarks/precompute.py --images DIR --teacher resnet50 --pixels 224

`resnet50` is torchvision's with random weights and a projection to 128. The bare forward runs on chunks of the same size that
are in the memory of its device. Precompute also reads, decodes, replays, encodes (SQ8) and writes. Rounds alternate, and the
best of each is taken. On a CPU both share the cores, and the time to read a crop, which is also printed, bounds the ratio. On a
busy machine the two rates may be measured under different load; `teacher_busy`, the share of precompute's time in which the
teacher runs, is not affected.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

from fkd_ssl.commands import resolve
from fkd_ssl.crops import RECIPES
from fkd_ssl.images import scan
from fkd_ssl.store.manifest import limit_images
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write.chunks import forward
from fkd_ssl.store.write.precompute import Share, Summary, precompute
from fkd_ssl.store.write.rows import RowReader
from fkd_ssl.teachers import Teacher


def resnet50() -> Teacher:
    """Makes a ResNet-50 with random weights."""
    torch.manual_seed(0)
    network = torchvision.models.resnet50()
    network.fc = nn.Identity()
    return Teacher(
        network, nn.Linear(2048, 128), name="resnet50", shape=(128,), feature_dim=2048, network="resnet50, linear 128"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--teacher", required=True, help="resnet50, or a --teacher of fkd-ssl precompute")
    parser.add_argument("--checkpoint")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--crops", type=int, default=400)
    parser.add_argument("--chunk_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=min(16, resolve.cpu_threads()))
    parser.add_argument("--device_crops", action="store_true", help="make the crops on the GPU")
    parser.add_argument("--chunks", type=int, default=12, help="chunks per round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    if args.teacher == "resnet50":
        teacher = resnet50().to(resolve.device())
        teacher.info = replace(teacher.info, precision=args.precision)
    else:
        teacher = resolve.teacher_of(args.teacher, args.checkpoint, args.precision)
    count = max(1, round(args.chunks * args.chunk_size / args.crops))
    images = limit_images(scan(args.images), count)
    crops = count * args.crops
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (args.chunk_size, args.pixels, args.pixels, 3), dtype=np.uint8)
    chunk = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(resolve.device())

    def bare() -> float:
        start = time.perf_counter()
        for _ in range(-(-crops // args.chunk_size)):
            targets = forward(teacher, chunk, args.chunk_size)
        targets.cpu()
        return crops / (time.perf_counter() - start)

    def whole(folder: Path) -> tuple[float, float, float]:
        """Returns crops per second without the codec's sample, the teacher's share, and core seconds to read a crop."""

        def write(share: Share | None) -> Summary:
            return precompute(
                images,
                folder,
                teacher,
                crops=args.crops,
                recipe=RECIPES["mocov2"],
                pixels=args.pixels,
                threads=args.threads,
                chunk_size=args.chunk_size,
                device=str(resolve.device()) if args.device_crops else None,
                share=share,
                progress=False,
            )

        write(Share(index=2**61, of=2**62))  # the store and its codec, and no shard
        summary = write(None)
        reader = RowReader(Store(folder), images, skip_unreadable=False)
        start = time.perf_counter()
        reader(0, args.crops, {args.pixels: 0})
        return summary.crops / summary.seconds, summary.teacher_busy, (time.perf_counter() - start) / args.crops

    best, busy = {"bare": 0.0, "precompute": 0.0}, 0.0
    reading = float("inf")
    bare()
    with tempfile.TemporaryDirectory() as place:
        for k in range(args.rounds):
            best["bare"] = max(best["bare"], bare())
            rate, share, seconds = whole(Path(place) / str(k))
            best["precompute"], busy, reading = max(best["precompute"], rate), max(busy, share), min(reading, seconds)
    on_gpu = resolve.device().type == "cuda"
    bound = 1.0 if on_gpu else 1 / (1 + best["bare"] * reading / resolve.cpu_threads())
    print(
        json.dumps(
            {
                "teacher": teacher.info.network,
                "pixels": args.pixels,
                "precision": args.precision,
                "chunk_size": args.chunk_size,
                "crops_per_image": args.crops,
                "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {os.cpu_count()} cores",
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "crops_per_second": {name: round(value, 1) for name, value in best.items()},
                "reading_a_crop_ms_of_a_core": round(1e3 * reading, 3),
                "ratio": round(best["precompute"] / best["bare"], 3),
                "teacher_busy": round(busy, 3),
                "ratio_that_reading_allows": round(bound, 3),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
