"""Says before a long run what a store will cost: bytes for each codec, hours, and from when on it pays.

The teacher, a student's training step and the reading of images are timed here for a few seconds each, and nothing is
written. Run it on the machine, and with the teacher, that precompute is to run with.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fkd_ssl.arrays import UInt8Array
from fkd_ssl.text import format_bytes, format_duration

if TYPE_CHECKING:
    import numpy.typing as npt

    from fkd_ssl.crops import Recipe
    from fkd_ssl.images import ImageSource
    from fkd_ssl.teachers import Teacher

CODECS = ("Flat", "SQfp16", "SQ8", "SQ6", "SQ4", "OPQ32,PQ32x8", "OPQ16,PQ16x8")
_IMAGES = 8  # that are read for the timing
_FEW = 8  # crops in the first runs, from which the time of larger ones is foreseen


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of plan."""

    images: str
    """Folder of images."""
    teacher: str
    """As precompute takes it: a family (mocov2, swav, lightly, transformers), a preset (fkd-ssl teachers lists them),
    torchvision/NAME, timm/NAME, run, or module:function of your own."""
    checkpoint: str | None = None
    """The teacher's weights."""
    crops: int = 400
    """C, crops stored per image."""
    recipe: str = "mocov2"
    """What crops are drawn from."""
    codec: str | None = None
    """The codec that you think of; the table shows others. The usual one by default, as precompute has it."""
    pixels: int | None = None
    """Side of the crops, teacher's and student's; the teacher's native size by default."""
    limit: int | None = None
    """Only so many images."""
    chunk_size: int = 128
    """Crops in one forward."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the teacher's forward."""
    student: str = "resnet18"
    """Any classifier of torchvision: its training step is timed for the break-even."""
    epochs: float = 100
    """Of one student's training."""
    crops_per_image: int = 4
    """M, crops that training reads of an image at once."""
    batch_size: int = 256
    """Crops in a training batch; on a CPU the step is timed on fewer."""
    store: str = "."
    """Where the store is to lie: for the free disk."""
    seconds: float = 5.0
    """About how long each timing may take."""
    json: bool = False
    """Print one JSON object on standard output."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds measured on this machine."""

    forward: float
    """Of the teacher, a crop, on all cores or the GPU."""
    forward_batch: int
    """Crops in the forwards that were timed."""
    step: float
    """Of the student's training step, a crop, likewise."""
    step_batch: int
    """Crops in the steps that were timed."""
    decode: float
    """Of reading and decoding an image, on one core."""
    replay: float
    """Of replaying a crop, on one core."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What follows from the costs."""

    precompute_seconds: float
    """For all stored crops."""
    stored_seconds: float
    """One student's training on stored targets."""
    online_seconds: float
    """The same with the teacher in the loop."""
    break_even_students: int | None
    """From so many students on the store has paid; None where online is not slower."""
    break_even_epochs: float | None
    """The same in epochs of all trainings together."""


def estimate(
    costs: Costs, *, images: int, crops: int, epochs: float, crops_per_image: int, cores: int, overlaps: bool
) -> Estimate:
    """Times of whole runs.

    Args:
        costs: Seconds a crop or an image.
        images: N.
        crops: C.
        epochs: Of one training.
        crops_per_image: M.
        cores: That read images.
        overlaps: Whether images are read beside the networks, which run on a GPU; on a CPU both share the cores.
    """

    def together(network: float, per_image: int) -> float:
        reading = (costs.decode / per_image + costs.replay) / cores
        return max(network, reading) if overlaps else network + reading

    precompute = images * crops * together(costs.forward, crops)
    stored = images * epochs * together(costs.step, crops_per_image)
    online = images * epochs * together(costs.step + costs.forward, crops_per_image)
    saved = online - stored
    return Estimate(
        precompute_seconds=precompute,
        stored_seconds=stored,
        online_seconds=online,
        break_even_students=math.ceil(precompute / saved) if saved > 0 else None,
        break_even_epochs=precompute / saved * epochs if saved > 0 else None,
    )


