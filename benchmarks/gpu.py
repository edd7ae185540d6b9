"""Measures what a GPU reaches, in under seven minutes on an H100, and makes a page of it.

    python benchmarks/gpu.py --images DIR > gpu.jsonl        # photographs, of about 500 x 375 pixels
    python benchmarks/gpu.py --page gpu.jsonl > docs/results/gpu.md

Prints one JSON line per section, even if other sections fail; --sections selects some. Hard links to a few images serve as a
large set.
Teachers have random weights, since only their size matters. Needs an installed fkd_ssl and no network. On a CPU, use --tiny,
which only shows that every section works (with TRITON_INTERPRET=1 also those that make crops on the GPU).
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import fkd_ssl
from fkd_ssl.commands import resolve
from fkd_ssl.crops import RECIPES, draw, image_key, replay_digest
from fkd_ssl.crops import replay as cpu_replay
from fkd_ssl.crops.device import PendingCrops, check_device, concatenate, plan_crops, replay_on, replay_plan
from fkd_ssl.data import Batch, FreshCrops, Loader, StoredCrops, replay_on_device, whole_batch
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.eval import knn, logreg, sweep
from fkd_ssl.images import ImageSource, decode, scan
from fkd_ssl.objectives import make_objective
from fkd_ssl.store import open_store
from fkd_ssl.store.write.precompute import Share, Summary, precompute
from fkd_ssl.students import Student
from fkd_ssl.targets.precision import uses_tf32
from fkd_ssl.teachers import Teacher
from fkd_ssl.teachers.resnet import Architecture, WidthResNet

Values = dict[str, Any]
CHUNK = 128
RECIPE = RECIPES["mocov2"]


@dataclass(frozen=True)
class Bench:
    """The machine, the images and the sizes of a run."""

    originals: ImageSource
    folder: Path
    device: torch.device
    tiny: bool

    @property
    def pixels(self) -> int:
        """Side of the crops."""
        return 32 if self.tiny else 224

    @property
    def workers(self) -> int:
        """Processes of a loader."""
        return 1 if self.tiny else max(1, min(14, resolve.cpu_threads() - 2))

    @property
    def threads(self) -> int:
        """Threads of precompute."""
        return min(16, resolve.cpu_threads())

    @cached_property
    def images(self) -> ImageSource:
        """Hard links to the originals, or copies where links are not possible."""
        count = 24 if self.tiny else 24_000
        links = self.folder / "images"
        links.mkdir()
        for k, (index, name) in enumerate(islice(cycle(enumerate(self.originals.names)), count)):
            link = links / f"{k:06}{Path(name).suffix}"
            source = Path(self.originals.where(index)).resolve()
            try:
                os.link(source, link)
            except OSError:
                shutil.copy(source, link)
        return scan(str(links))

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rate(self, work: Callable[[], object], items: int, seconds: float = 2.5) -> float:
        """Items per second of repeated calls, each of which handles `items`, after two calls that are not counted."""
        calls, each = 0, 1 if self.tiny else 4
        for _ in range(0 if self.tiny else 2):
            work()
        self.synchronize()
        started = time.perf_counter()
        while not calls or (time.perf_counter() - started < seconds and not self.tiny):
            for _ in range(each):
                work()
            self.synchronize()
            calls += each
        return calls * items / (time.perf_counter() - started)

    @cache  # noqa: B019
    def teacher(self, name: str, precision: Any) -> Teacher:
        """A ResNet-50 of width 1 or 4 with random weights, or a tiny network."""
        torch.manual_seed(0)
        width = 4 if name == "swav_w4" else 1
        network = Architecture(block=Bottleneck, depths=(3, 4, 6, 3), width=width, base_width=64)
        dim = 32 if self.tiny else 2048 * width
        small = [nn.Conv2d(3, 8, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        backbone = nn.Sequential(*small) if self.tiny else WidthResNet(network)
        head = nn.Linear(dim, 128)
        return Teacher(backbone, head, name=name, shape=(128,), precision=precision, feature_dim=dim).to(self.device)

    @cache  # noqa: B019
    def forward(self, name: str, precision: Any) -> float:
        """Crops per second of a teacher's forward pass on crops that are on its device."""
        crops = torch.randint(0, 256, (CHUNK, 3, self.pixels, self.pixels), dtype=torch.uint8, device=self.device)
        teacher, crops = self.teacher(name, precision), crops.contiguous(memory_format=torch.channels_last)
        return self.rate(lambda: teacher.embed(crops), CHUNK)


