"""Speed of reading stored crops: this library, the usual way (benchmarks/usual.py) and the limit, in alternation in one run.

    python benchmarks/loader.py --images DIR --out DIR [--cache DIR]

The limit is one full decode of each image by the fastest decoder here, divided by the number of crops that are read of it.
Stores of the images are made first (400 crops per image, SQ8 of 128 dimensions, with a small random network as the teacher).
One process on one core is timed by its CPU time (the files are in the page cache, so nothing waits): for each group of 8
images, the best of several rounds in which the methods alternate. Several workers are timed by wall-clock time. With
`--cache` (a copy made by `fkd-ssl cache`), the full recipe is also read from the copy, and compared with the usual way on
the originals. `--reference FILE` runs the script of another loader with `--images --pixels --crops --limit [--photometric]`,
which prints {"crops_per_second": ...}, to check usual.py. Writes results.json, table.md and breakdown.png.
"""

import argparse
import importlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import faiss
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from usual import UsualCrops, write_labels

from fkd_ssl import open_store, runs
from fkd_ssl.crops import RECIPES, replay_into
from fkd_ssl.crops.operations import BLUR, FLIP, GREY, JITTER
from fkd_ssl.data import Loader, StoredCrops, whole_batch
from fkd_ssl.images import ImageSource, decode, scan
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.teachers import Teacher

DIM = 128
replays: Any = importlib.import_module("fkd_ssl.crops.replay")
WORKS = {"box and flip": "fkd", "full recipe": "mocov2"}
GROUP = 8  # images that are timed together, and images in a batch
BATCH, PASSES = 64, 20  # for loaders with workers: images in a batch, and enough passes to make the start negligible
Work = Callable[[int], Any]
OPENCV = "resize by OpenCV"
STAGES = ("read", "decode", "records", "resize", "flip", "colour", "blur", "targets", "collate and rest")


def stand_in() -> Teacher:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, DIM))
    return Teacher(backbone, nn.Identity(), name="stand_in", shape=(DIM,), network="random", pixels=8)


