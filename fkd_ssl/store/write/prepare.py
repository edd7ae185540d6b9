"""Prepares a store for the targets of teachers: checks the request, creates the store and its columns."""

import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE, IMPORTED, Recipe
from fkd_ssl.errors import RequestError
from fkd_ssl.images import ImageSource
from fkd_ssl.progress import advance_done, bar_disabled
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.column import MAX_ARRAY, Column
from fkd_ssl.store.listing import MANIFEST
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write import advice
from fkd_ssl.store.write.columns import Request, check_sample, open_or_train, sample_targets
from fkd_ssl.store.write.creation import create_store, extend_store, require_space
from fkd_ssl.store.write.pipeline import Pipeline
from fkd_ssl.store.write.recording import recorded_bytes
from fkd_ssl.store.write.rows import RowReader, Teacher, write_crops
from fkd_ssl.store.write.streams import image_checksums
from fkd_ssl.text import format_bytes, plural


def prepare(
    images: ImageSource,
    folder: str | Path,
    teacher: Sequence[Teacher],
    *,
    crops: int,
    recipe: Recipe,
    codec: str | None,
    pixels: int,
    seed: int,
    chunk_size: int,
    skip_unreadable: bool = False,
    threads: int = 2,
    log: Callable[[str], None] = lambda message: None,
) -> list[Column]:
    """Creates a store for teachers whose targets will be recorded: everything but the codes.

    Arguments and errors are those of `precompute`. An existing column keeps its chunk_size, which is the batch size with which
    the training began.

    Returns:
        The column of each teacher, in a store that has all crops.
    """
    requests = make_requests(teacher, codec, pixels, chunk_size, None, None)
    store, images = begin(
        images,
        Path(folder),
        requests,
        crops=crops,
        recipe=recipe,
        seed=seed,
        skip_unreadable=skip_unreadable,
        progress=True,
        log=log,
    )
    requests = [
        replace(request, chunk_size=store.column(request.name).meta.chunk_size)
        if request.name in store.column_names
        else request
        for request in requests
    ]
    reader = RowReader(store, images, skip_unreadable)
    with Pipeline(threads, teacher) as pipeline:
        open_or_train(store, requests, reader, pipeline, log)
        there = store.shards_with_crops()
        absent = [shard for shard in range(store.manifest.shards) if shard not in there]
        with tqdm(total=count_rows(store, absent), desc="crops", unit="img", disable=bar_disabled(show=bool(absent))) as bar:
            for shard in random.sample(absent, len(absent)):  # in random order, to share them between processes
                rows = store.manifest.shard_rows(shard)
                if store.has_crops(shard):
                    advance_done(bar, len(rows))
                else:
                    write_crops(reader, shard, image_checksums(reader, rows, pipeline, bar))
    store = Store(store.folder)
    return [store.column(request.name) for request in requests]


def make_requests(
    teacher: Teacher | Sequence[Teacher],
    codec: str | None,
    pixels: int | Sequence[int],
    chunk_size: int,
    column: str | Sequence[str] | None,
    device: str | None,
) -> list[Request]:
    """Returns the requested columns. Raises RequestError if one is invalid."""
    teachers = [*teacher] if isinstance(teacher, Sequence) else [teacher]
    sides = [pixels] * len(teachers) if isinstance(pixels, int) else [*pixels]
    names = [t.info.name for t in teachers] if column is None else [column] if isinstance(column, str) else [*column]
    for what, value, most in (("chunk_size", chunk_size, 2**16), *(("pixels", side, 4096) for side in sides)):
        in_range(what, value, most)
    if not len(teachers) == len(names) == len(sides) or len(set(names)) < len(names):
        raise RequestError(
            f"{len(teachers)} teachers, columns {names}, pixels {sides}: each teacher needs one size and one "
            "name of a column (--column a,b)"
        )
    for each in (teacher.info for teacher in teachers):
        if strange := [key for key in each.arrays if not layout.COLUMN_NAME.fullmatch(f"teacher-{key}")]:
            raise RequestError(
                f"teacher {each.name}: an array named {strange[0]!r} cannot be stored; letters, digits, '.', '_' and '-' only"
            )
        size = sum(array.nbytes + files.MAX_HEADER for array in each.arrays.values())
        if size > MAX_ARRAY:
            raise RequestError(f"teacher {each.name}: its arrays have {size:,} bytes; the maximum is {MAX_ARRAY:,}")
    return [
        Request(
            name=layout.checked_name(n),
            teacher=t,
            codec=codec or t.info.spec.definition.default_codec(t.info.spec.shape),
            pixels=side,
            chunk_size=chunk_size,
            device=device,
        )
        for n, t, side in zip(names, teachers, sides, strict=True)
    ]


def in_range(what: str, value: int, most: int) -> None:
    """Raises RequestError if an option is not in 1 to `most`."""
    if not 1 <= value <= most:
        raise RequestError(f"--{what} {value}: must be between 1 and {most}")