def run(config: Config) -> int:
    """Measures and prints the plan."""
    import shutil

    from fkd_ssl.commands import console, resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.crops import CROP_DTYPE
    from fkd_ssl.errors import RequestError
    from fkd_ssl.store.codecs import check_kind, code_size, usual_codec
    from fkd_ssl.store.label_codecs import LABELS
    from fkd_ssl.store.manifest import limit_images
    from fkd_ssl.students import check_student

    for name in ("crops", "chunk_size", "epochs", "crops_per_image", "batch_size", "seconds"):
        if getattr(config, name) <= 0:
            raise RequestError(f"--{name} {getattr(config, name)}: must be positive")
    recipe = resolve.recipe_of(config.recipe)
    images = limit_images(images_of(config.images), config.limit)
    teacher = resolve.teacher_of(config.teacher, config.checkpoint, config.precision)
    pixels = resolve.pixels_of(config.pixels, teacher.pixels)
    check_student(config.student, pixels)
    targets = len(images) * config.crops
    own = sum(len(path.encode()) + 80 for path in images.names)  # its line, its size, its checksum
    chosen = config.codec or usual_codec(teacher.kind, teacher.dim)
    check_kind(teacher.kind, chosen, teacher.name)
    sizes = {chosen: code_size(chosen, teacher.dim)}
    for codec in CODECS if teacher.kind == "embedding" else LABELS:
        try:
            sizes[codec] = code_size(codec, teacher.dim)
        except RequestError:
            continue  # its parts do not divide D, or it keeps all classes
    codecs: dict[str, dict[str, Any]] = {
        codec: {
            "bytes_per_crop": size + CROP_DTYPE.itemsize,
            "bytes": own + targets * (size + CROP_DTYPE.itemsize),
            "refused": _refused(codec, targets),
        }
        for codec, size in sorted(sizes.items(), key=lambda item: -item[1])
    }
    where = Path(config.store)
    disk = next(place for place in (where, *where.absolute().parents) if place.exists())
    free = shutil.disk_usage(disk).free
    costs = measure(config, images, teacher, recipe, pixels)
    gpu = resolve.device().type == "cuda"
    found = estimate(
        costs, images=len(images), crops=config.crops, epochs=config.epochs, crops_per_image=config.crops_per_image,
        cores=min(16, resolve.cpu_threads()), overlaps=gpu,
    )  # fmt: skip
    about: dict[str, Any] = {
        "images": len(images), "crops": config.crops, "targets": targets, "dim": teacher.dim, "pixels": pixels,
        "teacher": teacher.network, "student": config.student, "device": str(resolve.device()),
        "codec": chosen, "codecs": codecs, "free_bytes": free, "fits": codecs[chosen]["bytes"] < free,
        "teacher_crops_per_second": 1 / costs.forward, "measured": asdict(costs), **asdict(found),
    }  # fmt: skip
    if config.json:
        console.show_json(about)
    else:
        console.show(describe(config, about))
    return 0


def describe(config: Config, about: dict[str, Any]) -> str:
    """The plan for people."""
    from fkd_ssl.commands import console

    measured = about["measured"]
    rows = [["codec", "bytes a crop", "store", ""]]
    for codec, size in about["codecs"].items():
        note = "too few targets" if size["refused"] else "" if size["bytes"] < about["free_bytes"] else "does not fit"
        chosen = "  <- --codec" if codec == about["codec"] else ""
        rows.append([codec, str(size["bytes_per_crop"]), format_bytes(size["bytes"]), f"{note}{chosen}"])
    lines = [
        f"{about['images']:,} images x {about['crops']} crops = {about['targets']:,} targets, D = {about['dim']}, at "
        f"{about['pixels']} px; {format_bytes(about['free_bytes'])} free on the disk of {config.store}",
        console.table(rows),
        f"precompute: {format_duration(about['precompute_seconds'])} on this machine ({about['device']}): {about['teacher']} "
        f"sees {about['teacher_crops_per_second']:,.1f} crops a second (timed on batches of {measured['forward_batch']} from "
        f"memory), reading takes {1e3 * measured['decode']:.1f} ms an image and {1e3 * measured['replay']:.2f} ms a crop of a "
        "core",
        f"one {config.student}, {config.epochs:g} epochs: {format_duration(about['stored_seconds'])} on stored targets, "
        f"{format_duration(about['online_seconds'])} with the teacher in the loop (a step timed on "
        f"{measured['step_batch']} crops)",
    ]
    if about["break_even_students"] is None:
        lines.append("the teacher in the loop is no slower here: a store saves no time")
    else:
        students = about["break_even_students"]
        lines.append(
            f"the store has paid from the {ordinal(students)} such student on, after {about['break_even_epochs']:,.0f} epochs "
            "in all"
        )
        if config.crops > config.epochs:
            lines.append(
                f"note: {config.epochs:g} epochs read {config.epochs:g} crops of an image; --crops {config.crops} serve "
                "longer trainings, and cost in proportion"
            )
    if refused := about["codecs"][about["codec"]]["refused"]:
        lines.append(f"precompute will refuse this: {refused}")
    return "\n".join(lines)


