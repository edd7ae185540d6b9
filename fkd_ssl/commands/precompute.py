"""Runs a teacher once over C random crops of every image and stores its targets with the crops.

The store can then train any number of students. To continue a killed run, repeat the command; the store comes out the same.
Several processes can write one store at once, on one machine or on several that share a file system, without waiting for each
other: use torchrun --nproc-per-node 8 -m fkd_ssl precompute ... (one GPU each), start your own jobs with --shards 0/4, 1/4,
..., or use --runner ray on a Ray cluster. With several teachers (--teacher a,b) each image is read and decoded only once.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fkd_ssl.errors import RequestError
from fkd_ssl.options import Named
from fkd_ssl.text import format_bytes, format_duration, plural

if TYPE_CHECKING:
    from fkd_ssl.images import ImageSource
    from fkd_ssl.results import Precomputed
    from fkd_ssl.store.write.precompute import Share, Summary
    from fkd_ssl.teachers import Teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of precompute."""

    images: str
    """Images: a folder, tars (train-{0000..0146}.tar), Parquet files, a list of files, cifar10:train:ROOT, or module:function;
    see docs/sources.md. Class folders are not needed."""
    store: str
    """Folder of the store. An existing store is continued, or gets another column."""
    teacher: str
    """A family (mocov2, swav, lightly, transformers) or a preset (fkd-ssl teachers lists them), with @backbone for the features
    before the head; torchvision/NAME or timm/NAME, with @LAYER for a layer's features and @probabilities for class
    probabilities; run (--checkpoint is a run of train); or module:function of your own. NAME@tokens stores a grid of the
    network's feature map. Separate several by commas. A+B averages the probabilities of two classifiers."""
    checkpoint: str | None = None
    """Checkpoint of the teacher; `pretrained` downloads the weights of a library's teacher; a fetched preset needs none.
    With several teachers, one for each, separated by commas; F+G for the teacher A+B."""
    crops: int = 400
    """C, crops stored per image. More crops than training epochs are never read."""
    recipe: str = "mocov2"
    """Augmentation that the crops are drawn from: mocov2, s2bnn, swav, fkd or simreg."""
    min_scale: float | None = None
    """Minimum share of the image that a crop covers; by default that of the recipe. SwAV's ResNet-50 w4 used 0.08."""
    max_scale: float | None = None
    """Maximum share of the image that a crop covers; by default that of the recipe, 1. FKD's labels were made with 0.936."""
    codec: str | None = None
    """Codec of the targets. For embeddings SQ8 (D bytes, the default), SQ4 (D/2), OPQ16,PQ16x8 (16), Flat (exact), ...; for
    class probabilities marginal_smoothing_k5 (20 bytes, the default), marginal_quantised_k8 (16 for 1,000 classes), hard,
    smoothing, marginal_renorm_k5, full, ...; for tokens those of embeddings, applied to each token (the default is
    OPQ16,PQ16x8)."""
    grid: int | None = None
    """Number of tokens along each side of the crop, for teachers NAME@tokens; by default 7."""
    pixels: int | None = None
    """Side of the crops that the teacher sees; by default its native size."""
    seed: int = 0
    """Seed of the crops."""
    limit: int | None = None
    """Maximum number of images; these are spread over all folders."""
    chunk_size: int = 128
    """Crops per forward pass of the teacher. Fixed for a column, since another size changes the last bits of the targets."""
    column: str | None = None
    """Name of the column; by default the teacher's name, with -2 appended for a second teacher of that name. With several
    teachers, one for each, separated by commas."""
    extend: bool = False
    """Add new images to an existing store, as new shards; its files do not change. Its images must still be there."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do if an image is damaged: stop and name it, or record it in the store and continue."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the teacher's forward pass."""
    compile: bool = False
    """Compile the teacher (torch.compile), which starts more slowly and runs faster. The last bits of the targets change."""
    threads: int | None = None
    """Threads that read images and make crops while the teacher runs; by default one per processor, at most 16."""
    device_crops: Literal["auto", "on", "off"] = "auto"
    """Whether the GPU makes the crops, so that threads only decode: auto measures which is faster. The pixels are the same."""
    evaluate: str | None = None
    """Folder of labelled test images; if given, a classifier's accuracy on them is reported first."""
    shards: str | None = None
    """Write only share i of n of the shards, as i/n with i from 0, for n parallel jobs. A later run may use another n."""
    runner: Literal["here", "ray"] = "here"
    """Write shards in this process, or as tasks of a Ray cluster (at RAY_ADDRESS; without it, Ray starts on this machine)."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Prints what was written."""
    from fkd_ssl.commands import results

    results.show(work(config), json=config.json)
    return 0