TEACHERS = (("resnet50", "bf16"), ("resnet50", "fp32"), ("swav_w4", "bf16"))


def bits(bench: Bench) -> Values:
    """Whether the GPU makes the CPU's pixels."""
    check_device(bench.device)
    if bench.tiny:
        image = decode(bench.originals.read(0), bench.originals.where(0))
        records = draw(RECIPE, image_key(0, "bits"), image.shape[0], image.shape[1], 0, 2)
        same = np.array_equal(replay_on(bench.device, image, records, bench.pixels), cpu_replay(image, records, bench.pixels))
        return {"same_pixels": same}
    return {"same_pixels": replay_digest(str(bench.device)) == replay_digest()}


def forward(bench: Bench) -> Values:
    """The bare teachers, with the data on the GPU."""
    rates = {f"{name} {precision}": round(bench.forward(name, precision), 1) for name, precision in TEACHERS}
    return {"crops_per_second": rates, "tf32": uses_tf32("fp32")}


def replay(bench: Bench) -> Values:
    """Crops made on the GPU from decoded images in memory: with plan and transfer, and alone."""
    check_device(bench.device)
    found: Values = {}
    for m, count in ((4, 1),) if bench.tiny else ((4, 64), (64, 8)):
        pending = []
        for index in range(min(count, len(bench.originals))):
            image = decode(bench.originals.read(index), bench.originals.where(index))
            records = draw(RECIPE, image_key(0, str(index)), image.shape[0], image.shape[1], 0, m)
            pending.append(PendingCrops(image=image, records=records))
        size, crops = sum(one.image.size for one in pending), m * len(pending)
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
        plan = plan_crops(pending, bench.pixels, concatenate(pending, pinned))
        there = plan.to(bench.device)

        def planned(pending: Any = pending, pinned: Tensor = pinned) -> object:
            return plan_crops(pending, bench.pixels, concatenate(pending, pinned))

        def moved(plan: Any = plan) -> object:
            return replay_plan(plan.to(bench.device, non_blocking=True))

        found[f"M={m}"] = {
            "plan_on_cpu": round(bench.rate(planned, crops)),
            "transfer_and_kernels": round(bench.rate(moved, crops)),
            "kernels": round(bench.rate(lambda there=there: replay_plan(there), crops)),  # type: ignore[misc]
            "bytes_an_image": size // len(pending),
        }
    return {"crops_per_second": found}


def store(bench: Bench) -> Values:
    """Precompute over the bare forward, without the codec's sample except at C = 4."""
    cases = [("resnet50", "bf16", c, on) for c in (64, 400, 4) for on in (False, True)]
    cases += [(name, precision, 64, on) for name, precision in TEACHERS[1:] for on in (False, True)]
    found = []
    for name, precision, crops, on in cases[:1] if bench.tiny else cases:
        bare = bench.forward(name, precision)
        count = max(4, min(len(bench.images), round(5 * bare / crops)))
        folder = bench.folder / f"store-{name}-{precision}-{crops}-{on}"
        options: Values = {
            "crops": 2 if bench.tiny else crops,
            "recipe": RECIPE,
            "pixels": bench.pixels,
            "limit": 4 if bench.tiny else count,
            "chunk_size": 8 if bench.tiny else CHUNK,
            "threads": bench.threads,
            "device": str(bench.device) if on else None,
            "progress": False,
        }

        def write(share: Share | None = None, **changes: Any) -> Summary:
            teacher = bench.teacher(name, precision)  # noqa: B023
            return precompute(bench.images, folder, teacher, **{**options, **changes}, share=share)  # noqa: B023

        if crops > 4:
            write(Share(index=2**61, of=2**62))  # the store and its codec, and no shard
        summary = write()
        rate = summary.crops / summary.seconds
        found.append(
            {
                "teacher": f"{name} {precision}",
                "C": crops,
                "device_crops": on,
                "crops_per_second": round(rate, 1),
                "over_bare": round(rate / bare, 3),
                "teacher_busy": round(summary.teacher_busy, 3),
                "stages": {stage: round(seconds / summary.seconds, 3) for stage, seconds in summary.stages.items()},
                "queue_bytes": summary.queue_bytes,
            }
        )
        shutil.rmtree(folder)
    return {"runs": found}