def best(works: dict[Any, Work], groups: int, rounds: int, clock: Callable[[], float]) -> dict[Any, float]:
    """Returns the seconds of several functions that run in alternation: for each group of images, the fastest round."""
    fastest = {name: np.full(groups, np.inf) for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            for k in range(groups):
                start = clock()
                work(k)
                fastest[name][k] = min(fastest[name][k], clock() - start)
    return {name: float(seconds.sum()) for name, seconds in fastest.items()}


def drain(loader: Iterable[Any]) -> None:
    for _ in loader:
        pass


def each(function: Callable[[int], Any], count: int) -> Work:
    """Returns a function that calls another one for every image of a group."""
    return lambda k: drain(function(i) for i in range(k * GROUP, min((k + 1) * GROUP, count)))


def batches(loader: DataLoader[Any]) -> Work:
    """Returns a function that takes the next batch of a loader, which has one per group."""
    current: list[Any] = [None]

    def work(k: int) -> None:
        if k == 0:
            current[0] = iter(loader)
        next(current[0])

    return work


def decoders(files: list[bytes]) -> dict[str, Work]:
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    count = len(files)
    return {
        "simplejpeg": each(lambda i: simplejpeg.decode_jpeg(files[i], "RGB"), count),
        "opencv": each(lambda i: cv2.imdecode(np.frombuffer(files[i], np.uint8), flags), count),
        "pillow": each(lambda i: np.asarray(Image.open(io.BytesIO(files[i])).convert("RGB")), count),
    }


def ours(data: StoredCrops, workers: int = 0, passes: int = 1, batch: int = GROUP) -> Loader:
    pairs = [(p, i) for p in range(passes) for i in range(len(data))]
    batches = [pairs[k : k + batch] for k in range(0, len(pairs), batch)]
    return Loader(data, batches, workers=workers, collate=whole_batch)


def breakdown(data: StoredCrops, rounds: int) -> dict[str, float]:
    """Returns milliseconds per image of each stage. Those of replay are found by leaving out one flag after the other."""
    count = len(data)
    files = [data.read(i) for i in range(count)]
    images = [decode(files[i], data.where(i)) for i in range(count)]
    records = [data._records(0, i, 0, 0) for i in range(count)]
    views = np.empty((data.crops_per_image, data.pixels, data.pixels, 3), dtype=np.uint8)

    def with_flags(kept: int) -> Work:
        cut = [r.copy() for r in records]
        for r in cut:
            r["flags"] &= np.uint8(kept)
        return each(lambda i: replay_into(views, images[i], cut[i]), count)

    colour = JITTER | GREY
    works: dict[Any, Work] = {
        "read": each(data.read, count),
        "decode": each(lambda i: decode(files[i], data.where(i)), count),
        "records": each(lambda i: data._records(0, i, 0, 0), count),
        0: with_flags(0),
        1: with_flags(FLIP),
        2: with_flags(FLIP | colour),
        3: with_flags(FLIP | colour | BLUR),
        "targets": lambda k: data._targets([(0, i) for i in range(k * GROUP, min((k + 1) * GROUP, count))]),
        "all": batches(ours(data)),
    }
    if replays._avx2 is not None:
        works[OPENCV] = by_opencv(works[0])
    took = best(works, -(-count // GROUP), rounds, time.process_time)
    took["resize"], took["flip"], took["colour"], took["blur"] = took[0], *(took[k + 1] - took[k] for k in range(3))
    took["collate and rest"] = took["all"] - sum(took[stage] for stage in STAGES[:-1])
    return {stage: round(1e3 * took[stage] / count, 4) for stage in (*STAGES, OPENCV) if stage in took}


def page_faults(data: StoredCrops) -> float:
    """Returns the page faults per image of ten passes without workers, after three passes that allocate the memory."""
    drain(ours(data, passes=3, batch=BATCH))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    drain(ours(data, passes=10, batch=BATCH))
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (10 * len(data)), 1)


def by_opencv(work: Work) -> Work:
    """Returns the function without the compiled part of replay."""

    def slower(k: int) -> None:
        compiled, replays._avx2 = replays._avx2, None
        work(k)
        replays._avx2 = compiled

    return slower


def reference(args: argparse.Namespace, pixels: int, crops: int, photometric: bool) -> float:
    command = [sys.executable, args.reference, "--images", args.images, "--pixels", str(pixels), "--crops", str(crops)]
    command += ["--limit", str(args.limit)] + (["--photometric"] if photometric else [])
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["crops_per_second"])


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    names = [f"{row['pixels']} px, {row['work']}" for row in rows]
    left = np.zeros(len(rows))
    for k, stage in enumerate(STAGES):
        values = np.array([max(0.0, row["breakdown"][stage]) for row in rows])
        axis.barh(names, values, left=left, label=stage, color=plt.get_cmap("tab10")(k))
        left += values
    axis.invert_yaxis()
    axis.set_xlabel(f"milliseconds an image, {rows[0]['crops']} crops of each")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, ncols=9, loc="lower center", bbox_to_anchor=(0.45, 1.0), columnspacing=1.0)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--cache")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pixels", type=int, nargs="+", default=[224, 96, 64])
    parser.add_argument("--crops", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--stored", type=int, default=400)
    parser.add_argument("--limit", type=int, default=246)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--reference")
    args = parser.parse_args()

    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(processors)})
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    images = scan(args.images)
    images = images.subset(range(min(args.limit, len(images))))
    paths = [Path(images.where(i)) for i in range(len(images))]
    files = [path.read_bytes() for path in paths]
    args.out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as scratch:

        def data(work: str, source: ImageSource, crops: int, pixels: int) -> StoredCrops:
            folder = Path(scratch) / f"{work}-{Path(source.spec).name}"
            if not folder.exists():
                precompute(
                    source, folder, stand_in(), crops=args.stored, recipe=RECIPES[WORKS[work]], pixels=8, chunk_size=1024
                )
            return StoredCrops(open_store(folder), source, crops_per_image=crops, pixels=pixels)

        def usual(work: str, crops: int, pixels: int) -> UsualCrops:
            labels = [Path(scratch) / f"{work}-{k}.tar" for k in range(len(paths))]
            if not labels[0].exists():
                for path, label in zip(paths, labels, strict=True):
                    write_labels(path, label, stored=args.stored, dim=DIM, scale=RECIPES[WORKS[work]].scale)
            return UsualCrops(paths, labels, crops=crops, pixels=pixels, photometric=work == "full recipe")

        cached = None
        if args.cache:
            there = scan(args.cache)
            stems = {str(Path(path).with_suffix("")) for path in images.names}
            cached = there.subset([k for k, path in enumerate(there.paths) if str(Path(path).with_suffix("")) in stems])
            if len(cached) != len(images):
                raise SystemExit(f"{args.cache} holds {len(cached)} of the {len(images)} images")
        rows = []
        for pixels in args.pixels:
            for work in WORKS:
                for crops in args.crops:
                    stored, plain = data(work, images, crops, pixels), usual(work, crops, pixels)
                    works: dict[str, Work] = {
                        "ours": batches(ours(stored)),
                        "usual": each(plain.__getitem__, len(plain)),
                        **decoders(files),
                    }
                    if cached is not None and pixels < 128 and work == "full recipe":
                        works["cache"] = batches(ours(data(work, cached, crops, pixels)))
                    took = best(works, -(-len(images) // GROUP), args.rounds, time.process_time)
                    count = len(images) * crops
                    limit = min(took[name] for name in decoders(files))
                    row: dict[str, Any] = {
                        "pixels": pixels,
                        "work": work,
                        "crops": crops,
                        "crops_per_second": {
                            "limit": round(count / limit),
                            **{name: round(count / took[name]) for name in ("ours", "usual", "cache") if name in took},
                        },
                        "share_of_limit": round(limit / took["ours"], 3),
                        "over_usual": round(took["usual"] / took["ours"], 2),
                    }
                    if "cache" in took:
                        row["cache_over_usual"] = round(took["usual"] / took["cache"], 2)
                    if args.reference:
                        rate = reference(args, pixels, crops, work == "full recipe")
                        row["usual_over_reference_script"] = round(count / took["usual"] / rate, 3)
                    if crops == 4 or len(args.crops) == 1:
                        row["breakdown"] = breakdown(stored, args.rounds)
                        row["page_faults_per_image"] = page_faults(stored)
                    rows.append(row)
                    print(json.dumps(row), file=sys.stderr, flush=True)

        os.sched_setaffinity(0, processors)
        several = []
        for workers in args.workers:
            pixels, work = args.pixels[0], "full recipe"
            stored, plain = data(work, images, 4, pixels), usual(work, 4, pixels)
            many = list(range(len(images))) * PASSES
            took = best(
                {
                    "ours": lambda _, stored=stored, workers=workers: drain(ours(stored, workers, PASSES, BATCH)),
                    "ours, no worker": lambda _, stored=stored: drain(ours(stored, 0, PASSES, BATCH)),
                    "usual": lambda _, plain=plain, many=many, workers=workers: drain(
                        DataLoader(plain, BATCH, sampler=many, num_workers=workers)
                    ),
                },
                1,
                args.rounds,
                time.perf_counter,
            )
            rates = {name: round(len(many) * 4 / value) for name, value in took.items()}
            several.append({"pixels": pixels, "work": work, "crops": 4, "workers": workers, "crops_per_second": rates})
            print(json.dumps(several[-1]), file=sys.stderr, flush=True)

    machine = {"machine": platform.machine(), "processors": len(processors), "versions": runs.versions()}
    results = {"images": len(images), "rows": rows, "several_workers": several, **machine}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["| px | work | M | relative to the limit | relative to the usual way | the same, from the cache |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {r['pixels']} | {r['work']} | {r['crops']} | {r['share_of_limit']:.2f} | {r['over_usual']:.1f} | "
        f"{r.get('cache_over_usual', '')} |"
        for r in rows
    ]
    detailed = [row for row in rows if "breakdown" in row]
    if detailed:
        stages = [stage for stage in (*STAGES, OPENCV) if stage in detailed[0]["breakdown"]]
        lines += ["", f"| px | work | {' | '.join(stages)} |", "|---" * (len(stages) + 2) + "|"]
        for row in detailed:
            cells = [str(row["pixels"]), row["work"], *(f"{row['breakdown'][stage]:.3f}" for stage in stages)]
            lines.append(f"| {' | '.join(cells)} |")
        plot(detailed, args.out / "breakdown.png")
    if several:
        lines += ["", "| workers | relative to the usual way | relative to no worker |", "|---|---|---|"]
        for row in several:
            rate = row["crops_per_second"]
            lines.append(
                f"| {row['workers']} | {rate['ours'] / rate['usual']:.1f} | {rate['ours'] / rate['ours, no worker']:.2f} |"
            )
    text = "\n".join(lines) + "\n"
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
