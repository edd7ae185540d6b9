"""Crops a second from a folder, tars and Parquet, on the local disk and in an object store; students of each order.

    python benchmarks/sources.py speed --images DIR --folder DIR [--limit 2000] [--rounds 3] [--latencies 0 20 100]
    python benchmarks/sources.py order --images DIR --val DIR --checkpoint F --folder DIR [--epochs 10] [--seeds 2]

`speed` copies the images into a folder, tars and Parquet files, and reads them in the order of a training, in one process:
decode, and replay four crops. The sources take turns in blocks of images, so that other jobs on the machine slow all of them
down; the ratio to the folder is the median over the blocks. Then the tars are read from a real S3 server (moto) in a process of
its own, which waits before each answer. The share is relative to the same tars on the disk: `cold` is a pass from an empty
cache folder after one over the local tars, and `warm` passes take turns with them. It needs `pip install s3fs 'moto[server]'`.

`order` precomputes a store, trains students on the images as 7 tars, as 70 tars that are mixed as if they were remote, and as a
folder (the full shuffle), and scores them by kNN. It also counts how often a pass over the 70 tars reads each.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fkd_ssl.crops import RECIPES
from fkd_ssl.data import FreshCrops
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.images import ImageSource, open_images
from fkd_ssl.images.shrinking import shrink_set
from fkd_ssl.store.manifest import limit_images

BLOCK = 100  # images
CROPS = 4


def write_parquet(images: ImageSource, folder: Path) -> None:
    """Writes four files with row groups of 50 images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for k in range(4):
        rows = range(len(images) * k // 4, len(images) * (k + 1) // 4)
        values = [{"bytes": images.read(i), "path": images.names[i]} for i in rows]
        pq.write_table(pa.table({"image": pa.array(values, type=kind)}), folder / f"{k}.parquet", row_group_size=50)


def blocks(images: ImageSource, pixels: int, *, seed: int) -> Iterator[float]:
    """Reads one pass; yields the seconds of each block."""
    crops = FreshCrops(images, RECIPES["mocov2"], crops_per_image=CROPS, pixels=pixels)
    steps = len(images) // BLOCK
    groups = crops.groups if images.mix_groups else None
    sampler = PassSampler(len(images), BLOCK, steps, seed=seed, groups=groups, mix=images.mix_groups)
    for step in range(steps):
        pairs = sampler.batch(step)
        if groups is not None and step + 1 < steps:  # PassSampler asks for the files of 100 steps ahead
            images.expect(dict.fromkeys(int(groups[i]) for _, i in sampler.batch(step + 1)))
        started = time.perf_counter()
        crops.__getitems__(pairs)
        yield time.perf_counter() - started


def serve(port: Any, latency: Any) -> None:
    """Runs an S3 server that waits `latency` milliseconds before each answer to a read; puts its address into `port`."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    s3 = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start: Any) -> Any:
        time.sleep(latency.value / 1000)
        return s3(environ, start)

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    port.put(server.port)
    server.serve_forever()


def local_speed(args: argparse.Namespace, specs: dict[str, Path]) -> dict[str, float]:
    """Returns crops a second of each source, and the ratio to the folder."""
    times: dict[str, list[float]] = {name: [] for name in specs}
    for round_ in range(args.rounds):
        passes = {name: blocks(open_images(spec), args.pixels, seed=round_) for name, spec in specs.items()}
        for _ in range(args.limit // BLOCK):
            for name, one in passes.items():
                times[name].append(next(one))
    found = {}
    for name, seconds in times.items():
        found[f"{name}: crops a second"] = BLOCK * CROPS / statistics.median(seconds)
        found[f"{name}: ratio to the folder"] = statistics.median(np.array(times["folder"]) / np.array(seconds))
    return found


def remote_speed(args: argparse.Namespace, tars: Path) -> dict[str, float]:
    """Returns the share of the local speed with each latency, cold and warm."""
    import fsspec

    context = multiprocessing.get_context("spawn")
    port, latency = context.Queue(), context.Value("d", 0.0)
    server = context.Process(target=serve, args=(port, latency), daemon=True)
    server.start()
    os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port.get(timeout=120)}"
    s3 = fsspec.filesystem("s3", skip_instance_cache=True)
    s3.mkdir("set")
    for tar in sorted(tars.iterdir()):
        s3.put_file(str(tar), f"set/{tar.name}")
    found = {}
    for milliseconds in args.latencies:
        latency.value = milliseconds
        os.environ["FKD_SSL_CACHE"] = str(args.folder / f"cache{milliseconds}")
        remote = open_images("s3://set/*.tar")  # makes the index, which fetches all
        for path in Path(os.environ["FKD_SSL_CACHE"], "fetched").iterdir():
            path.unlink()
        own, theirs = (list(blocks(images, args.pixels, seed=0)) for images in (open_images(tars), remote))
        found[f"{milliseconds} ms, cold: share of local tars"] = sum(own) / sum(theirs)
        turns: list[tuple[float, float]] = []
        for seed in range(1, args.rounds + 1):
            passes = (blocks(images, args.pixels, seed=seed) for images in (open_images(tars), remote))
            turns += zip(*passes, strict=True)
        found[f"{milliseconds} ms, warm: share of local tars"] = statistics.median(mine / other for mine, other in turns)
    server.kill()
    return found


def speed(args: argparse.Namespace) -> dict[str, float]:
    """Measures crops a second."""
    images = limit_images(open_images(args.images), args.limit)
    specs = {"folder": args.folder / "files", "tars": args.folder / "tars", "parquet": args.folder / "parquet" / "*.parquet"}
    for name, tars in (("folder", None), ("tars", 20)):
        shrink_set(images, specs[name], short_side=0, tars=tars)
    write_parquet(images, specs["parquet"].parent)
    found = local_speed(args, specs)
    return found | (remote_speed(args, specs["tars"]) if args.latencies else {})


def fetches(source: ImageSource, *, batch: int, mix: int, cache: int) -> list[int]:
    """Returns how often a pass fetches each tar, with a cache of some tars and none that are fetched ahead."""
    groups = source.groups(np.arange(len(source)))
    sampler = PassSampler(len(source), batch, len(source) // batch, seed=0, groups=groups, mix=mix)
    found = [0] * (int(groups.max()) + 1)
    kept: list[int] = []
    for step in range(sampler.steps):
        for _, i in sampler.batch(step):
            tar = int(groups[i])
            found[tar] += tar not in kept
            kept = [*(other for other in kept if other != tar), tar][-cache:]
    return found


def order(args: argparse.Namespace) -> dict[str, Any]:
    """Trains and scores students."""
    images = limit_images(open_images(args.images), args.limit)
    specs = {"folder": args.folder / "files", "7 tars": args.folder / "7", "70 tars": args.folder / "70"}
    for name, tars in (("folder", None), ("7 tars", 7), ("70 tars", 70)):
        shrink_set(images, specs[name], short_side=0, tars=tars)

    def run(*line: str) -> str:
        command = [sys.executable, "-m", "fkd_ssl", *line]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    store = args.folder / "store"
    run(
        *("precompute", "--images", str(specs["folder"]), "--store", str(store), "--teacher", "mocov2"),
        *("--checkpoint", args.checkpoint, "--crops", str(args.epochs), "--pixels", str(args.pixels)),
    )
    found: dict[str, Any] = {}
    for seed in range(args.seeds):
        for name, spec in specs.items():
            out = args.folder / f"{name}-{seed}".replace(" ", "-")
            run(
                *("train", "--images", str(spec), "--store", str(store), "--out", str(out), "--student", "mobilenet_v3_small"),
                *("--epochs", str(args.epochs), "--crops_per_image", "1", "--pixels", str(args.pixels), "--seed", str(seed)),
                *("--mix_groups", "0" if name == "folder" else "16", "--batch_size", "128"),
            )
            line = (
                "knn",
                "--model",
                str(out),
                "--train",
                str(specs["folder"]),
                "--val",
                args.val,
                "--pixels",
                str(args.pixels),
            )
            found.setdefault(name, []).append(json.loads(run(*line, "--json"))["top1"])
    source = open_images(specs["70 tars"])
    fetched = fetches(source, batch=128, mix=16, cache=32)
    return found | {"tars fetched by a pass over 70, with a cache of 32": sum(fetched)}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "order"])
    parser.add_argument("--images", required=True)
    parser.add_argument("--val", help="labelled test images, for order")
    parser.add_argument("--checkpoint", help="of the MoCo v2 teacher, for order")
    parser.add_argument(
        "--folder", type=Path, required=True, help="for the copies; speed needs a new one, order continues in it"
    )
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--latencies", type=int, nargs="*", default=[0, 20, 100])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=args.part == "order")
    for name, value in (speed if args.part == "speed" else order)(args).items():
        print(f"{name}: {value if isinstance(value, (list, int)) else round(value, 3)}", flush=True)


if __name__ == "__main__":
    main()
