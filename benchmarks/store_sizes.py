"""Bytes of a store for ImageNet-1k with 400 crops per image, compared with other systems that store a teacher's outputs.

    python benchmarks/store_sizes.py [--images 1281167] [--crops 400] [--dim 128] [--names imagenet/train]

Ours are computed from the format: records, codes, headers, sidecars, image list (of `--names`, or 31 bytes per path). The
bytes per crop of the others were read from the code of their repositories. File names, directory entries and blocks are not
counted, although one file per image means 1.28 million of each.
"""

import argparse
import os
from pathlib import Path

import numpy as np

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.store.listing import SIZE_DTYPE
from fkd_ssl.store.manifest import ROWS_PER_SHARD
from fkd_ssl.targets.faiss_codecs import code_size

SPECS = ("Flat", "SQfp16", "SQ8", "SQ6", "SQ4", "OPQ32,PQ32x8", "OPQ16,PQ16x8")
# name, repository, what is stored per crop, minimum and maximum bytes, files on disk
PEERS = (
    (
        "FKD, 128-d float32 in place of its classes",
        "szq0214/FKD",
        "pickled by torch.save, measured",
        797,
        797,
        "a pickle an image",
    ),
    ("FKD, supervised top-k", "szq0214/FKD", "box fractions, flip, top-k; before pickling", 57, 57, "a pickle an image"),
    ("TinyViT", "microsoft/Cream", "seed, top-100 in fp16", 404, 404, "fixed records an epoch and rank"),
    ("ml-dr (ImageNet+)", "apple/ml-dr", "box, RandAugment, mix, top-k", 65, 104, "a pickle an image"),
    ("MobileCLIP-DR", "apple/ml-mobileclip-dr", "box, RandAugment, 1536-d embedding", 3072, 6144, "webdataset tars"),
    ("SRe2L, LPLD", "VILA-Lab/SRe2L", "box, flip, mix, 1000 logits in fp16", 2025, 2025, "a pickle a batch and epoch"),
)


def json_bytes(rows: int) -> int:
    """Returns the bytes of a shard's two sidecars."""
    digest = "0" * 64
    crops = {"file": digest, "images": [digest] * rows, "skipped": [], "sha256": digest}
    return len(files.canonical(crops)) + len(files.canonical({"file": digest, "column": digest, "sha256": digest}))


def store_bytes(images: int, crops: int, size: int, names: int) -> int:
    """Returns the bytes of a store with one column, without manifest.json, meta.json and codec parameters (under 10 MB)."""
    total = names + images * SIZE_DTYPE.itemsize + images * crops * (CROP_DTYPE.itemsize + size)
    for first in range(0, images, ROWS_PER_SHARD):
        rows = min(ROWS_PER_SHARD, images - first)
        headers = len(files.npy_header(CROP_DTYPE, (rows, crops))) + len(files.npy_header(np.dtype("u1"), (rows, crops, size)))
        total += headers + (json_bytes(rows) if rows < ROWS_PER_SHARD else FULL_SIDECARS)
    return total


FULL_SIDECARS = json_bytes(ROWS_PER_SHARD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--crops", type=int, default=400)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--names", type=Path, default=None, help="folder of images whose paths are counted")
    args = parser.parse_args()
    names = 31 * args.images
    if args.names:
        names = sum(len(os.fsencode(p.relative_to(args.names))) + 1 for p in args.names.rglob("*") if p.is_file())
    print("| system | repository | stored per crop | bytes per crop | GB | on disk |\n|---|---|---|---|---|---|")
    shards = -(-args.images // ROWS_PER_SHARD)
    for spec in SPECS:
        size = code_size(spec, args.dim)
        total = store_bytes(args.images, args.crops, size, names)
        what = f"record, {args.dim}-d {spec}"
        print(f"| fkd_ssl | | {what} | {CROP_DTYPE.itemsize + size} | {total / 1e9:.1f} | {4 * shards + 4:,} files |")
    for name, repository, what, least, most, disk in PEERS:
        bytes_ = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        low, high = (args.images * args.crops * n / 1e9 for n in (least, most))
        size_ = f"{low:,.0f}" if least == most else f"{low:,.0f} to {high:,.0f}"
        print(f"| {name} | {repository} | {what} | {bytes_} | {size_} | {disk} |")


if __name__ == "__main__":
    main()
