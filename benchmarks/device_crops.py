"""Measures crops made on a GPU: the worker time that they save, their speed, and whether the bits are the same.

    python benchmarks/device_crops.py --images DIR --limit 64

Runs each size and M with the full MoCo v2 recipe. First it measures the CPU time of one worker for a batch, without
--device_crops (read, decode, replay) and with it (read, decode, plan), in alternation; the best of several rounds counts. Then
it measures the crops per second of the device, including the transfer, relative to one core's replay. Without a GPU, set
TRITON_INTERPRET=1; then only the worker time is meaningful.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device

from fkd_ssl.commands import resolve
from fkd_ssl.crops import RECIPES, replay_digest
from fkd_ssl.crops.device import check_device
from fkd_ssl.data import FreshCrops, replay_on_device
from fkd_ssl.images import scan

BATCH = 16  # images


def best(works: list[Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Returns the fastest seconds of each function; they run in alternation."""
    fastest = [float("inf")] * len(works)
    for _ in range(rounds):
        for k, work in enumerate(works):
            start = clock()
            work()
            fastest[k] = min(fastest[k], clock() - start)
    return fastest


def measure(args: argparse.Namespace, pixels: int, m: int, device: torch.device) -> dict[str, Any]:
    images = scan(args.images)
    order = np.random.default_rng(0).permutation(len(images))[: args.limit]
    common: dict[str, Any] = {"crops_per_image": m, "pixels": pixels}
    usual, decoding = (FreshCrops(images, RECIPES["mocov2"], decode_only=only, **common) for only in (False, True))
    one = FreshCrops(images, RECIPES["mocov2"], crops_per_image=1, pixels=1, decode_only=True)
    seconds = np.zeros(4)
    equal = True

    def on_device(batch: Any) -> torch.Tensor:
        crops: torch.Tensor = replay_on_device(move_data_to_device(batch, device))["images"]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return crops

    for k in range(0, len(order), BATCH):
        some: list[Any] = [(0, int(i)) for i in order[k : k + BATCH]]
        readers = [partial(data.__getitems__, some) for data in (usual, decoding, one)]
        seconds[:3] += best(readers, args.rounds, time.process_time)  # CPU time of this thread
        batch = decoding.__getitems__(some).batch
        equal &= bool(torch.equal(on_device(batch).cpu(), usual.__getitems__(some).batch["images"]))
        seconds[3] += best([partial(on_device, batch)], args.rounds, time.perf_counter)[0]
    usually, decodes, decode, there = seconds
    replay = max(usually - decode, 1e-9)
    return {
        "px": pixels,
        "M": m,
        "worker_ms_an_image": round(1000 * usually / len(order), 2),
        "decoding_worker_ms_an_image": round(1000 * decodes / len(order), 2),
        "worker_time_spared": round(1 - decodes / usually, 2),
        "device_over_one_core": round(replay / there, 2),
        "device_crops_a_second": round(len(order) * m / there),
        "same_bits": equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--limit", type=int, default=64, help="images")
    parser.add_argument("--pixels", nargs="+", type=int, default=[224, 96])
    parser.add_argument("--crops_per_image", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = resolve.device()
    check_device(device)
    rows = [measure(args, pixels, m, device) for pixels in args.pixels for m in args.crops_per_image]
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    result = {"device": name, "torch": torch.__version__, "same_pixels": replay_digest(str(device)) == replay_digest()}
    print(json.dumps({**result, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
