"""Kills precompute many times at random moments, and compares the store with that of an uninterrupted run.

    python benchmarks/kill_precompute.py --kills 100

Several processes write one store of two teachers over an embedded image set. Each is killed (SIGKILL) at a random moment and
replaced by a process with another share of the shards, until the store is complete; then the next store begins. Prints a
line per kill, and for each store the digest of all its files, that of the uninterrupted run, and the number of forwards
lost.
"""

import argparse
import hashlib
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fkd_ssl import glyphs, images
from fkd_ssl.crops import RECIPES
from fkd_ssl.store import manifest, open_store
from fkd_ssl.store.maintain.verify import verify
from fkd_ssl.store.write import work
from fkd_ssl.store.write.precompute import Share, precompute
from fkd_ssl.teachers import Teacher

COUNT, CROPS, ROWS = 240, 16, 24
UNFINISHED = 7  # exit status of a process that left shards to others


class Counted(Teacher):
    """A small random network that writes a byte to a file for every forward, so that those of killed processes count too."""

    def __init__(self, seed: int, log: Path, pause: float) -> None:
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        super().__init__(backbone, nn.Linear(128, 32), name=f"random{seed}", dim=32, network="random", pixels=32)
        self._log = log
        self._pause = pause

    def embed(self, views: torch.Tensor) -> torch.Tensor:
        """Returns targets of crops, slowly."""
        targets = super().embed(views)
        time.sleep(self._pause)
        with self._log.open("ab") as file:
            file.write(b".")
        return targets


def write(pictures: Path, store: Path, log: Path, pause: float, share: Share | None) -> None:
    """One process of a precompute."""
    torch.set_num_threads(1)
    manifest.ROWS_PER_SHARD = ROWS
    work.SECONDS_BETWEEN_JOURNALS = 0.2
    os.environ["TQDM_DISABLE"] = "1"
    teachers = [Counted(seed, log, pause) for seed in (0, 1)]
    summary = precompute(
        images.scan(pictures),
        store,
        teachers,
        crops=CROPS,
        recipe=RECIPES["mocov2"],
        pixels=[32, 40],
        chunk_size=50,
        threads=1,
        share=share,
        progress=False,
    )
    if summary.busy or summary.left:
        sys.exit(UNFINISHED)


def digest(store: Path) -> str:
    """Returns the sha256 over names and bytes of a store's files, without temporary files of killed processes."""
    total = hashlib.sha256()
    for path in sorted(store.rglob("*")):
        if path.is_file() and not any(part.startswith(".tmp-") for part in path.relative_to(store).parts):
            total.update(f"{path.relative_to(store)}\n".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--longest", type=float, default=3.0, help="maximum seconds before a process is killed")
    parser.add_argument(
        "--pause", type=float, default=0.03, help="seconds added to each forward, so that kills happen during it"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(["torch", "faiss", "cv2", "fkd_ssl.store.write.precompute", "fkd_ssl.teachers"])
    chance = random.Random(args.seed)
    print(f"python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, {platform.system()}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pictures = folder / "images"
        glyphs.make_glyphs(pictures, train_per_class=COUNT // 10, val_per_class=1, pixels=48, progress=False)
        pictures /= "train"

        def start(store: Path, log: Path, share: Share | None, pause: float) -> Any:
            process = context.Process(target=write, args=(pictures, store, log, pause, share))
            process.start()
            return process

        start(folder / "straight", folder / "needed", None, 0.0).join()
        needed, expected = (folder / "needed").stat().st_size, digest(folder / "straight")
        print(f"uninterrupted: {COUNT} images x {CROPS} crops, 2 teachers, {needed} forwards, digest {expected[:16]}")
        kills, stores, forwards, wrong = 0, 0, 0, 0
        while kills < args.kills:
            stores += 1
            store, log = folder / f"store{stores}", folder / f"log{stores}"
            done = False
            while not done:
                k = chance.randrange(3)
                shares = [None, Share(index=k, of=3), Share(index=k, of=3, helps=True)]
                running = [start(store, log, chance.choice(shares), args.pause) for _ in range(args.processes)]
                for process in running:
                    lived = chance.uniform(0.05, args.longest)
                    process.join(lived)
                    if process.is_alive():
                        os.kill(process.pid, signal.SIGKILL)
                        process.join()
                        kills += 1
                        there = len(list(store.glob("targets/*/codes-*.json")))
                        print(f"kill {kills}: after {lived:.2f} s, {there} of {2 * COUNT // ROWS} shards done", flush=True)
                    elif process.exitcode not in (0, UNFINISHED):
                        sys.exit(f"a process ended with status {process.exitcode}")
                done = any(process.exitcode == 0 for process in running)
            seen = log.stat().st_size
            problems = verify(open_store(store), images.scan(pictures)).problems
            same = digest(store) == expected
            wrong += bool(problems) or not same
            forwards += seen - needed
            print(
                f"store {stores}: digest {digest(store)[:16]}, {'equal' if same else 'OTHER'}; verify: {len(problems)} "
                f"problems; {seen} forwards, {seen - needed} more than needed",
                flush=True,
            )
        print(f"{kills} kills, {stores} stores, {wrong} of them wrong; {forwards / kills:.2f} forwards lost a kill")
        sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
