"""Measures what a GPU reaches, in under seven minutes on an H100, and makes a page of it.

    python benchmarks/gpu.py --images DIR > gpu.jsonl        # photographs, of about 500 x 375 pixels
    python benchmarks/gpu.py --page gpu.jsonl > docs/results/gpu.md

Prints one JSON line per section, even if other sections fail; a section that fails prints what it had measured. --sections
selects some. Links to a few images serve as a large set. Teachers have random weights, since only their size matters.
Needs an installed fkd_ssl and no network; only crops on the GPU need a C compiler, with which Triton starts its kernels. On a
CPU, use --tiny, which only shows that every section works (with TRITON_INTERPRET=1 also those that make crops on the GPU).
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import cycle, islice, product
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
from fkd_ssl.data import FreshCrops, Loader, StoredCrops, replay_on_device, whole_batch
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.eval import features, knn, logreg, sweep
from fkd_ssl.images import ImageSource, decode, scan
from fkd_ssl.objectives import make_objective
from fkd_ssl.store import open_store
from fkd_ssl.store.write.precompute import Share, precompute
from fkd_ssl.students import Student
from fkd_ssl.targets.precision import uses_tf32
from fkd_ssl.teachers import Teacher
from fkd_ssl.teachers.resnet import Architecture, WidthResNet
from fkd_ssl.training.config import TrainConfig
from fkd_ssl.training.engine import train as fit
from fkd_ssl.training.metrics import METRICS, read_metrics

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
        """Links to the originals."""
        count = 24 if self.tiny else 24_000
        links = self.folder / "images"
        links.mkdir()
        for k, (index, name) in enumerate(islice(cycle(enumerate(self.originals.names)), count)):
            (links / f"{k:06}{Path(name).suffix}").symlink_to(Path(self.originals.where(index)).resolve())
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


def bits(bench: Bench, found: Values) -> None:
    """Whether the GPU makes the CPU's pixels. On the first run, Triton compiles its kernels."""
    check_device(bench.device)
    if bench.tiny:
        image = decode(bench.originals.read(0), bench.originals.where(0))
        records = draw(RECIPE, image_key(0, "bits"), image.shape[0], image.shape[1], 0, 2)
        made = replay_on(bench.device, image, records, bench.pixels)
        found["same_pixels"] = np.array_equal(made, cpu_replay(image, records, bench.pixels))
    else:
        found["same_pixels"] = replay_digest(str(bench.device)) == replay_digest()


def forward(bench: Bench, found: Values) -> None:
    """The bare teachers, with the data on the GPU."""
    found |= {"tf32": uses_tf32("fp32"), "crops_per_second": {}}
    for name, precision in TEACHERS:
        found["crops_per_second"][f"{name} {precision}"] = round(bench.forward(name, precision), 1)


def replay(bench: Bench, found: Values) -> None:
    """Crops made on the GPU from decoded images in memory: with plan and transfer, and alone."""
    check_device(bench.device)
    found["crops_per_second"] = {}
    for m, count in ((4, 1),) if bench.tiny else ((4, 64), (64, 8)):
        pending = []
        for index in range(min(count, len(bench.originals))):
            image = decode(bench.originals.read(index), bench.originals.where(index))
            records = draw(RECIPE, image_key(0, str(index)), image.shape[0], image.shape[1], 0, m)
            pending.append(PendingCrops(image=image, records=records))
        size, crops = sum(one.image.size for one in pending), m * len(pending)
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
        plan = plan_crops(pending, bench.pixels, concatenate(pending, pinned))
        plan = plan.pin_memory() if bench.device.type == "cuda" else plan
        there = plan.to(bench.device)

        def planned(pending: Any = pending, pinned: Tensor = pinned) -> object:
            return plan_crops(pending, bench.pixels, concatenate(pending, pinned))

        def moved(plan: Any = plan) -> object:
            return replay_plan(plan.to(bench.device))

        found["crops_per_second"][f"M={m}"] = {
            "plan_on_cpu": round(bench.rate(planned, crops)),
            "transfer_and_kernels": round(bench.rate(moved, crops)),
            "kernels": round(bench.rate(lambda there=there: replay_plan(there), crops)),  # type: ignore[misc]
            "bytes_an_image": size // len(pending),
        }