def begin(
    images: ImageSource,
    folder: Path,
    requests: Sequence[Request],
    *,
    crops: int,
    recipe: Recipe,
    seed: int,
    skip_unreadable: bool,
    progress: bool,
    log: Callable[[str], None],
    extend: bool = False,
) -> tuple[Store, ImageSource]:
    """Logs the expected size of the store, then opens it, or creates it if it does not exist.

    Returns:
        The store, and its images in the order of its rows.
    """
    in_range("crops", crops, layout.MAX_CROPS)
    for request in requests:
        if not (folder / layout.TARGETS / request.name / "meta.json").exists():  # an existing column has its codec
            check_sample(request.codec, request.target, sample_targets(request.codec, request.target, len(images) * crops))
    log(_announce(folder, len(images), crops, requests))
    for request in requests:
        if warning := advice.on_size(request.target, request.codec, len(images) * crops):
            log(warning)
    store = _open_or_create(
        folder, images, seed=seed, recipe=recipe, crops=crops, skip_unreadable=skip_unreadable, progress=progress, extend=extend
    )
    columns = [folder / layout.TARGETS / request.name for request in requests]
    for part in (folder, folder / layout.CROPS, folder / layout.TARGETS, *columns):
        files.remove_leftovers(part)
    return store, images if images.names == store.paths else images.subset(store.find_images(images))


def _open_or_create(
    folder: Path,
    images: ImageSource,
    *,
    seed: int,
    recipe: Recipe,
    crops: int,
    skip_unreadable: bool,
    progress: bool,
    extend: bool,
) -> Store:
    if not (folder / MANIFEST).exists():
        if recipe == IMPORTED:
            raise RequestError(f"recipe {recipe.name}: is for stores made by import-fkd, and {folder} is not one")
        create_store(folder, images, seed=seed, recipe=recipe, crops=crops, skip_unreadable=skip_unreadable, progress=progress)
        return Store(folder)
    store = Store(folder)
    if extend:
        check_settings(store, seed=seed, recipe=recipe, crops=crops)
        if recipe == IMPORTED:
            raise RequestError(f"{folder}: its crops were imported, and new images have none: --extend cannot be used")
        store = extend_store(store, images, skip_unreadable=skip_unreadable, progress=progress)
    check_store(store, images, seed=seed, recipe=recipe, crops=crops)
    return store


def check_store(store: Store, images: ImageSource, *, seed: int, recipe: Recipe, crops: int) -> None:
    """Raises RequestError if a store was made with other arguments or from other images."""
    check_settings(store, seed=seed, recipe=recipe, crops=crops)
    check_images(store, images)


def check_settings(store: Store, *, seed: int, recipe: Recipe, crops: int) -> None:
    """Raises RequestError if a store was made with other arguments."""
    folder, m = store.folder, store.manifest
    for what, here, asked in (
        ("seed", m.seed, seed),
        ("crops per image", m.crops_per_image, crops),
        *_settings(m.recipe, recipe),
    ):
        if here != asked:
            raise RequestError(f"{folder}: its {what} is {here}, not {asked}; pass the same, or choose another --store")


def check_images(store: Store, images: ImageSource) -> None:
    """Raises RequestError if a store was made from other images. Their order may differ."""
    missing = np.flatnonzero(images.names.positions(store.paths) < 0)
    if not len(missing) and len(images) == len(store.paths):
        return
    if len(missing):
        example, advice = f"{images.spec} lacks {store.paths[int(missing[0])]!r}", "pass the same images"
    else:
        new = int(np.flatnonzero(store.paths.positions(images.names) < 0)[0])
        example, advice = f"the store lacks {images.names[new]!r}", "pass --extend to add images"
    raise RequestError(
        f"{store.folder}: was made from other images: it lists {len(store.paths)}, {images.spec} has {len(images)} "
        f"(after --limit); {example}; {advice}, or choose another --store"
    )


def _settings(stored: Recipe, asked: Recipe) -> list[tuple[str, Any, Any]]:
    """Returns what differs between two recipes: the names, or the settings of two recipes of the same name."""
    if stored.name != asked.name:
        return [("recipe", stored.name, asked.name)]
    return [(f"recipe's {field.name}", getattr(stored, field.name), getattr(asked, field.name)) for field in fields(Recipe)]


def _announce(folder: Path, count: int, crops: int, requests: Sequence[Request]) -> str:
    """Describes what will be written. Raises FkdError, before anything is written, if there is not enough disk space."""
    sizes = [request.target.check_codec(request.codec, request.name) for request in requests]
    needed = count * crops * (CROP_DTYPE.itemsize + sum(sizes))
    own = [*(folder / layout.CROPS).glob("*.npy")]
    recorded = 0
    for request in requests:
        column = folder / layout.TARGETS / request.name
        own += column.glob("codes-*.npy")
        recorded += recorded_bytes(column)
    missing = needed - recorded - sum(path.stat().st_size for path in own)
    free = require_space(folder, missing, "choose a smaller --codec (SQ4, PQ16x8) or fewer --crops")
    shards = -(-count // layout.ROWS_PER_SHARD)
    each = " and ".join(
        f"{count * crops:,} targets of {request.name!r} at {size}" for request, size in zip(requests, sizes, strict=True)
    )
    return (
        f"{count:,} images x {crops} crops = {each} + {CROP_DTYPE.itemsize} bytes: "
        f"{format_bytes(needed)} in {plural(shards, 'shard')}; {format_bytes(free)} free on the disk"
    )


def count_rows(store: Store, shards: Sequence[int]) -> int:
    """Returns the number of rows of some shards."""
    return sum(len(store.manifest.shard_rows(shard)) for shard in shards)