def work(config: Config) -> "Precomputed":
    """Writes the store."""
    from fkd_ssl import processes
    from fkd_ssl.commands import console
    from fkd_ssl.results import Precomputed
    from fkd_ssl.store.write.precompute import Share

    rank, world = processes.rank()
    if config.runner == "ray":
        summary = _on_ray(config)
    elif config.shards is not None:
        if world > 1:
            raise RequestError("--shards cannot be used under torchrun, which divides the shards itself")
        summary = write(config, share=share_of(config.shards), log=console.log)
    elif world > 1:
        summary = write(config, share=Share(index=rank, of=world, steal=True), progress=not rank, log=console.log)
    else:
        summary = write(config, log=console.log)
    rate = summary.crops / summary.seconds
    done = "nothing to do"
    if summary.crops:
        done = f"{summary.crops:,} crops in {format_duration(summary.seconds)} ({rate:,.0f} a second)"
    elif summary.busy or summary.left:
        done = "nothing left for this process"
    return Precomputed(
        line=f"{config.store}: {done}; {format_bytes(summary.store_bytes)} on disk",
        values={**vars(summary), "notes": _notes(config, summary)},
        out=Path(config.store),
        crops=summary.crops,
        seconds=summary.seconds,
        store_bytes=summary.store_bytes,
    )


def _on_ray(config: Config) -> "Summary":
    """Writes the shards as tasks of a Ray cluster."""
    from fkd_ssl import processes
    from fkd_ssl.commands import console, on_ray

    if processes.rank()[1] > 1 or config.shards is not None:
        raise RequestError("--runner ray divides the shards itself: leave out --shards and torchrun")
    if isinstance(config.teacher, Named) or isinstance(config.images, Named):
        raise RequestError("--runner ray: other machines cannot receive Python objects; pass each as module:function")
    if config.evaluate is not None:
        raise RequestError(
            "--evaluate cannot be used with --runner ray: first run the command with --evaluate and --shards "
            "0/1000, without --runner"
        )
    with contextlib.redirect_stdout(sys.stderr):  # Ray reports dead workers on standard output
        return on_ray.run(_write_shard, _with_absolute_paths(config), log=console.log)


