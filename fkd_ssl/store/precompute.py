"""Precompute: the teacher sees every stored crop of every image once, and its targets go into a column of a store.

A shard is a pure function of images, recipe, seed, teacher and codec. Its crops, in order, are cut into chunks of a
fixed size; a chunk is what the teacher runs on and what a killed run resumes from.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE, Recipe
from fkd_ssl.errors import FkdError, RequestError, StoreError
from fkd_ssl.images import ImageSet
from fkd_ssl.store import advice, work
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.codecs import code_size
from fkd_ssl.store.columns import open_or_train
from fkd_ssl.store.reader import Column, Store
from fkd_ssl.store.rows import Row, RowReader, Teacher, chunks, embed, in_order


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a call of `precompute` did."""

    shards: int
    """Shards of the store."""
    busy: list[int]
    """Shards left to another process that is writing them now."""
    crops: int
    """Crops that the teacher saw in this call for the store, without those that the codec was trained on."""
    seconds: float
    """Wall-clock of this call."""
    store_bytes: int
    """Bytes of all files of the store."""


def precompute(
    images: ImageSet,
    folder: str | Path,
    teacher: Teacher,
    *,
    crops: int = 400,
    recipe: Recipe,
    codec: str = "SQ8",
    pixels: int,
    seed: int = 0,
    limit: int | None = None,
    chunk_size: int = 128,
    name: str | None = None,
    skip_unreadable: bool = False,
    threads: int = 2,
    log: Callable[[str], None] = lambda message: None,
) -> Summary:
    """Writes one teacher's targets into the store `folder`, which is made if it does not exist.

    Whatever was killed is started again with the same arguments and continues; several processes can write one store.

    Args:
        images: The image set.
        folder: The store.
        teacher: The frozen network.
        crops: C, crops stored per image; fixed when the store is made.
        recipe: What crops are drawn from; likewise.
        codec: faiss factory string.
        pixels: Side of the crops that the teacher sees.
        seed: Of the crops' draw.
        limit: Only the first so many images in hash order.
        chunk_size: Crops in one forward of the teacher.
        name: Of the column; the teacher's own by default.
        skip_unreadable: Leave out images that cannot be read, and note it in the store, instead of stopping.
        threads: That read, decode and replay beside the teacher.
        log: Takes lines for the user.

    Raises:
        RequestError: The store or the column was made with other arguments.
        ImageError: An image cannot be read or has changed since the store's crops were made.
        FkdError: The disk cannot hold the store.
    """
    started = time.perf_counter()
    for what, value, most in (("crops", crops, 10**6), ("chunk_size", chunk_size, 2**16), ("pixels", pixels, 4096)):
        if not 1 <= value <= most:
            raise RequestError(f"--{what} {value}: must lie in 1 to {most}")
    if threads < 1:
        raise RequestError(f"--threads {threads}: must be at least 1")
    name = layout.checked_name(name or teacher.name)
    folder = Path(folder)
    images = layout.limit_images(images, limit)
    log(_announce(folder, len(images), crops, code_size(codec, teacher.dim), name))
    if warning := advice.on_size(teacher.dim, codec, len(images) * crops):
        log(warning)
    store = _open_or_create(folder, images, seed=seed, recipe=recipe, crops=crops, skip_unreadable=skip_unreadable)
    for part in (folder, folder / layout.CROPS, folder / layout.TARGETS, folder / layout.TARGETS / name):
        files.sweep(part)
    reader = RowReader(store, images, pixels, skip_unreadable, ahead=threads + 1)
    with ThreadPoolExecutor(threads) as pool:
        column = open_or_train(store, name, teacher, codec, pixels, chunk_size, reader, pool, log)
        busy: list[int] = []
        missing = column.missing_shards
        seen = 0
        total = store.manifest.count * crops
        done = total - sum(len(store.manifest.shard_rows(s)) for s in missing) * crops
        with tqdm(total=total, initial=done, unit="crop", desc=f"precompute {name}", smoothing=0.05) as bar:
            for shard in missing:
                count = _write_shard(store, column, teacher, shard, reader, pool, bar)
                if count is None:
                    busy.append(shard)
                else:
                    seen += count
    return Summary(
        shards=store.manifest.shards,
        busy=busy,
        crops=seen,
        seconds=time.perf_counter() - started,
        store_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


def _open_or_create(folder: Path, images: ImageSet, *, seed: int, recipe: Recipe, crops: int, skip_unreadable: bool) -> Store:
    if not (folder / layout.MANIFEST).exists():
        layout.create(folder, images, seed=seed, recipe=recipe, crops=crops, skip_unreadable=skip_unreadable)
        return Store(folder)
    store = Store(folder)
    m = store.manifest
    for what, here, asked in (
        ("seed", m.seed, seed),
        ("crops per image", m.crops_per_image, crops),
        ("recipe", m.recipe, recipe),
    ):
        if here != asked:
            raise RequestError(f"{folder}: this store's {what} is {here}, not {asked}; choose another --store")
    if files.sha256("".join(f"{path}\n" for path in images.paths).encode()) != m.images_sha256:
        stored, given = set(store.paths), set(images.paths)
        first = sorted(stored ^ given)[0]
        where = f"{images.root} lacks" if first in stored else "the store lacks"
        raise RequestError(
            f"{folder}: a store of other images: it lists {m.count}, {images.root} (with --limit, if any) gives "
            f"{len(images)}; {where} {first!r}. Choose another --store or give the same images"
        )
    return store


def _announce(folder: Path, count: int, crops: int, size: int, name: str) -> str:
    """What will be written, in words; raises FkdError where the disk cannot hold it. Nothing is written before."""
    needed = count * crops * (CROP_DTYPE.itemsize + size)
    own = [*(folder / layout.CROPS).glob("*.npy"), *(folder / layout.TARGETS / name).glob("codes-*.npy")]
    missing = needed - sum(path.stat().st_size for path in own)
    disk = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if missing > free:
        raise FkdError(
            f"{folder}: needs {gigabytes(missing)} more and the disk has {gigabytes(free)} free: free some, choose a "
            "smaller --codec (SQ4, PQ16x8) or fewer --crops"
        )
    shards = -(-count // layout.ROWS_PER_SHARD)
    return (
        f"{count:,} images x {crops} crops = {count * crops:,} targets of {name!r} at {size} + {CROP_DTYPE.itemsize} bytes: "
        f"{gigabytes(needed)} in {shards} shards; {gigabytes(free)} free on the disk"
    )


def gigabytes(count: float) -> str:
    """A number of bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def _write_shard(
    store: Store, column: Column, teacher: Teacher, shard: int, reader: RowReader, pool: ThreadPoolExecutor, bar: Any
) -> int | None:
    """Writes one shard's crops and codes; returns the crops that the teacher saw, None if another process has it."""
    m, size = store.manifest, column.meta.chunk_size
    rows = m.shard_rows(shard)
    crops_path = layout.crops_file(store.folder, shard)
    codes_path = layout.codes_file(store.folder, column.name, shard)
    known = store.crops_sidecar(shard)["images"] if store.has_crops(shard) else None
    per_row = m.crops_per_image
    with work.open_shard(codes_path, column.digest) as progress:
        if progress is None:
            return None
        if codes_path.with_suffix(".json").exists() and store.has_crops(shard):  # finished by another process since we looked
            bar.update(len(rows) * per_row)
            return 0
        already = progress.crops
        bar.update(already)
        first = already // per_row
        checksums = progress.checksums
        del checksums[first:]

        def calls() -> Iterator[Callable[[], Row]]:
            for k in range(first, len(rows)):
                expected = known[k] if known else None
                yield lambda k=k, expected=expected: reader(rows[k], per_row, expected)  # type: ignore[misc]

        def read() -> Iterator[Row]:
            for row in in_order(pool, calls(), ahead=reader.ahead):
                checksums.append(row.checksum)
                yield row

        for chunk in chunks(read(), size, already - first * per_row):
            progress.add(column.codec.encode(embed(teacher, chunk, size)))
            bar.update(len(chunk))
            bar.set_postfix_str(f"{(bar.format_dict['rate'] or 0) / per_row:.1f} img/s", refresh=False)
        if known is None:
            _publish_crops(store, shard, reader, crops_path, checksums)
        shape = (len(rows), per_row, column.meta.code_size)
        digest = progress.publish(codes_path, files.npy_header(np.dtype(np.uint8), shape))
        files.write_json(codes_path.with_suffix(".json"), {"file": digest, "column": column.digest})
        return len(rows) * per_row - already


def _publish_crops(store: Store, shard: int, reader: RowReader, path: Path, checksums: list[str]) -> None:
    rows = store.manifest.shard_rows(shard)
    records = np.stack([reader.records(row, store.crops_per_image) for row in rows])
    digest = files.write_npy(path, records)
    skipped = [row for row, checksum in zip(rows, checksums, strict=True) if not checksum]
    try:
        files.write_json(path.with_suffix(".json"), {"file": digest, "images": checksums, "skipped": skipped})
    except StoreError as error:
        raise StoreError(f"{error}; another process read other image files: see that all see the same folder") from error
