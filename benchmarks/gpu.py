"""Measures what a GPU reaches, in about seven minutes, and makes a page of it.

    python benchmarks/gpu.py --images DIR > gpu.jsonl        # photographs, of about 500 x 375 pixels
    python benchmarks/gpu.py --page gpu.jsonl > docs/results/gpu.md

Prints one JSON line per section. A measurement that fails is listed in the section's errors, and the others are still made; so
are the other sections after an error that leaves the GPU unusable, in a new process. A measurement that would begin after its
section's share of the time is left out. --sections selects some. Links to a few images serve as a large set. Teachers have
random weights, since only their size matters. Needs an installed fkd_ssl and no network; only measurements with crops on the
GPU need a C compiler, with which Triton starts its kernels. On a CPU, use --tiny, which only shows that every section works
(with TRITON_INTERPRET=1 also those measurements).
"""

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from fkd_ssl.commands import resolve
from fkd_ssl.crops import RECIPES, Recipe, draw, image_key, replay_digest
from fkd_ssl.crops import replay as cpu_replay
from fkd_ssl.crops.device import CropPlan, PendingCrops, check_device, concatenate, plan_crops, replay_on, replay_plan
from fkd_ssl.data import FreshCrops, Loader, StoredCrops, replay_on_device, whole_batch
from fkd_ssl.data.sampler import PassSampler
from fkd_ssl.errors import RequestError
from fkd_ssl.eval import features, knn, logreg, sweep
from fkd_ssl.images import ImageSource, decode, scan
from fkd_ssl.objectives import make_objective
from fkd_ssl.runs import versions
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
NETWORKS = {
    "resnet18": Architecture(block=BasicBlock, depths=(2, 2, 2, 2), width=1, base_width=64),
    "resnet50": Architecture(block=Bottleneck, depths=(3, 4, 6, 3), width=1, base_width=64),
    "swav_w4": Architecture(block=Bottleneck, depths=(3, 4, 6, 3), width=4, base_width=64),
}


