"""A store at ImageNet's scale: the time to open it, its memory, and the speed of reading random images.

    python benchmarks/store_scale.py --folder DIR [--images 1281167] [--crops 400] [--workers 8]

The store is made without a teacher. Its manifest, lists, sidecars and .npy headers are as in any other store. The crop
records and codes are holes of sparse files, which read as zeros, so the file system must support sparse files; 200 MB are
needed. Memory is the PSS of each process in /proc/PID/smaps_rollup (Linux): its own pages, and its share of the pages that
processes share. "with the parent" counts a worker's own pages and all pages of its parent that it can see (RSS). `baseline`
is a worker of the same loader over a data set without a store.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE, RECIPES, replay_digest
from fkd_ssl.data import StoredCrops
from fkd_ssl.data.loading import start_worker
from fkd_ssl.images import Folder
from fkd_ssl.store import manifest as layout
from fkd_ssl.store import open_store
from fkd_ssl.store.column import ColumnMeta
from fkd_ssl.store.listing import IMAGES, MANIFEST, SIZE_DTYPE, SIZES
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.targets.faiss_codecs import FaissCodec

DIM = 128
COLUMN = "sq8"


def image_set(count: int) -> Folder:
    """Returns `count` paths in 1,000 class folders, named as in ImageNet; the files do not exist."""
    paths = sorted(f"n{10**7 + 7919 * (k % 1000):08d}/n{10**7 + 7919 * (k % 1000):08d}_{k // 1000}.JPEG" for k in range(count))
    return Folder(Path("imagenet"), paths)


def sparse(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], digests: dict[Any, str]) -> str:
    """Writes a .npy of zeros as a header and a hole; returns its sha256."""
    header, size = files.npy_header(dtype, shape), int(np.prod(shape)) * dtype.itemsize
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    if (dtype, shape) not in digests:
        digests[dtype, shape] = files.sha256_file(path)
    return digests[dtype, shape]


def make(folder: Path, images: Folder, crops: int) -> None:
    """Writes the store, manifest last."""
    sizes = np.zeros(len(images), dtype=SIZE_DTYPE)
    sizes["bytes"], sizes["width"], sizes["height"] = 110_000, 500, 375
    column = folder / layout.TARGETS / COLUMN
    for part in (folder / layout.CROPS, column):
        part.mkdir(parents=True, exist_ok=True)
    with files.create(folder / IMAGES) as file:
        file.write(images.names.lines)
    manifest = layout.Manifest(
        seed=0,
        recipe=RECIPES["mocov2"],
        crops_per_image=crops,
        rows_per_shard=layout.ROWS_PER_SHARD,
        count=len(images),
        images_sha256=files.sha256(images.names.lines),
        sizes_sha256=files.write_npy(folder / SIZES, sizes),
    )
    generator = np.random.default_rng(0)
    sample = generator.normal(size=(4096, DIM)).astype(np.float32)
    codec = FaissCodec.train("SQ8", sample / np.linalg.norm(sample, axis=1, keepdims=True))
    meta = ColumnMeta(
        codec="SQ8",
        code_size=DIM,
        fidelity={"cosine_mean": 1.0, "cosine_min": 1.0, "sample": 1},
        teacher=TeacherInfo(name=COLUMN, spec=TargetSpec("embedding", (DIM,)), network="none", licence="none"),
        chunk_size=128,
        replay_digest=replay_digest(),
        arrays={name: files.write_npy(column / f"{name}.npy", array) for name, array in codec.arrays().items()},
    )
    files.write_json(column / "meta.json", meta.to_json())
    digest = files.sha256(files.canonical(meta.to_json()))
    known: dict[Any, str] = {}
    for shard in range(manifest.shards):
        rows = manifest.shard_rows(shard)
        records, codes = layout.crops_file(folder, shard), layout.codes_file(folder, COLUMN, shard)
        values = {
            "file": sparse(records, CROP_DTYPE, (len(rows), crops), known),
            "skipped": [],
            "images": [files.sha256(str(row).encode()) for row in rows],
        }
        for path, value in (
            (records, values),
            (codes, {"file": sparse(codes, np.dtype(np.uint8), (len(rows), crops, DIM), known), "column": digest}),
        ):
            path, value = path.with_suffix(".json"), {**value, "shard": shard, "manifest": manifest.digest}
            signed = {**value, "sha256": files.sha256(files.canonical(value))}
            path.write_bytes(files.canonical(signed))  # not published one by one: 2,504 syncs would only cost time
    manifest.write(folder)


def memory(pid: int | str = "self") -> dict[str, float]:
    """Returns the megabytes of a process: RSS, PSS, and its own pages (USS)."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value, *_ = line.split()
        fields[key.rstrip(":")] = int(value) * 1024 / 1e6
    own = fields["Private_Clean"] + fields["Private_Dirty"]
    return {"rss": round(fields["Rss"], 1), "pss": round(fields["Pss"], 1), "own": round(own, 1)}


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Reads(Dataset[dict[str, Any]]):
    """4 crops and targets of an image, without its pixels, since the images do not exist."""

    def __init__(self, data: StoredCrops | None, count: int) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        if self.data is not None:
            self.data._records(0, i, 375, 500)
            self.data._targets([(0, i)])
        return {"worker": os.getpid()}