def store(bench: Bench, found: Values) -> None:
    """Precompute over the bare forward, without the codec's sample except at C = 4; first without crops on the GPU."""
    cases = [("resnet50", "bf16", c) for c in (64, 400, 4)] + [(*teacher, 64) for teacher in TEACHERS[1:]]
    found["runs"] = []
    for on in (False, True):
        if on:
            check_device(bench.device)
        for name, precision, crops in cases[:1] if bench.tiny else cases:
            found["runs"].append(_precomputed(bench, name, precision, crops, device_crops=on))


def _precomputed(bench: Bench, name: str, precision: str, crops: int, *, device_crops: bool) -> Values:
    bare, teacher = bench.forward(name, precision), bench.teacher(name, precision)
    folder = bench.folder / f"store-{name}-{precision}-{crops}-{device_crops}"
    options: Values = {
        "crops": 2 if bench.tiny else crops,
        "recipe": RECIPE,
        "pixels": bench.pixels,
        "limit": 4 if bench.tiny else max(4, min(len(bench.images), round(6 * bare / crops))),
        "chunk_size": 8 if bench.tiny else CHUNK,
        "threads": bench.threads,
        "device": str(bench.device) if device_crops else None,
        "progress": False,
    }
    if crops > 4:
        share = Share(index=2**61, of=2**62)  # the store and its codec, and no shard
        precompute(bench.images, folder, teacher, **options, share=share)
    summary = precompute(bench.images, folder, teacher, **options)
    shutil.rmtree(folder)
    rate = summary.crops / summary.seconds
    return {
        "teacher": f"{name} {precision}",
        "C": crops,
        "device_crops": device_crops,
        "crops_per_second": round(rate, 1),
        "over_bare": round(rate / bare, 3),
        "teacher_busy": round(summary.teacher_busy, 3),
        "stages": {stage: round(seconds / summary.seconds, 3) for stage, seconds in summary.stages.items()},
        "queue_bytes": summary.queue_bytes,
    }


def loader(bench: Bench, found: Values) -> None:
    """Batches of fresh crops: replayed by the workers, decoded only, and decoded by the workers and made on the GPU."""
    found |= {"workers": bench.workers, "crops_per_second": {}}
    variants = (("cpu", False, False), ("decode", True, False), ("device", True, True))
    for (name, decode_only, on_device), m in product(variants, (4,) if bench.tiny else (4, 8)):
        if on_device:
            check_device(bench.device)
        data = FreshCrops(bench.images, RECIPE, crops_per_image=m, pixels=bench.pixels, decode_only=decode_only)
        images, rounds = 2 if bench.tiny else 256 // m, 1 if bench.tiny else 8
        sampler = PassSampler(len(data), images, (1 + rounds) * bench.workers, seed=0)
        batches = iter(Loader(data, sampler, workers=bench.workers, collate=whole_batch, prefetch=4))
        started = 0.0
        for step, batch in enumerate(batches, start=1):
            if on_device:
                replay_on_device(move_data_to_device(batch, bench.device))
            if step == bench.workers:  # each worker has begun its second batch
                bench.synchronize()
                started = time.perf_counter()
        bench.synchronize()
        crops = rounds * bench.workers * images * m
        found["crops_per_second"][f"{name} M={m}"] = round(crops / (time.perf_counter() - started), 1)


def train(bench: Bench, found: Values) -> None:
    """Students in bf16 with the data on the GPU, trained on a store (crops by 14 workers, and by 4 and the GPU), and online."""
    size, count = (8, 4) if bench.tiny else (256, 4096)
    folder, teacher = bench.folder / "train", bench.teacher("resnet50", "bf16")
    options: Values = {"threads": bench.threads, "chunk_size": 8 if bench.tiny else CHUNK, "progress": False}
    precompute(bench.images, folder, teacher, crops=4, recipe=RECIPE, pixels=bench.pixels, limit=count, **options)
    runs: dict[str, Values] = {
        "stored": {},
        "online": {"targets": "online"},
        "stored, device crops, 4 workers": {"device_crops": "on", "workers": min(4, bench.workers)},
    }
    for name in ("squeezenet1_1",) if bench.tiny else ("resnet18", "resnet50"):
        rates = {"bare": _bare_training(bench, name, size)}
        values = found[name] = {"crops_per_second": rates, "over_bare": {}}
        for key, changes in runs.items():
            if "device_crops" in changes:
                check_device(bench.device)
            rates[key] = _trained(bench, folder, name, size, bench.folder / f"{name}, {key}", **changes)
            values["over_bare"][key] = round(rates[key] / rates["bare"], 3)
        bound = 1 / (1 / rates["bare"] + 1 / bench.forward("resnet50", "bf16"))
        values["online_over_its_bound"] = round(rates["online"] / bound, 3)


