"""What a smaller copy of an image set saves and costs: bytes, fidelity of crops, reading speed, a teacher's kNN.

    python benchmarks/cache.py --images DIR --out DIR [--short_sides 128 192] [--qualities 90 95] \
        [--train DIR --val DIR --teacher mocov2 --checkpoint FILE --knn_pixels 64]

Compares crops of the copy (recipe fkd, 4 per image, with scaled boxes) with those of the originals: mean and minimum PSNR.
Measures the time of decoding and replaying 4 crops per image on one core (CPU time, best of interleaved rounds) for the
originals, for the copy, and for the copy's decoded pixels in a memory-mapped array. With --train, --val and a teacher, it
also scores the teacher's kNN on the originals and on copies of both.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fkd_ssl.commands import resolve
from fkd_ssl.crops import RECIPES, draw, image_key, replay
from fkd_ssl.data import scaled
from fkd_ssl.eval import knn
from fkd_ssl.images import scan
from fkd_ssl.images.shrinking import shrink_set

CROPS = 4


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--short_sides", type=int, nargs="+", default=[128, 192])
    parser.add_argument("--qualities", type=int, nargs="+", default=[90, 95])
    parser.add_argument("--pixels", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train")
    parser.add_argument("--val")
    parser.add_argument("--teacher", default="mocov2")
    parser.add_argument("--checkpoint")
    parser.add_argument("--knn_pixels", type=int, default=64)
    args = parser.parse_args()

    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(processors)})
    images = scan(args.images)
    count = range(len(images))
    originals = [images.pixels(i) for i in count]
    shapes = [image.shape[:2] for image in originals]
    records = [draw(RECIPES["fkd"], image_key(0, images.names[i]), *shapes[i], 0, CROPS) for i in count]
    exact = {p: [replay(originals[i], records[i], p) for i in count] for p in args.pixels}
    del originals
    rows = []
    for short_side in args.short_sides:
        for quality in args.qualities:
            folder = args.out / f"{short_side}-{quality}"
            done = shrink_set(images, folder, short_side=short_side, quality=quality)
            copies = scan(folder)
            small = [copies.pixels(i) for i in count]
            boxes = [scaled(records[i], shapes[i], small[i].shape[:2]) for i in count]
            with tempfile.TemporaryFile() as file:
                np.concatenate([image.ravel() for image in small]).tofile(file)
                raw = np.memmap(file, dtype=np.uint8, mode="r")
                ends = np.cumsum([image.size for image in small])

                def of_raw(i: int, raw: np.memmap = raw, ends: np.ndarray = ends, small: list = small) -> np.ndarray:
                    return np.asarray(raw[ends[i] - small[i].size : ends[i]]).reshape(small[i].shape)

                for pixels in args.pixels:
                    scores = [psnr(replay(small[i], boxes[i], pixels), exact[pixels][i]) for i in count]
                    ways: dict[str, Callable[[int], object]] = {
                        "originals": lambda i, p=pixels: replay(images.pixels(i), records[i], p),
                        "copy": lambda i, p=pixels, b=boxes, c=copies: replay(c.pixels(i), b[i], p),
                        "raw": lambda i, p=pixels, b=boxes, get=of_raw: replay(get(i), b[i], p),
                    }
                    fastest = dict.fromkeys(ways, float("inf"))
                    for _ in range(args.rounds):
                        for name, way in ways.items():
                            start = time.process_time()
                            for i in count:
                                way(i)
                            fastest[name] = min(fastest[name], time.process_time() - start)
                    rows.append(
                        {
                            "short_side": short_side,
                            "quality": quality,
                            "bytes_an_image": round(done.bytes / len(images)),
                            "originals_bytes": round(done.source_bytes / len(images)),
                            "raw_bytes": round(int(ends[-1]) / len(images)),
                            "pixels": pixels,
                            "psnr_mean": round(float(np.mean(scores)), 1),
                            "psnr_fastest": round(float(np.min(scores)), 1),
                            "copy_over_originals": round(fastest["originals"] / fastest["copy"], 2),
                            "raw_over_originals": round(fastest["originals"] / fastest["raw"], 2),
                        }
                    )
                    print(json.dumps(rows[-1]), flush=True)
    os.sched_setaffinity(0, processors)
    if args.train and args.val:
        teacher = resolve.teacher_of(args.teacher, args.checkpoint)

        def score(train: Path, val: Path) -> float:
            result = knn.evaluate(model=teacher.features, train=scan(train), val=scan(val), pixels=args.knn_pixels, workers=1)
            return round(float(result["top1"]), 2)

        scores = {"knn_pixels": args.knn_pixels, "originals": score(Path(args.train), Path(args.val))}
        for short_side in args.short_sides:
            places = [args.out / f"{split}-{short_side}" for split in ("train", "val")]
            for place, source in zip(places, (args.train, args.val), strict=True):
                shrink_set(scan(source), place, short_side=short_side)
            scores[f"copy of {short_side}"] = score(*places)
        print(json.dumps(scores), flush=True)


if __name__ == "__main__":
    main()
