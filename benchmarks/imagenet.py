"""Estimates the cost of ImageNet: bytes of a store by crops and codec, hours of precompute by the teacher's speed.

    python benchmarks/imagenet.py
    python benchmarks/imagenet.py --photos photos --folder scratch --teacher mocov2 --checkpoint F.pth.tar

The tables are computed, not measured: files as in `benchmarks/store_sizes.py`, crops divided by crops per second. With
`--photos`, a folder of 1,281,167 links to those photographs is made, `fkd-ssl plan` runs on it, and the folder is removed.
"""

import argparse
import os
import shutil
from pathlib import Path

from store_sizes import store_bytes

from fkd_ssl import cli
from fkd_ssl.commands.console import table
from fkd_ssl.images import scan
from fkd_ssl.targets.faiss_codecs import code_size
from fkd_ssl.text import format_duration

CLASSES = 1000
PATH_BYTES = 31  # bytes per image in images.txt


def sizes(images: int, crops: list[int], codecs: list[str], dim: int) -> str:
    rows = [["codec", "bytes per crop", *(f"C = {count}" for count in crops)]]
    for codec in codecs:
        code = code_size(codec, dim)
        stores = [store_bytes(images, count, code, images * PATH_BYTES) / 1e9 for count in crops]
        rows.append([codec, str(code + 20), *(f"{size:.1f} GB" for size in stores)])
    return table(rows)


def hours(images: int, crops: list[int], rates: list[int], gpus: list[int]) -> str:
    """Returns crops divided by crops per second, if reading is not the bottleneck."""
    rows = [["crops per second of one GPU", "GPUs", *(f"C = {count}" for count in crops)]]
    for rate in rates:
        for count in gpus:
            rows.append([f"{rate:,}", str(count), *(format_duration(images * c / rate / count) for c in crops)])
    return table(rows)


def link(photos: Path, folder: Path, images: int) -> None:
    """Makes class folders of hard links to the photographs, with as many files as ImageNet."""
    files = [photos / path for path in scan(photos).names]
    for k in range(images):
        target = folder / f"n{k % CLASSES:08d}"
        if k < CLASSES:
            target.mkdir(parents=True)
        os.link(files[k % len(files)], target / f"n{k % CLASSES:08d}_{k // CLASSES}.JPEG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--crops", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--codecs", nargs="+", default=["SQfp16", "SQ8", "SQ4", "OPQ16,PQ16x8"])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rates", type=int, nargs="+", default=[500, 1000, 2000, 4000, 8000], help="crops per second of a GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--photos", type=Path, help="also run plan, on links to these photographs")
    parser.add_argument("--folder", type=Path, help="new folder for the links, on the same disk as the photographs")
    parser.add_argument("--teacher")
    parser.add_argument("--checkpoint")
    args = parser.parse_args()
    print(sizes(args.images, args.crops, args.codecs, args.dim), "\n")
    print(hours(args.images, args.crops, args.rates, args.gpus))
    if args.photos is None:
        return
    if args.folder is None or args.teacher is None or args.folder.exists():
        parser.error("--photos needs --teacher and a --folder that does not exist")
    try:
        link(args.photos, args.folder, args.images)
        weights = [] if args.checkpoint is None else ["--checkpoint", args.checkpoint]
        print()
        cli.main(["plan", "--images", str(args.folder), "--teacher", args.teacher, *weights, "--crops", str(args.crops[-1])])
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
