"""Memory of the loader over many passes, which must not grow.

    python benchmarks/epochs_memory.py --images DIR --store STORE --passes 20 --pixels 64 --workers 2

Prints, after every pass, the proportional set size in megabytes of this process and its workers together (pages that
processes share are divided among them), from /proc, so on Linux only.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np

from fkd_ssl import open_store
from fkd_ssl.data import Loader, StoredCrops, whole_batch
from fkd_ssl.data.sampler import PassSampler


def memory() -> int:
    """Returns the bytes of this process and its children."""
    own = os.getpid()
    children = [int(pid) for task in Path(f"/proc/{own}/task").iterdir() for pid in (task / "children").read_text().split()]
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (own, *children)]
    return sum(1024 * int(line.split()[1]) for text in rollups for line in text.splitlines() if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--crops_per_image", type=int, default=4)
    parser.add_argument("--batch_images", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    data = StoredCrops(open_store(args.store), args.images, crops_per_image=args.crops_per_image, pixels=args.pixels)
    steps = -(-args.passes * len(data) // args.batch_images)
    sampler = PassSampler(len(data), args.batch_images, steps, seed=0)
    loader = Loader(data, sampler, workers=args.workers, collate=whole_batch, prefetch=4)
    megabytes: list[float] = []
    for step, _ in enumerate(loader, 1):
        if step * args.batch_images >= (len(megabytes) + 1) * len(data):
            megabytes.append(round(memory() / 1e6, 1))
    slope = float(np.polyfit(range(len(megabytes) // 2), megabytes[len(megabytes) // 2 :][: len(megabytes) // 2], 1)[0])
    print(json.dumps({"images": len(data), "megabytes": megabytes, "megabytes_a_pass_in_the_second_half": round(slope, 3)}))


if __name__ == "__main__":
    main()