def reading(data: StoredCrops, count: int, seed: int) -> dict[str, float]:
    """Returns microseconds to read 4 crops and their targets of random images, after every shard has been read once."""
    order = np.random.default_rng(seed).permutation(len(data))
    for i in order[: 4 * data.store.manifest.shards]:
        data._records(0, int(i), 375, 500), data._targets([(0, int(i))])
    times = []
    for i in order[:count]:  # read again, from memory
        data._records(0, int(i), 375, 500), data._targets([(0, int(i))])
    for i in order[:count]:
        start = time.perf_counter()
        data._records(0, int(i), 375, 500)
        data._targets([(0, int(i))])
        times.append(1e6 * (time.perf_counter() - start))
    used = time.process_time()
    for i in order[:count]:
        data._records(0, int(i), 375, 500)
        data._targets([(0, int(i))])
    used = 1e6 * (time.process_time() - used) / count
    quantiles = np.quantile(times, [0.5, 0.99])
    return {
        "cpu_us": round(used, 1),
        "mean_us": round(statistics.mean(times), 1),
        "median_us": round(quantiles[0], 1),
        "p99_us": round(quantiles[1], 1),
    }


def loaders(data: StoredCrops | None, count: int, workers: int, method: str) -> dict[str, Any]:
    """Returns the memory of a DataLoader's workers after they have read `count` random images together."""
    length = count if data is None else len(data)
    order = np.random.default_rng(1).permutation(length)[:count].tolist()
    loader = DataLoader(
        Reads(data, length),
        batch_size=64,
        sampler=order,
        num_workers=workers,
        multiprocessing_context=method,
        worker_init_fn=start_worker,
        persistent_workers=True,
    )
    pids = set()
    for batch in loader:
        pids |= set(batch["worker"].tolist())
    each = [memory(pid) for pid in sorted(pids)]
    parent = memory()
    mean = {key: round(statistics.mean(m[key] for m in each), 1) for key in ("rss", "pss", "own")}
    return {
        "workers": len(each),
        "worker_mean": mean,
        "worker_most_rss": max(m["rss"] for m in each),
        "parent": parent,
        "sum_pss": round(parent["pss"] + sum(m["pss"] for m in each), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--crops", type=int, default=400)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--part", choices=("open", "fork", "forkserver", "baseline"), default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    store = args.folder / "store"
    if args.part is None:
        if not (store / MANIFEST).exists():
            print("making the sparse store", file=sys.stderr)
            make(store, image_set(args.images), args.crops)
        for part in ("open", "baseline", "fork", "forkserver"):  # in separate processes, so that their memory is separate
            command = [sys.executable, __file__, "--part", part, *sys.argv[1:]]
            subprocess.run(command, check=True)
        return
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    result: dict[str, Any] = {"part": args.part}
    if args.part == "baseline":
        result |= loaders(None, args.reads, args.workers, "fork")
        print(json.dumps(result))
        return
    before, start, used = memory(), time.perf_counter(), time.process_time()
    opened = open_store(store)
    ended = time.perf_counter()
    result["open_store_s"] = round(ended - start, 2)
    result["open_store_cpu_s"] = round(time.process_time() - used, 2)
    opened.column(COLUMN).require_complete()
    images_ready = len(opened)
    result["rows_and_column_s"] = round(time.perf_counter() - ended, 2)
    result["all_cpu_s"] = round(time.process_time() - used, 2)
    after = memory()
    images = image_set(args.images)
    start = time.perf_counter()
    data = StoredCrops(opened, images, crops_per_image=4, column=COLUMN)
    result["data_set_s"] = round(time.perf_counter() - start, 2)
    del images
    if args.part == "open":
        result |= {
            "images": images_ready,
            "bytes_claimed": sum(p.stat().st_size for p in store.rglob("*") if p.is_file()),
            "memory_before": before,
            "memory_opened": after,
            **reading(data, args.reads, 0),
            "open_files": open_files(),
        }
    else:
        result |= loaders(data, args.reads, args.workers, args.part)
    print(json.dumps(result))


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
