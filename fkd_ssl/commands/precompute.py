"""Runs a teacher once over C random crops of every image and stores its targets with the crops.

The store can then train any number of students. Started again with the same options, a killed run continues, and the
store comes out the same. Several processes can write one store at a time, on one machine or on many that share a file
system; none waits for another: torchrun --nproc-per-node 8 -m fkd_ssl precompute ... (a GPU each, shards shared out), or
jobs of your own with --shards 0/4, 1/4, ..., or --runner ray on a Ray cluster. Several teachers at once (--teacher a,b)
read and decode each image once.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fkd_ssl.errors import RequestError
from fkd_ssl.text import format_bytes, format_duration

if TYPE_CHECKING:
    from fkd_ssl.images import ImageSource
    from fkd_ssl.store.write.precompute import Share, Summary
    from fkd_ssl.teachers import Teacher


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of precompute."""

    images: str
    """Folder of images, NAME:SPLIT:ROOT (cifar10:train:/data), or module:function; class folders are not needed."""
    store: str
    """Folder of the store; a store that is there gets another column, or is continued."""
    teacher: str
    """A family (mocov2, swav, lightly, transformers), a preset (fkd-ssl teachers lists them), torchvision/NAME or timm/NAME
    (with @LAYER for a layer's features, @probabilities for class probabilities), run (its checkpoint is a run of train), or
    module:function of your own; several with commas between them. A+B is the mean of two classifiers' probabilities."""
    checkpoint: str | None = None
    """The teacher's weights; a library's teacher takes the word pretrained and downloads its own, a preset needs none once
    it was fetched. With several teachers one each, with commas between them; of A+B F+G."""
    crops: int = 400
    """C, crops stored per image; more than the epochs that you train for are never read."""
    recipe: str = "mocov2"
    """What crops are drawn from: mocov2, s2bnn, swav or fkd."""
    min_scale: float | None = None
    """Least share of the image that a crop covers, if not the recipe's."""
    codec: str | None = None
    """Of embeddings SQ8 (D bytes, the default), SQ4 (D/2), OPQ16,PQ16x8 (16), Flat (exact), ...; of class probabilities
    marginal_smoothing_k5 (20 bytes, the default), hard, smoothing, marginal_renorm_k5, full, ..."""
    pixels: int | None = None
    """Side of the crops that the teacher sees; its native size by default."""
    seed: int = 0
    """Of the crops' draw."""
    limit: int | None = None
    """Only so many images, spread over all folders."""
    chunk_size: int = 128
    """Crops in one forward of the teacher; fixed for a column, since another gives other last bits."""
    name: str | None = None
    """Name of the column; the teacher's by default, with -2 behind it for a second teacher of that name. With several
    teachers one each, with commas between them."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do about a damaged image: stop and name it, or note it in the store and go on."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the teacher's forward."""
    threads: int | None = None
    """Threads that read and replay while the teacher runs; the number of processors, at most 16, by default."""
    device_crops: bool = False
    """Threads only decode, and the GPU makes the crops: for few processors and a fast GPU. The pixels are the same."""
    evaluate: str | None = None
    """Folder of labelled test images on which a classifier's accuracy is said first."""
    shards: str | None = None
    """Only this share of the shards, i/n with i from 0: for n jobs, of which each takes one; any other n may follow."""
    runner: Literal["here", "ray"] = "here"
    """Where shards are written: by this process, or as tasks of a Ray cluster (RAY_ADDRESS; one on this machine without)."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Precomputes and says what was written."""
    from fkd_ssl import processes
    from fkd_ssl.commands import console
    from fkd_ssl.store.write.precompute import Share

    rank, world = processes.rank()
    if config.runner == "ray":
        from fkd_ssl.commands import on_ray

        if world > 1 or config.shards is not None:
            raise RequestError("--runner ray hands out the shards itself: leave out --shards and torchrun")
        if config.evaluate is not None:
            raise RequestError(
                "--evaluate: is said by this process, and with --runner ray it has no teacher: leave it out, or run this once "
                "without --runner and with --shards 0/1000"
            )
        with contextlib.redirect_stdout(sys.stderr):  # where Ray tells of workers that died
            summary = on_ray.run(_write_shard, _with_absolute_paths(config), log=console.say)
    elif config.shards is not None:
        if world > 1:
            raise RequestError("--shards is for processes of their own; under torchrun each takes its share by itself")
        summary = write(config, share=share_of(config.shards), log=console.say)
    elif world > 1:
        speaks = rank == 0
        summary = write(
            config, share=Share(index=rank, of=world, steal=True), progress=speaks, log=console.say if speaks else _nothing
        )
        if not speaks:
            return 0
    else:
        summary = write(config, log=console.say)
    if config.json:
        console.show_json(summary.__dict__)
    else:
        rate = summary.crops / summary.seconds
        done = "nothing to do"
        if summary.crops:
            done = f"{summary.crops:,} crops in {format_duration(summary.seconds)} ({rate:,.0f} a second)"
        elif summary.busy or summary.left:
            done = "nothing left for this process"
        console.show(f"{config.store}: {done}; {format_bytes(summary.store_bytes)} on disk")
    if config.on_unreadable == "skip":
        _say_skipped(config.store)
    if summary.busy:
        console.say(
            f"{len(summary.busy)} of {summary.shards} shards are being written by other processes, which finish them; if one "
            "is stopped, run it again"
        )
    if summary.left:
        console.say(f"{len(summary.left)} of {summary.shards} shards are left to the other --shards")
    return 0