def _refused(codec: str, targets: int) -> str | None:
    """Why so many targets are too few to train a codec on; None where they are not."""
    from fkd_ssl.errors import RequestError
    from fkd_ssl.store.write.columns import check_sample, sample_targets

    try:
        check_sample(codec, sample_targets(codec, targets))
    except RequestError as error:
        return str(error)
    return None


def measure(config: Config, images: "ImageSource", teacher: "Teacher", recipe: "Recipe", pixels: int) -> Costs:
    """Times reading, the teacher and a training step of the student, each for some seconds."""
    import torch
    from torch.nn import functional

    from fkd_ssl.commands import resolve
    from fkd_ssl.objectives import make_objective
    from fkd_ssl.students import Student

    views, decode, replay = _reading(images, recipe, pixels, config.seconds)
    crops = torch.from_numpy(views).permute(0, 3, 1, 2)

    def batch(count: int) -> torch.Tensor:
        return crops.repeat(-(-count // len(crops)), 1, 1, 1)[:count].contiguous(memory_format=torch.channels_last)

    def forward(count: int) -> Callable[[], None]:
        given = batch(count)

        def see() -> None:
            teacher.embed(given).sum().item()  # a number: the GPU has finished

        return see

    forward_seconds, forward_batch = timed(forward, config.chunk_size, config.seconds)

    device = resolve.device()
    student = Student(config.student, teacher.dim).to(device).train()
    objective = make_objective("feature_kl")
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-4)

    def step(count: int) -> Callable[[], None]:
        given = batch(count).to(device)
        target = functional.normalize(torch.randn(count, teacher.dim, device=device), dim=1)

        def train() -> None:
            optimizer.zero_grad()
            loss = objective(student(given), target)
            loss.backward()
            optimizer.step()
            loss.item()

        return train

    step_seconds, step_batch = timed(step, config.batch_size, config.seconds)
    return Costs(
        forward=forward_seconds, forward_batch=forward_batch, step=step_seconds, step_batch=step_batch, decode=decode,
        replay=replay,
    )  # fmt: skip


def timed(make: Callable[[int], Callable[[], None]], count: int, seconds: float) -> tuple[float, int]:
    """Seconds a crop, the best of some runs, and on how many crops they ran: `count`, or as many as time allows."""

    def once(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    until = time.perf_counter() + seconds
    few = min(_FEW, count)
    while True:
        work = make(few)
        work()  # the first run of a size makes its plans
        best = once(work)
        more = min(count, 4 * few)
        if more == few or time.perf_counter() + 3 * best * more / few > until:
            break
        few = more
    while time.perf_counter() < until:
        best = min(best, once(work))
    return best / few, few


def _reading(images: "ImageSource", recipe: "Recipe", pixels: int, seconds: float) -> tuple["npt.NDArray[Any]", float, float]:
    """Crops uint8 [n, P, P, 3] of some images; seconds of a core for reading an image, and for replaying a crop."""
    import numpy as np

    from fkd_ssl.crops import draw, image_key, replay_into
    from fkd_ssl.errors import ImageError
    from fkd_ssl.store.manifest import in_hash_order

    views: list[UInt8Array] = []
    decode, replay, count = 0.0, 0.0, 8
    until = time.perf_counter() + seconds
    for row in in_hash_order(images.names, "plan"):
        if len(views) == _IMAGES or (views and time.perf_counter() > until):
            break
        start = time.perf_counter()
        try:
            image = images.pixels(row)
        except ImageError:
            continue
        read = time.perf_counter()
        records = draw(recipe, image_key(0, images.names[row]), image.shape[0], image.shape[1], 0, count)
        part = np.empty((count, pixels, pixels, 3), dtype=np.uint8)
        replay_into(part, image, records)
        replay += time.perf_counter() - read
        decode += read - start
        views.append(part)
    if not views:
        raise ImageError(f"{images.spec}: none of the images can be read")
    return np.concatenate(views), decode / len(views), replay / len(views) / count


def ordinal(n: int) -> str:
    """1st, 2nd, 3rd, 4th, ..., 11th.

    >>> [ordinal(n) for n in (1, 2, 3, 4, 11, 22, 113)]
    ['1st', '2nd', '3rd', '4th', '11th', '22nd', '113th']
    """
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