def _bare_training(bench: Bench, name: str, size: int) -> float:
    student = Student(name, 128).to(bench.device, memory_format=torch.channels_last)
    objective, optimizer = make_objective("feature_kl"), torch.optim.Adam(student.parameters(), lr=1e-3)
    crops = torch.randint(0, 256, (size, 3, bench.pixels, bench.pixels), dtype=torch.uint8, device=bench.device)
    crops = crops.contiguous(memory_format=torch.channels_last)
    targets = nn.functional.normalize(torch.randn(size, 128, device=bench.device), dim=1)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            loss = objective(student(crops), targets)
        loss.backward()
        optimizer.step()

    return round(bench.rate(step, size), 1)


def _trained(bench: Bench, store: Path, student: str, size: int, run: Path, **changes: Any) -> float:
    """Crops per second of `fkd-ssl train` in the second half of its steps, when no batch of the start is left."""
    opened, steps = open_store(store), 2 if bench.tiny else 120
    options: Values = {
        "student": student,
        "batch_size": size,
        "pixels": bench.pixels,
        "epochs": steps * size / len(opened),
        "precision": "bf16-mixed",
        "workers": bench.workers,
        "log_every": steps // 2,
        **({"teacher": "resnet50"} if "targets" in changes else {"store": str(store)}),
        **changes,
    }
    config = TrainConfig(images=bench.images.spec, out=str(run), **options)
    data = StoredCrops(
        opened,
        bench.images,
        pixels=bench.pixels,
        with_targets="targets" not in changes,
        decode_only=config.device_crops == "on",
    )
    run.mkdir()
    teacher = bench.teacher("resnet50", "bf16")
    fit(config, data, run, targets=[opened.column().info], embeds=[teacher.embed] if "targets" in changes else None)
    return float(read_metrics(run / METRICS)[-1]["crops_per_second"] or 0)