def _say_skipped(folder: str) -> None:
    """Which images the store does without."""
    from fkd_ssl.commands import console
    from fkd_ssl.store import open_store

    store = open_store(folder)
    rows = [row for shard in sorted(store.shards_with_crops()) for row in store.skipped(shard)]
    if rows:
        some = ", ".join(store.paths[row] for row in rows[:3]) + (", ..." if len(rows) > 3 else "")
        console.say(f"warning: {len(rows)} of {len(store.paths):,} images could not be read and are left out: {some}")


def write(
    config: Config,
    *,
    share: "Share | None" = None,
    progress: bool = True,
    log: Callable[[str], None],
    load: "Callable[[Config], tuple[ImageSource, list[Teacher]]] | None" = None,
) -> "Summary":
    """What `run` does, in this process; `load` stands in for this module's."""
    import torch

    from fkd_ssl import processes
    from fkd_ssl.commands import resolve
    from fkd_ssl.crops.device import check_device
    from fkd_ssl.store.write.precompute import precompute
    from fkd_ssl.training.groups import split

    if config.device_crops:
        check_device(resolve.device())
    images, teachers = (load or load_all)(config)
    sides = [resolve.pixels_of(config.pixels, teacher.info.pixels) for teacher in teachers]
    for teacher, side in zip(teachers, sides, strict=True):
        if side != teacher.info.pixels:  # one that cannot take it says so now, not after the store is begun
            teacher.embed(torch.zeros(2, 3, side, side, dtype=torch.uint8))
    if config.evaluate is not None and not processes.rank()[0] and (share is None or not share.index):
        _evaluate(config, config.evaluate, teachers, log)
    return precompute(
        images,
        config.store,
        teachers,
        crops=config.crops,
        recipe=resolve.recipe_of(config.recipe, config.min_scale),
        codec=config.codec,
        pixels=sides,
        seed=config.seed,
        limit=config.limit,
        chunk_size=config.chunk_size,
        name=None if config.name is None else split(config.name),
        skip_unreadable=config.on_unreadable == "skip",
        threads=min(16, resolve.cpu_threads()) if config.threads is None else config.threads,
        device=str(resolve.device()) if config.device_crops else None,
        share=share,
        progress=progress,
        log=log,
    )


def _evaluate(config: Config, folder: str, teachers: "Sequence[Teacher]", log: Callable[[str], None]) -> None:
    """Says how good the classifiers among the teachers are, before their labels are made, as FKD's instructions ask."""
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
    """The images and the teachers that were asked for, in columns of their own names, as `train --record` has them."""
    from fkd_ssl.commands import resolve
    from fkd_ssl.commands.images import images_of

    images = images_of(config.images)
    if config.name is None:
        return images, resolve.teachers_of(config.teacher, config.checkpoint, config.precision)
    return images, [resolve.teacher_of(name, file, config.precision) for name, file in teachers_of(config)]


def teachers_of(config: Config) -> list[tuple[str, str | None]]:
    """The teachers that were asked for, each with its checkpoint."""
    from fkd_ssl.training.groups import checkpoints_of, split

    return list(zip(split(config.teacher), checkpoints_of(config.teacher, config.checkpoint), strict=True))


def share_of(text: str) -> "Share":
    """The share that `i/n` means; raises RequestError where it means none."""
    from fkd_ssl.store.write.precompute import Share

    index, slash, of = text.partition("/")
    if not (slash and index.isdecimal() and of.isdecimal()):
        raise RequestError(f"--shards {text}: i/n is expected, for instance 0/4")
    return Share(index=int(index), of=int(of))


def _with_absolute_paths(config: Config) -> Config:
    """The config with paths that mean the same from any folder."""
    files = [_absolute_checkpoint(teacher, file) for teacher, file in teachers_of(config)]
    return replace(
        config,
        images=str(Path(config.images).absolute()) if Path(config.images).exists() else config.images,
        store=str(Path(config.store).absolute()),
        checkpoint=None if config.checkpoint is None else ",".join(files),
        threads=config.threads or 1,
        runner="here",
    )


def _absolute_checkpoint(teacher: str, checkpoint: str | None) -> str:
    """A teacher's checkpoint with an absolute path, or F+G of A+B; a word such as pretrained stays as it is."""
    parts = (checkpoint or "").split("+") if "+" in teacher else [checkpoint or ""]
    return "+".join(part if part.strip() in ("", "pretrained") else str(Path(part.strip()).absolute()) for part in parts)


def _write_shard(config: Config, shard: int) -> "Summary":
    """Writes one shard, as a task of Ray."""
    from fkd_ssl.store.write.precompute import Share

    return write(config, share=Share(index=shard, of=2**62), progress=False, log=_nothing, load=_load_once)


@functools.cache
def _load_once(config: Config) -> "tuple[ImageSource, list[Teacher]]":
    """Images and teachers, once for all tasks of a worker."""
    return load_all(config)


def _nothing(message: str) -> None:
    """Says nothing: one process of many speaks for all."""