def loader(bench: Bench) -> Values:
    """Batches of fresh crops: replayed by the workers, decoded only, and decoded by the workers and made on the GPU."""
    check_device(bench.device)
    found: Values = {}
    for m in (4,) if bench.tiny else (4, 8):
        images = 2 if bench.tiny else 256 // m * 2
        for name, decode_only, on_device in (("cpu", False, False), ("decode", True, False), ("device", True, True)):
            data = FreshCrops(bench.images, RECIPE, crops_per_image=m, pixels=bench.pixels, decode_only=decode_only)
            steps = 1 if bench.tiny else 60
            batches = iter(_batches(bench, data, images, steps + 1, bench.workers))
            next(batches)  # the workers start
            started = time.perf_counter()
            for batch in batches:
                if on_device:
                    replay_on_device(move_data_to_device(batch, bench.device))
            bench.synchronize()
            found[f"{name} M={m}"] = round(steps * images * m / (time.perf_counter() - started), 1)
    return {"crops_per_second": found, "workers": bench.workers}


def _batches(bench: Bench, data: Any, images: int, steps: int, workers: int) -> Iterator[Batch]:
    return iter(Loader(data, PassSampler(len(data), images, steps, seed=0), workers=workers, collate=whole_batch, prefetch=4))


def train(bench: Bench) -> Values:
    """Students in bf16 with the data on the GPU, from a store (crops by 14 workers, and by 4 and the GPU), and online."""
    size, steps = (8, 1) if bench.tiny else (256, 40)
    folder = bench.folder / "train"
    teacher = bench.teacher("resnet50", "bf16")
    count = 4 if bench.tiny else 4096
    precompute(
        bench.images,
        folder,
        teacher,
        crops=4,
        recipe=RECIPE,
        pixels=bench.pixels,
        limit=count,
        threads=bench.threads,
        chunk_size=8 if bench.tiny else CHUNK,
        progress=False,
    )
    opened, found = open_store(folder), {}
    crops = torch.randint(0, 256, (size, 3, bench.pixels, bench.pixels), dtype=torch.uint8, device=bench.device)
    crops = crops.contiguous(memory_format=torch.channels_last)
    targets = nn.functional.normalize(torch.randn(size, 128, device=bench.device), dim=1)
    for name in ("squeezenet1_1",) if bench.tiny else ("resnet18", "resnet50"):
        student = Student(name, 128).to(bench.device, memory_format=torch.channels_last)
        objective, optimizer = make_objective("feature_kl"), torch.optim.Adam(student.parameters(), lr=1e-3)

        def step(images: Tensor, target: Tensor) -> None:
            optimizer.zero_grad()  # noqa: B023
            with torch.autocast(bench.device.type, dtype=torch.bfloat16):
                loss = objective(student(images), target)  # noqa: B023
            loss.backward()
            optimizer.step()  # noqa: B023

        def from_loader(workers: int, decode_only: bool, *, online: bool = False) -> float:
            data = StoredCrops(
                opened,
                bench.images,
                crops_per_image=4,
                pixels=bench.pixels,
                with_targets=not online,
                decode_only=decode_only,
            )
            batches = _batches(bench, data, size // 4, steps + 3, workers)
            started = 0.0
            for k, batch in enumerate(batches):
                if k == 3:
                    bench.synchronize()
                    started = time.perf_counter()
                batch = replay_on_device(move_data_to_device(batch, bench.device))
                step(batch["images"], teacher.embed(batch["images"]).clone() if online else batch["targets"])
            bench.synchronize()
            return steps * size / (time.perf_counter() - started)

        bare = bench.rate(lambda: step(crops, targets), size)
        alone = bench.forward("resnet50", "bf16")
        rates = {"bare": bare, "stored": from_loader(bench.workers, False)}
        rates["stored, device crops, 4 workers"] = from_loader(min(4, bench.workers), True)
        rates["online"] = from_loader(bench.workers, False, online=True)
        found[name] = {
            "crops_per_second": {key: round(rate, 1) for key, rate in rates.items()},
            "over_bare": {key: round(rate / bare, 3) for key, rate in rates.items()},
            "online_over_its_bound": round(rates["online"] * (1 / bare + 1 / alone), 3),
        }
    return found


def evaluate(bench: Bench) -> Values:
    """Nearest neighbours of 50,000 queries in 1.28 million features of 2048, and the probes on 100,000 features."""
    train, queries, dim = (512, 64, 32) if bench.tiny else (1_280_000, 50_000, 2048)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def features(count: int) -> Any:
        return torch.cat([torch.randn(n, dim, device=bench.device).cpu() for n in _parts(count, 65_536)]).numpy()

    rng = np.random.default_rng(0)
    bank, asked, labels = features(train), features(queries), rng.integers(0, 1000, train)
    started = time.perf_counter()
    knn.knn_predict(bank, labels, asked, 20, num_classes=1000, device=bench.device)
    values: Values = {"knn_seconds": round(time.perf_counter() - started, 2), "knn": f"{train:,} x {queries:,} x {dim}"}
    if bench.device.type == "cuda":
        values["knn_peak_bytes"] = torch.cuda.max_memory_allocated()
    few, classes = (256, 4) if bench.tiny else (100_000, 100)
    of_train, of_test = rng.integers(0, classes, few), rng.integers(0, classes, few // 10)
    given: Values = {"train_features": bank[:few], "train_labels": of_train, "features": bank[: few // 10], "labels": of_test}
    for name, probe in (("sweep", sweep), ("logreg", logreg)):
        started = time.perf_counter()
        fewer = {"rates": [0.1]} if bench.tiny and name == "sweep" else {}
        probe.evaluate(**given, **fewer, device=bench.device, progress=False)
        values[f"{name}_seconds"] = round(time.perf_counter() - started, 2)
    return values


def _parts(count: int, most: int) -> list[int]:
    return [min(most, count - start) for start in range(0, count, most)]


SECTIONS: dict[str, Callable[[Bench], Values]] = {
    "bits": bits,
    "forward": forward,
    "replay": replay,
    "precompute": store,
    "loader": loader,
    "train": train,
    "eval": evaluate,
}


def machine(bench: Bench, images: str) -> Values:
    """What the figures were taken with."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"CPU {platform.machine()}"
    versions = {"fkd_ssl": fkd_ssl.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"device": name, "cores": resolve.cpu_threads(), "images": len(bench.originals), "tiny": bench.tiny, **versions}


def page(lines: list[Values]) -> str:
    """Renders the sections as Markdown: a table of each section's figures, with the goals of precompute."""
    text = ["# Figures on a GPU", "", "Made by `benchmarks/gpu.py --page` from its output.", ""]
    for line in lines:
        title, seconds = line.pop("section"), line.pop("seconds", None)
        text += [f"## {title}", "", *([] if seconds is None else [f"{SECTIONS[title].__doc__} ({seconds:g} s)", ""])]
        rows = line.pop("runs", None)
        if rows:
            keys = [key for key in rows[0] if key not in ("stages", "queue_bytes")]
            stages = list(rows[0]["stages"])
            text += [f"| {' | '.join([*keys, *stages])} |", "|---" * (len(keys) + len(stages)) + "|"]
            text += [f"| {' | '.join(str(v) for v in [*(r[k] for k in keys), *r['stages'].values()])} |" for r in rows]
        if line:
            text += ["| what | figure |", "|---|---|", *(f"| {key} | {value} |" for key, value in _flat(line))]
        text.append("")
    return "\n".join(text)


def _flat(values: Values, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}: ")
        else:
            yield f"{prefix}{key}", f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of photographs")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, which only show that every section works")
    parser.add_argument("--page", metavar="FILE", help="print the page of an earlier run's lines instead")
    args = parser.parse_args()
    if args.page is not None:
        print(page([json.loads(line) for line in Path(args.page).read_text().splitlines()]))
        return
    if args.images is None:
        parser.error("--images is needed")
    failed = False
    originals = scan(args.images)
    # links must be on the disk of the images
    with tempfile.TemporaryDirectory(prefix=".fkd-ssl-gpu-", dir=_writable(Path(args.images).resolve().parent)) as folder:
        bench = Bench(originals, Path(folder), resolve.device(), args.tiny)
        print(json.dumps({"section": "machine", **machine(bench, args.images)}), flush=True)
        for name in args.sections:
            started = time.perf_counter()
            try:
                values = SECTIONS[name](bench)
            except Exception as error:  # the other sections still run
                traceback.print_exc()
                failed, values = True, {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            print(json.dumps({"section": name, "seconds": round(time.perf_counter() - started, 1), **values}), flush=True)
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    sys.exit(failed)


def _writable(folder: Path) -> Path | None:
    return folder if os.access(folder, os.W_OK) else None


if __name__ == "__main__":
    main()
