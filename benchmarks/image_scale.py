"""Images at the scale of ten million: the time and memory of opening them, and the cost of the order of a training step.

    python benchmarks/image_scale.py --folder DIR [--images 10000000] [--tars 1000] [--batch 256] [--json]

The tars are sparse files without content, and the indexes of their members are written to a cache folder as after a first
opening. `names` has the names in the order of the tars, as `fkd-ssl cache` writes them; `dealt` deals the names out to the tars
in turn, so that opening has to sort them. A list file of the same names is opened, too. Each measurement is a process of its
own, and its memory is the peak of its resident set, with Python and all libraries. Seconds with cpu in their name, and those of
steps, are processor time, which other jobs on the machine change less. The order is that of `PassSampler`, with the images of
16 tars mixed at a time.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fkd_ssl.images import Names, open_images
from fkd_ssl.images.shards import LocalShard
from fkd_ssl.images.tars import TarIndex, index_file, keep_index

_BYTES = 110_000  # of an image


def make(folder: Path, images: int, tars: int, *, dealt: bool) -> None:
    """Writes sparse tars and their indexes."""
    folder.mkdir(parents=True)
    for k in range(tars):
        rows = range(k, images, tars) if dealt else range(images * k // tars, images * (k + 1) // tars)
        path = folder / f"{k:05d}.tar"
        with path.open("wb") as file:
            file.truncate(len(rows) * (_BYTES + 512))
        os.utime(path, (1, 1))
        spans = np.stack([np.arange(len(rows)) * (_BYTES + 512) + 512, np.full(len(rows), _BYTES)], axis=1)
        names = Names(f"{i * 1000 // images:04d}/{i:09d}.jpg" for i in rows)
        labels = Names(str(i * 1000 // images) for i in rows)
        keep_index(index_file(LocalShard(path).stamp()[0]), TarIndex(names=names, spans=spans, labels=labels))


def measure(spec: str, batch: int) -> dict[str, float]:
    """Opens the images and orders them; in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, processor = time.perf_counter(), time.process_time()
    images = open_images(spec)
    opened, processor = time.perf_counter() - started, time.process_time() - processor
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "images": len(images),
        "open_s": opened,
        "open_cpu_s": processor,
        "peak_MB": memory / 1000,
        "libraries_MB": before / 1000,
    }
    from fkd_ssl.data.sampler import PassSampler  # imports torch, whose memory would count above

    passes = 2
    sampler = PassSampler(
        len(images), batch, passes * (len(images) // batch), seed=0, groups=images.groups(np.arange(len(images))), mix=16
    )
    times = np.empty(sampler.steps)
    for step in range(sampler.steps):
        started = time.process_time()
        sampler.batch(step)
        times[step] = time.process_time() - started
    found |= {
        "step_ms_mean": times.mean() * 1e3,
        "step_ms_median": float(np.median(times)) * 1e3,
        "first_of_pass_s": times.max(),
    }
    started = time.process_time()
    images.identity(sizes=False)
    return {**found, "identity_cpu_s": time.process_time() - started}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="made anew; needs about 1 GB")
    parser.add_argument("--images", type=int, default=10**7)
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.batch)))
        return
    os.environ["FKD_SSL_CACHE"] = str(options.folder / "cache")
    for name, dealt in (("names", False), ("dealt", True)):
        make(options.folder / name, options.images, options.tars, dealt=dealt)
    listed = options.folder / "list" / "all.txt"
    listed.parent.mkdir()
    with listed.open("w") as file:
        file.writelines(f"{i * 1000 // options.images:04d}/{i:09d}.jpg\n" for i in range(options.images))
    results = {}
    for spec in (options.folder / "names", options.folder / "dealt", listed):
        command = [
            sys.executable,
            __file__,
            "--folder",
            str(options.folder),
            "--batch",
            str(options.batch),
            "--measure",
            str(spec),
        ]
        found = results[spec.name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        if not options.json:
            print(spec.name, " ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
