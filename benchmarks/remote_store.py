"""Crops per second from a store on a web server with added latency, as a share of the speed from its local copy.

    python benchmarks/remote_store.py --folder DIR [--shards 4] [--crops 100] [--workers 2] [--rounds 3] [--latency 0 20 100]

The store has random targets and is made without a teacher; its images are one picture of 256 pixels under many names. It is
published to a folder that a server process on this machine serves; each answer waits for the latency. A pass reads 4 crops of
every image in the order of a training, and fetches ahead as a training does. The first pass begins with an empty cache and
includes opening the store; the warm pass is a new one with a full cache. Each figure is the best of --rounds.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE, RECIPES, draw, image_key, replay_digest
from fkd_ssl.data import StoredCrops, whole_batch
from fkd_ssl.data.loading import Loader
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.fetching import MIXED, fetched_folder
from fkd_ssl.images import ImageSource
from fkd_ssl.store import manifest as layout
from fkd_ssl.store import open_store
from fkd_ssl.store.column import ColumnMeta
from fkd_ssl.store.exchange.upload import publish
from fkd_ssl.store.listing import SIZE_DTYPE
from fkd_ssl.store.write.creation import write_codes, write_crops, write_lists
from fkd_ssl.targets import TargetSpec, TeacherInfo

DIM, SIDE, BATCH_IMAGES = 128, 256, 64


class Copies(ImageSource):
    """One picture under many names."""

    def __init__(self, count: int) -> None:
        super().__init__("copies", (f"{k:07d}.jpg" for k in range(count)), np.zeros(count), ["all"])
        noise = np.random.default_rng(0).integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
        self.data = cv2.imencode(".jpg", cv2.resize(noise, (SIDE, SIDE)))[1].tobytes()

    def read(self, index: int) -> bytes:
        """Returns the picture."""
        return self.data


def make(folder: Path, images: Copies, crops: int) -> None:
    """Writes the store."""
    sizes = np.zeros(len(images), dtype=SIZE_DTYPE)
    sizes["bytes"], sizes["width"], sizes["height"] = len(images.data), SIDE, SIDE
    column = folder / layout.TARGETS / "random"
    for part in (folder / layout.CROPS, column):
        part.mkdir(parents=True)
    lists = write_lists(folder, images, sizes)
    recipe, rows_per_shard = RECIPES["mocov2"], layout.ROWS_PER_SHARD
    manifest = layout.Manifest(seed=0, recipe=recipe, crops_per_image=crops, rows_per_shard=rows_per_shard, **lists)
    manifest.write(folder)
    meta = ColumnMeta(
        codec="SQfp16",
        code_size=2 * DIM,
        fidelity={"cosine_mean": 1.0, "cosine_min": 1.0, "sample": 1},
        teacher=TeacherInfo(name="random", spec=TargetSpec("embedding", (DIM,)), network="none", licence="none", pixels=64),
        chunk_size=128,
        replay_digest=replay_digest(),
        arrays={},
    )
    files.write_json(column / "meta.json", meta.to_json())
    digest, generator = files.sha256(files.canonical(meta.to_json())), np.random.default_rng(0)
    some = np.stack([draw(recipe, image_key(0, str(k)), SIDE, SIDE, 0, crops) for k in range(64)])
    for shard in range(manifest.shards):
        rows = len(manifest.shard_rows(shard))
        records: Any = some[generator.integers(0, len(some), rows)].astype(CROP_DTYPE)
        write_crops(folder, manifest, shard, records, [files.sha256(images.data)] * rows)
        codes = generator.normal(size=(rows, crops, DIM)).astype(np.float16).view(np.uint8)
        write_codes(folder, manifest, shard, codes, column=column.name, digest=digest)


def serve(root: Path, latency: float, port: Connection) -> None:
    """Serves a folder; sends its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(latency)
            path = root / self.path.lstrip("/")
            data = path.read_bytes() if path.is_file() else b""
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(span[1]), int(span[2])) if span else (0, len(data))
            part = data[first : last + 1]
            self.send_response(206 if path.is_file() else 404)
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.send(server.server_port)
    server.serve_forever()


def read(where: str | Path, images: Copies, workers: int) -> float:
    """Returns the crops per second of a pass, with the opening of the store."""
    began = time.perf_counter()
    data = StoredCrops(open_store(where), images, crops_per_image=4, pixels=64)
    steps = len(data) // BATCH_IMAGES
    sampler = PassSampler(len(data), BATCH_IMAGES, steps, seed=0, groups=data.groups, mix=MIXED, expect=data.expect)
    count = sum(len(batch["targets"]) for batch in Loader(data, sampler, workers=workers, collate=whole_batch, prefetch=4))
    return count / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--crops", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 20, 100], help="milliseconds")
    args = parser.parse_args()
    os.environ["FKD_SSL_CACHE"] = str(args.folder / "cache")
    images, store, public = Copies(args.shards * layout.ROWS_PER_SHARD), args.folder / "store", args.folder / "public"
    if args.folder.exists():
        parser.error(f"{args.folder} exists; choose a new --folder")
    make(store, images, args.crops)
    began = time.perf_counter()
    done = publish(open_store(store), str(public / "set"), log=lambda line: None)
    seconds = time.perf_counter() - began
    print(
        f"published {len(done.files.files)} files, {done.files.total:,} bytes, in {seconds:.1f} s with the check of all files"
    )
    began = time.perf_counter()
    sent = publish(open_store(store), str(public / "set"), log=lambda line: None).sent
    print(f"again: {sent} files sent, in {time.perf_counter() - began:.1f} s")
    print("\n| added latency | local, crops/s | first pass | share | warm | share |\n|---|---|---|---|---|---|", flush=True)
    read(store, images, args.workers)
    for latency in args.latency:
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.Process(target=serve, args=(public, latency / 1000, theirs), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{ours.recv()}/set"
        speeds = []
        for _ in range(args.rounds):
            shutil.rmtree(fetched_folder(), ignore_errors=True)
            speeds.append([read(where, images, args.workers) for where in (store, url, url)])
        server.terminate()
        local, first, warm = np.max(speeds, axis=0)
        line = f"| {latency:g} ms | {local:,.0f} | {first:,.0f} | {first / local:.2f} | {warm:,.0f} | {warm / local:.2f} |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