def _notes(config: Config, summary: "Summary") -> list[str]:
    """Describes what is missing in the store."""
    from fkd_ssl.store import open_store

    notes = []
    if config.on_unreadable == "skip":
        store = open_store(config.store)
        rows = [row for shard in sorted(store.shards_with_crops()) for row in store.skipped(shard)]
        if rows:
            some = ", ".join(store.paths[row] for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
            notes.append(f"{len(rows)} of {len(store.paths):,} images could not be read and are left out: {some}")
    if summary.busy:
        notes.append(
            f"{len(summary.busy)} of {plural(summary.shards, 'shard')} left to other processes, which are writing them; if one "
            "stops early, run it again"
        )
    if summary.left:
        notes.append(f"{len(summary.left)} of {plural(summary.shards, 'shard')} left to the other --shards")
    return notes


def write(
    config: Config,
    *,
    share: "Share | None" = None,
    progress: bool = True,
    log: Callable[[str], None],
    load: "Callable[[Config], tuple[ImageSource, list[Teacher]]] | None" = None,
) -> "Summary":
    """Writes the store, or a share of it, in this process; `load` replaces `load_all`."""
    from fkd_ssl import processes
    from fkd_ssl.commands import resolve
    from fkd_ssl.crops.choose import choose
    from fkd_ssl.crops.device import check_device
    from fkd_ssl.store.write.precompute import precompute
    from fkd_ssl.training.groups import split

    if config.device_crops == "on":
        check_device(resolve.device())
    images, teachers = (load or load_all)(config)
    sides = [resolve.pixels_of(config.pixels, teacher.info.pixels) for teacher in teachers]
    for teacher, side in zip(teachers, sides, strict=True):
        teacher.check_size(side)
    if config.compile:
        resolve.compile_teachers(teachers, sides, config.chunk_size)
    if config.evaluate is not None and not processes.rank()[0] and (share is None or not share.index):
        _evaluate(config, config.evaluate, teachers, log)
    recipe = resolve.recipe_of(config.recipe, config.min_scale, config.max_scale)
    threads = min(16, resolve.cpu_threads()) if config.threads is None else config.threads
    on_device = config.device_crops == "on" or (
        config.device_crops == "auto"
        and choose(
            images,
            recipe,
            crops=config.crops,
            sides=sorted({*sides}),
            workers=threads,
            device=resolve.device(),
            network=functools.partial(_seconds_per_crop, teachers, sides, config.chunk_size),
            log=log,
        )
    )
    log(resolve.describe_machine(device_crops=on_device))
    return precompute(
        images,
        config.store,
        teachers,
        crops=config.crops,
        recipe=recipe,
        codec=config.codec,
        pixels=sides,
        seed=config.seed,
        limit=config.limit,
        chunk_size=config.chunk_size,
        column=None if config.column is None else split(config.column),
        skip_unreadable=config.on_unreadable == "skip",
        threads=threads,
        device=str(resolve.device()) if on_device else None,
        share=share,
        extend=config.extend,
        progress=progress,
        log=log,
    )


def _seconds_per_crop(teachers: "Sequence[Teacher]", sides: Sequence[int], chunk_size: int) -> float:
    """Measures the forward pass of the teachers on a GPU, with data on the GPU."""
    import time

    import torch

    started = 0.0
    chunks = [
        torch.zeros(chunk_size, 3, side, side, dtype=torch.uint8, device=t.device)
        for t, side in zip(teachers, sides, strict=True)
    ]
    for _ in range(2):  # the first pass chooses the kernels
        torch.cuda.synchronize(chunks[0].device)
        started = time.perf_counter()
        for teacher, chunk in zip(teachers, chunks, strict=True):
            teacher.embed(chunk)
        torch.cuda.synchronize(chunks[0].device)
    return (time.perf_counter() - started) / chunk_size


def _evaluate(config: Config, folder: str, teachers: "Sequence[Teacher]", log: Callable[[str], None]) -> None:
    """Reports the accuracy of the classifiers among the teachers before labels are made, as FKD's instructions advise."""
    from fkd_ssl.commands import resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.eval import classify

    val = images_of(folder)
    if all(teacher.info.spec.kind != "distribution" for teacher in teachers):
        raise RequestError(
            f"--evaluate {folder}: no teacher gives class probabilities; fkd-ssl knn and linear score embeddings"
        )
    for teacher in teachers:
        if teacher.info.spec.kind == "distribution":
            side = resolve.pixels_of(config.pixels, teacher.info.pixels)
            found = classify.evaluate(teacher.embed, val, pixels=side, classes=teacher.info.spec.size, workers=0)
            scores = f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %"
            log(f"teacher {teacher.info.name}: {scores} of {len(val):,} images at {side} px")


def load_all(config: Config) -> "tuple[ImageSource, list[Teacher]]":
    """Loads the images and the requested teachers; each column gets its teacher's name, as with `train --record`."""
    from fkd_ssl.commands import resolve
    from fkd_ssl.commands.images import images_of

    images = images_of(config.images)
    if config.column is None:
        return images, resolve.teachers_of(config.teacher, config.checkpoint, config.precision, config.grid)
    return images, resolve.load_each(teachers_of(config), config.precision, config.grid)


def teachers_of(config: Config) -> list[tuple[str, str | None]]:
    """The requested teachers, each with its checkpoint."""
    from fkd_ssl.training.groups import checkpoints_of, split

    return list(zip(split(config.teacher), checkpoints_of(config.teacher, config.checkpoint), strict=True))


def share_of(text: str) -> "Share":
    """Parses a share `i/n`; raises RequestError if it is invalid."""
    from fkd_ssl.store.write.precompute import Share

    index, slash, of = text.partition("/")
    if not (slash and index.isdecimal() and of.isdecimal()):
        raise RequestError(f"--shards {text}: expected i/n, for instance 0/4")
    return Share(index=int(index), of=int(of))


def _with_absolute_paths(config: Config) -> Config:
    """The config with absolute paths."""
    from fkd_ssl.images import absolute

    files = [_absolute_checkpoint(teacher, file) for teacher, file in teachers_of(config)]
    return replace(
        config,
        images=absolute(config.images),
        store=str(Path(config.store).absolute()),
        checkpoint=None if config.checkpoint is None else ",".join(files),
        threads=config.threads or 1,
        runner="here",
    )


def _absolute_checkpoint(teacher: str, checkpoint: str | None) -> str:
    """A teacher's checkpoint, or F+G for A+B, with absolute paths; a word such as pretrained is left unchanged."""
    parts = (checkpoint or "").split("+") if "+" in teacher else [checkpoint or ""]
    return "+".join(part if part.strip() in ("", "pretrained") else str(Path(part.strip()).absolute()) for part in parts)


def _write_shard(config: Config, shard: int) -> "Summary":
    """Writes one shard; runs as a Ray task."""
    from fkd_ssl.store.write.precompute import Share

    return write(config, share=Share(index=shard, of=2**62), progress=False, log=_nothing, load=_load_once)


@functools.cache
def _load_once(config: Config) -> "tuple[ImageSource, list[Teacher]]":
    """Prepares a Ray worker and loads images and teachers once."""
    from fkd_ssl import allocator

    allocator.keep_freed_memory()
    return load_all(config)


def _nothing(message: str) -> None:
    """Discards a message, since only the first process prints."""