@dataclass(eq=False)
class Bench:
    """The machine, the images and the sizes of a run."""

    originals: ImageSource
    folder: Path
    device: torch.device
    tiny: bool
    deadline: float = math.inf
    """No measurement begins after this time, in seconds of `time.perf_counter`."""
    errors: dict[str, str] = field(default_factory=dict)
    """The errors of the section's measurements."""

    def measure(self, found: Values, name: str, work: Callable[[], object], *, device_crops: bool = False) -> None:
        """Puts the result of `work` into `found`, or its error into `errors`, so that the next measurements are made."""
        try:
            if time.perf_counter() > self.deadline:
                raise TimeoutError("left out: the time of this section is over")
            if device_crops:
                check_device(self.device)
            result = work()
            found[name] = round(result, 1) if isinstance(result, float) else result
        except Exception as error:  # of any measurement
            if not isinstance(error, (RequestError, TimeoutError)):
                traceback.print_exc()
            self.errors[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

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
        """One of the NETWORKS with random weights, or a tiny network."""
        torch.manual_seed(0)
        dim = 32 if self.tiny else NETWORKS[name].feature_dim
        small = [nn.Conv2d(3, 8, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        backbone = nn.Sequential(*small) if self.tiny else WidthResNet(NETWORKS[name])
        head = nn.Linear(dim, 128)
        return Teacher(backbone, head, name=name, shape=(128,), precision=precision, feature_dim=dim).to(self.device)

    @cache  # noqa: B019
    def forward(self, name: str, precision: Any) -> float:
        """Crops per second of a teacher's forward pass on crops that are on its device."""
        crops = torch.randint(0, 256, (CHUNK, 3, self.pixels, self.pixels), dtype=torch.uint8, device=self.device)
        teacher, crops = self.teacher(name, precision), crops.contiguous(memory_format=torch.channels_last)
        return self.rate(lambda: teacher.embed(crops), CHUNK)


CASES = (
    ("resnet50", "bf16", 64),
    ("resnet50", "bf16", 400),
    ("resnet18", "bf16", 4),
    ("resnet50", "fp32", 64),
    ("swav_w4", "bf16", 64),
)
"""Teacher, precision and C of each run of precompute. Decoding bounds that with C = 4, since its teacher is fast."""


def bits(bench: Bench, found: Values) -> None:
    """Whether the GPU makes the CPU's pixels. On the first run, Triton compiles its kernels."""
    bench.measure(found, "same_pixels", partial(_same_pixels, bench), device_crops=True)
    if found.get("same_pixels") is False:
        bench.errors["same_pixels"] = "the GPU makes other pixels than the CPU"


def _same_pixels(bench: Bench) -> bool:
    if not bench.tiny:
        return replay_digest(str(bench.device)) == replay_digest()
    image = decode(bench.originals.read(0), bench.originals.where(0))
    records = draw(RECIPE, image_key(0, "bits"), image.shape[0], image.shape[1], 0, 2)
    return np.array_equal(replay_on(bench.device, image, records, bench.pixels), cpu_replay(image, records, bench.pixels))


def forward(bench: Bench, found: Values) -> None:
    """The bare teachers, with the data on the GPU."""
    found |= {"tf32": uses_tf32("fp32"), "crops_per_second": {}}
    for name, precision in dict.fromkeys((name, precision) for name, precision, _ in CASES):
        bench.measure(found["crops_per_second"], f"{name} {precision}", partial(bench.forward, name, precision))


def replay(bench: Bench, found: Values) -> None:
    """Crops made on the GPU from decoded images in memory: with plan and transfer, and alone."""
    found["crops_per_second"] = {}
    for m, count in ((4, 1),) if bench.tiny else ((4, 64), (64, 8)):
        bench.measure(found["crops_per_second"], f"M={m}", partial(_replayed, bench, m, count), device_crops=True)


def _replayed(bench: Bench, m: int, count: int) -> Values:
    pending = []
    for index in range(min(count, len(bench.originals))):
        image = decode(bench.originals.read(index), bench.originals.where(index))
        records = draw(RECIPE, image_key(0, str(index)), image.shape[0], image.shape[1], 0, m)
        pending.append(PendingCrops(image=image, records=records))
    size, crops = sum(one.image.size for one in pending), m * len(pending)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")

    def planned() -> CropPlan:
        return plan_crops(pending, bench.pixels, concatenate(pending, pinned))

    plan = planned().pin_memory() if bench.device.type == "cuda" else planned()
    there = plan.to(bench.device)
    return {
        "plan_on_cpu": round(bench.rate(planned, crops)),
        "transfer_and_kernels": round(bench.rate(lambda: replay_plan(plan.to(bench.device)), crops)),
        "kernels": round(bench.rate(lambda: replay_plan(there), crops)),
        "bytes_an_image": size // len(pending),
    }


def store(bench: Bench, found: Values) -> None:
    """Precompute over the bare forward, without the codec's sample except at C = 4; first without crops on the GPU."""
    runs = found["runs"] = {}
    for on in (False, True):
        for name, precision, crops in CASES[:1] if bench.tiny else CASES:
            title = f"{name} {precision}, C = {crops}, crops on the {'GPU' if on else 'CPU'}"
            work = partial(_precomputed, bench, name, precision, crops, device_crops=on)
            bench.measure(runs, title, work, device_crops=on)


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
        "queue_bytes": summary.queue_bytes,
        **{stage: round(seconds / summary.seconds, 3) for stage, seconds in summary.stages.items()},
    }


def loader(bench: Bench, found: Values) -> None:
    """Batches of fresh crops: replayed by the workers, decoded only, and decoded by the workers and made on the GPU."""
    found |= {"workers": bench.workers, "crops_per_second": {}}
    box, small, several = RECIPES["fkd"], 16 if bench.tiny else 96, (4,) if bench.tiny else (4, 8)
    for name, ms, recipe, pixels, decode_only, on_device in (
        ("full recipe", several, RECIPE, bench.pixels, False, False),
        ("decoding only", several, RECIPE, bench.pixels, True, False),
        ("box and flip", (4,), box, bench.pixels, False, False),
        ("full recipe, 96 px", (4,), RECIPE, small, False, False),
        ("box and flip, 96 px", (4,), box, small, False, False),
        ("crops on the GPU", several, RECIPE, bench.pixels, True, True),
    ):
        for m in ms:
            work = partial(_loaded, bench, m, recipe, pixels, decode_only=decode_only, on_device=on_device)
            bench.measure(found["crops_per_second"], f"{name}, M = {m}", work, device_crops=on_device)


def _loaded(bench: Bench, m: int, recipe: Recipe, pixels: int, *, decode_only: bool, on_device: bool) -> float:
    data = FreshCrops(bench.images, recipe, crops_per_image=m, pixels=pixels, decode_only=decode_only)
    images, rounds = 2 if bench.tiny else 256 // m, 1 if bench.tiny else 8
    sampler = PassSampler(len(data), images, (1 + rounds) * bench.workers, seed=0)
    times = []
    for step, batch in enumerate(Loader(data, sampler, workers=bench.workers, collate=whole_batch, prefetch=4), start=1):
        if on_device:
            replay_on_device(move_data_to_device(batch, bench.device))
        if step in (bench.workers, len(sampler)):  # each worker has begun its second batch, or none has ended yet
            bench.synchronize()
            times.append(time.perf_counter())
    return rounds * bench.workers * images * m / (times[1] - times[0])


RUNS: dict[str, Values] = {
    "stored": {},
    "online": {"targets": "online"},
    "stored, device crops, 4 workers": {"device_crops": "on"},
}


def train(bench: Bench, found: Values) -> None:
    """Students in bf16 with the data on the GPU, trained on a store (crops by 14 workers, and by 4 and the GPU), and online."""
    size, count = (8, 4) if bench.tiny else (256, 4096)
    students = ("squeezenet1_1",) if bench.tiny else ("resnet18", "resnet50")
    folder, teacher = bench.folder / "train", bench.teacher("resnet50", "bf16")
    options: Values = {"threads": bench.threads, "chunk_size": 8 if bench.tiny else CHUNK, "progress": False}
    precompute(bench.images, folder, teacher, crops=4, recipe=RECIPE, pixels=bench.pixels, limit=count, **options)
    rates: dict[str, float] = {}
    found |= {"crops_per_second": rates, "over_bare": {}, "online_over_its_bound": {}}
    for name in students:
        bench.measure(rates, f"{name}, bare", partial(_bare_training, bench, name, size))
    for key, changes in RUNS.items():
        for name in students:
            run = bench.folder / f"{name}, {key}"
            work = partial(_trained, bench, folder, name, size, run, **changes)
            bench.measure(rates, f"{name}, {key}", work, device_crops="device_crops" in changes)
            if {f"{name}, bare", f"{name}, {key}"} <= rates.keys():
                found["over_bare"][f"{name}, {key}"] = round(rates[f"{name}, {key}"] / rates[f"{name}, bare"], 3)
    for name in students:
        if {f"{name}, bare", f"{name}, online"} <= rates.keys():
            bound = 1 / (1 / rates[f"{name}, bare"] + 1 / bench.forward("resnet50", "bf16"))
            found["online_over_its_bound"][name] = round(rates[f"{name}, online"] / bound, 3)


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

    return bench.rate(step, size)


def _trained(bench: Bench, store: Path, student: str, size: int, run: Path, **changes: Any) -> float:
    """Crops per second of `fkd-ssl train` in the second half of its steps, when no batch of the start is left."""
    opened, steps = open_store(store), 2 if bench.tiny else 120
    options: Values = {
        "student": student,
        "batch_size": size,
        "pixels": bench.pixels,
        "epochs": steps * size / len(opened),
        "precision": "bf16-mixed",
        "workers": min(4, bench.workers) if "device_crops" in changes else bench.workers,
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
    bench.measure(found, "features_per_second", partial(_features, bench))
    train, queries, dim = (512, 64, 32) if bench.tiny else (1_280_000, 50_000, 2048)
    few, classes = (256, 4) if bench.tiny else (100_000, 100)
    rng = np.random.default_rng(0)
    bank, asked, labels = _random(bench, train, dim), _random(bench, queries, dim), rng.integers(0, 1000, train)
    found["knn"] = f"{train:,} x {queries:,} x {dim}"
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    search = partial(knn.knn_predict, bank, labels, asked, 20, num_classes=1000, device=bench.device)
    bench.measure(found, "knn_seconds", partial(_seconds, search))
    if bench.device.type == "cuda":
        found["knn_peak_bytes"] = torch.cuda.max_memory_allocated() - before
    of_train, of_test = rng.integers(0, classes, few), rng.integers(0, classes, few // 10)
    given: Values = {"train_features": bank[:few], "train_labels": of_train, "features": bank[: few // 10], "labels": of_test}
    for name, probe in (("sweep", sweep), ("logreg", logreg)):
        fewer = {"rates": [0.1]} if bench.tiny and name == "sweep" else {}
        work = partial(probe.evaluate, **given, **fewer, device=bench.device, progress=False)
        bench.measure(found, f"{name}_seconds", partial(_seconds, work))


def _features(bench: Bench) -> float:
    started, teacher = time.perf_counter(), bench.teacher("resnet50", "bf16")
    rows, _ = features.extract_rows(teacher.features, bench.images, pixels=bench.pixels, workers=bench.workers, progress=False)
    return len(rows) / (time.perf_counter() - started)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _random(bench: Bench, count: int, dim: int) -> Any:
    """Random features float32 [count, dim] in the memory of the CPU, made on the GPU, which is much faster."""
    made, at_once = np.empty((count, dim), dtype=np.float32), 65_536
    for start in range(0, count, at_once):
        made[start : start + at_once] = torch.randn(min(at_once, count - start), dim, device=bench.device).cpu()
    return made


SECTIONS: dict[str, tuple[Callable[[Bench, Values], None], float]] = {
    "bits": (bits, 45),
    "forward": (forward, 35),
    "replay": (replay, 25),
    "precompute": (store, 130),
    "loader": (loader, 45),
    "train": (train, 75),
    "eval": (evaluate, 65),
}
"""Each section, and its share of the seven minutes; what an earlier section leaves is added."""


def machine(bench: Bench) -> Values:
    """What the figures were taken with."""
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    where = {"device": name, "processor": processor(), "cores": resolve.cpu_threads()}
    triton = version("triton") if find_spec("triton") else "not installed"
    return {**where, "images": len(bench.originals), "tiny": bench.tiny, **versions(), "triton": triton}


def processor() -> str:
    """The name of the CPU, or its architecture if the system does not give one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def goals(lines: list[Values]) -> Iterator[tuple[str, str, str]]:
    """Work, its figure and its goal on an H100 with 16 cores, for what was measured."""
    found = {line["section"]: line for line in lines}
    rates = found.get("loader", {}).get("crops_per_second", {})
    decoded = rates.get("decoding only, M = 4")
    for title, run in found.get("precompute", {}).get("runs", {}).items():
        if run["C"] > 4:
            goal = {"resnet50 bf16": 0.95 if run["device_crops"] else 0.9, "swav_w4 bf16": 0.97}.get(run["teacher"], 0.95)
            yield f"precompute, {title}, over the bare forward", str(run["over_bare"]), str(goal)
        elif decoded:
            of_all = decoded / found["loader"]["workers"] * min(16, found["machine"]["cores"])
            yield f"precompute, {title}, over decoding by all cores", f"{run['crops_per_second'] / of_all:.3f}", "0.7"
    made = found.get("replay", {}).get("crops_per_second", {}).get("M=4", {})
    if made:
        yield "crops a second on the GPU, M = 4, transfer included", f"{made['transfer_and_kernels']:,}", "100,000"
    for name, goal in (("box and flip", 0.7), ("full recipe", 0.6), ("box and flip, 96 px", 0.8), ("full recipe, 96 px", 0.75)):
        if decoded and f"{name}, M = 4" in rates:
            yield f"loader, {name}, over decoding only, M = 4", f"{rates[f'{name}, M = 4'] / decoded:.3f}", str(goal)
    if {"full recipe, M = 4", "crops on the GPU, M = 4"} <= rates.keys():
        ratio = rates["crops on the GPU, M = 4"] / rates["full recipe, M = 4"]
        yield "loader, crops on the GPU over CPU, M = 4", f"{ratio:.3f}", "1.4"
    for work, ratio in found.get("train", {}).get("over_bare", {}).items():
        if "online" not in work:
            yield f"{work}, over bare", str(ratio), "0.97" if work.startswith("resnet18") else "0.99"
    for student, ratio in found.get("train", {}).get("online_over_its_bound", {}).items():
        yield f"{student}, online over its bound", str(ratio), "0.95"
    if "knn_seconds" in found.get("eval", {}):
        yield f"seconds of kNN, {found['eval']['knn']}", str(found["eval"]["knn_seconds"]), "at most 60"


def page(lines: list[Values]) -> str:
    """Renders the goals and the sections as Markdown tables."""
    text = ["# Figures on a GPU", "", "Made by `benchmarks/gpu.py --page` from its output.", ""]
    text += ["| work | figure | goal |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in goals(lines)), ""]
    for line in {line["section"]: line for line in lines}.values():  # a new process prints its machine again
        title, seconds = line.pop("section"), line.pop("seconds", None)
        text += [f"## {title}", "", *([] if seconds is None else [f"{SECTIONS[title][0].__doc__} ({seconds:g} s)", ""])]
        if runs := [*line.pop("runs", {}).values()]:
            text += [f"| {' | '.join(runs[0])} |", "|---" * len(runs[0]) + "|"]
            text += [*(f"| {' | '.join(map(str, run.values()))} |" for run in runs), ""]
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
        lines = Path(args.page).read_text().splitlines()
        print(page([json.loads(line) for line in lines if line.startswith("{")]))
        return
    if args.images is None:
        parser.error("--images is needed")
    failed, left = False, [*args.sections]
    originals = scan(args.images)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(originals, Path(folder), resolve.device(), args.tiny)
        print(json.dumps({"section": "machine", **machine(bench)}), flush=True)
        end = time.perf_counter()
        while left:
            name = left.pop(0)
            section, share = SECTIONS[name]
            started, values = time.perf_counter(), Values()
            end += share
            bench.deadline = math.inf if args.tiny else end
            bench.measure({}, name, partial(section, bench, values))
            if bench.errors:
                failed, values["errors"] = True, dict(bench.errors)
                bench.errors.clear()
            print(json.dumps({"section": name, "seconds": round(time.perf_counter() - started, 1), **values}), flush=True)
            if _broken(bench):
                break
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    if left:
        options = ["--images", args.images, *(["--tiny"] if args.tiny else []), "--sections", *left]
        subprocess.run([sys.executable, __file__, *options], check=False)
    sys.exit(failed)


def _broken(bench: Bench) -> bool:
    """Whether an error, such as an invalid address in a kernel, has left the GPU unusable for this process."""
    try:
        bench.synchronize()
    except Exception:  # of the driver
        return True
    return False


if __name__ == "__main__":
    main()