def evaluate(bench: Bench, found: Values) -> None:
    """Features of images; neighbours of 50,000 queries in 1.28 million features of 2048; the probes on 100,000 features."""
    started = time.perf_counter()
    teacher = bench.teacher("resnet50", "bf16")
    rows, _ = features.extract_rows(teacher.features, bench.images, pixels=bench.pixels, workers=bench.workers, progress=False)
    found["features_per_second"] = round(len(rows) / (time.perf_counter() - started), 1)
    train, queries, dim = (512, 64, 32) if bench.tiny else (1_280_000, 50_000, 2048)
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
    rng = np.random.default_rng(0)
    bank, asked, labels = _random(bench, train, dim), _random(bench, queries, dim), rng.integers(0, 1000, train)
    started = time.perf_counter()
    knn.knn_predict(bank, labels, asked, 20, num_classes=1000, device=bench.device)
    found |= {"knn_seconds": round(time.perf_counter() - started, 2), "knn": f"{train:,} x {queries:,} x {dim}"}
    if bench.device.type == "cuda":
        found["knn_peak_bytes"] = torch.cuda.max_memory_allocated() - before
    few, classes = (256, 4) if bench.tiny else (100_000, 100)
    of_train, of_test = rng.integers(0, classes, few), rng.integers(0, classes, few // 10)
    given: Values = {"train_features": bank[:few], "train_labels": of_train, "features": bank[: few // 10], "labels": of_test}
    for name, probe in (("sweep", sweep), ("logreg", logreg)):
        started = time.perf_counter()
        fewer = {"rates": [0.1]} if bench.tiny and name == "sweep" else {}
        probe.evaluate(**given, **fewer, device=bench.device, progress=False)
        found[f"{name}_seconds"] = round(time.perf_counter() - started, 2)


def _random(bench: Bench, count: int, dim: int) -> Any:
    """Random features float32 [count, dim] in the memory of the CPU, made on the GPU, which is much faster."""
    made, at_once = np.empty((count, dim), dtype=np.float32), 65_536
    for start in range(0, count, at_once):
        made[start : start + at_once] = torch.randn(min(at_once, count - start), dim, device=bench.device).cpu()
    return made


SECTIONS: dict[str, Callable[[Bench, Values], None]] = {
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


def goals(lines: list[Values]) -> Iterator[tuple[str, str, str]]:
    """Work, its figure and its goal on an H100 with 16 cores, for the sections that were measured."""
    found = {line["section"]: line for line in lines}
    rates = found.get("loader", {}).get("crops_per_second", {})
    for run in found.get("precompute", {}).get("runs", []):
        work = f"precompute, {run['teacher']}, C = {run['C']}, crops on the {'GPU' if run['device_crops'] else 'CPU'}, over "
        if run["C"] > 4:
            goal = {"resnet50 bf16": 0.95 if run["device_crops"] else 0.9, "swav_w4 bf16": 0.97}.get(run["teacher"], 0.95)
            yield f"{work}the bare forward", str(run["over_bare"]), str(goal)
        elif "decode M=4" in rates:
            decoded = rates["decode M=4"] / found["loader"]["workers"] * min(16, found["machine"]["cores"])
            yield f"{work}decoding by all cores", f"{run['crops_per_second'] / decoded:.3f}", "0.7"
    made = found.get("replay", {}).get("crops_per_second", {}).get("M=4", {})
    if "transfer_and_kernels" in made:
        yield "crops a second on the GPU, M = 4, transfer included", f"{made['transfer_and_kernels']:,}", "100,000"
    if "device M=4" in rates:
        yield "loader, crops on the GPU over CPU, M = 4", f"{rates['device M=4'] / rates['cpu M=4']:.3f}", "1.4"
    for student, stored in (("resnet18", "0.97"), ("resnet50", "0.99")):
        values = found.get("train", {}).get(student, {})
        for key, ratio in values.get("over_bare", {}).items():
            if key != "online":
                yield f"{student}, {key}, over bare", str(ratio), stored
        if "online_over_its_bound" in values:
            yield f"{student}, online over its bound", str(values["online_over_its_bound"]), "0.95"
    if "knn_seconds" in found.get("eval", {}):
        yield f"seconds of kNN, {found['eval']['knn']}", str(found["eval"]["knn_seconds"]), "at most 60"


def page(lines: list[Values]) -> str:
    """Renders the goals and the sections as Markdown tables."""
    text = ["# Figures on a GPU", "", "Made by `benchmarks/gpu.py --page` from its output.", ""]
    text += ["| work | figure | goal |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in goals(lines)), ""]
    for line in lines:
        title, seconds = line.pop("section"), line.pop("seconds", None)
        text += [f"## {title}", "", *([] if seconds is None else [f"{SECTIONS[title].__doc__} ({seconds:g} s)", ""])]
        rows = line.pop("runs", None)
        if rows:
            keys = [key for key in rows[0] if key not in ("stages", "queue_bytes")]
            stages = list(rows[0]["stages"])
            text += [f"| {' | '.join([*keys, *stages])} |", "|---" * (len(keys) + len(stages)) + "|"]
            text += [f"| {' | '.join(str(v) for v in [*(r[k] for k in keys), *r['stages'].values()])} |" for r in rows]
            text.append("")
        if line:
            text += ["| what | figure |", "|---|---|", *(f"| {key} | {value} |" for key, value in _flat(line)), ""]
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
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(originals, Path(folder), resolve.device(), args.tiny)
        print(json.dumps({"section": "machine", **machine(bench, args.images)}), flush=True)
        for name in args.sections:
            started, values = time.perf_counter(), Values()
            try:
                SECTIONS[name](bench, values)
            except Exception as error:  # the other sections still run
                traceback.print_exc()
                failed, values["error"] = True, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(json.dumps({"section": name, "seconds": round(time.perf_counter() - started, 1), **values}), flush=True)
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
