"""Makes label maps: runs a classifier once on every whole image. ReLabel's authors published their maps, but not this code.

A shard is a pure function of images, teacher and batch size. Its images are divided, in order, into batches of a fixed size.
The teacher runs on one batch at a time, and a killed run resumes at a batch.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from fkd_ssl import files
from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops import box_record, replay, replay_digest
from fkd_ssl.errors import FkdError, ImageError, RequestError
from fkd_ssl.images import ImageSource, decode
from fkd_ssl.progress import advance_done, bar_disabled
from fkd_ssl.relabel import layout
from fkd_ssl.store.listing import MANIFEST, read_images, write_sidecar
from fkd_ssl.store.write import creation, work
from fkd_ssl.store.write.rows import read_ahead
from fkd_ssl.targets import TeacherInfo
from fkd_ssl.text import format_bytes, plural

_UNKNOWN = "-"  # a checksum that is not known yet


class Described(Protocol):
    """Interface of a teacher; fkd_ssl.teachers.Teacher implements it."""

    info: TeacherInfo


class Dense(Protocol):
    """Interface of a dense classifier; fkd_ssl.teachers.dense.DenseTeacher implements it."""

    pixels: int
    height: int
    width: int

    @property
    def teacher(self) -> Described:
        """The teacher of the logits."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits float32 [B, K, h, w] of images uint8 [B, 3, P, P]."""


@dataclass(frozen=True, kw_only=True)
class MapSummary:
    """Result of `generate`."""

    images: int
    """Number of images of the folder."""
    made: int
    """Number of images that the teacher saw in this call."""
    busy: list[int]
    """Shards that another process is writing now."""
    seconds: float
    """Wall-clock time of this call."""
    bytes: int
    """Total bytes of the files of the folder."""
    unreadable: list[str]
    """Names of the skipped images in the finished shards."""


def generate(
    images: ImageSource,
    folder: str | Path,
    dense: Dense,
    *,
    k: int = 5,
    batch_size: int = 64,
    threads: int = 2,
    skip_unreadable: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = lambda message: None,
) -> MapSummary:
    """Writes the label maps of every image into `folder`. After a kill, call it again to continue.

    Args:
        images: The image set.
        folder: Folder of the maps, created if it does not exist.
        dense: A classifier that returns logits at each place.
        k: Number of logits kept at each place; the authors keep 5.
        batch_size: Number of images per forward pass. It is fixed per folder, since another size changes the last bits.
        threads: Number of threads that read, decode and resize while the teacher runs.
        skip_unreadable: Skip damaged images, which then have no label map, instead of stopping.
        progress: Whether to show a progress bar.
        log: Called with each line for the user.

    Raises:
        RequestError: The folder has other contents or maps with other settings, or a setting is invalid.
        ImageAccessError: An image cannot be opened.
        ImageError: An image is damaged and `skip_unreadable` is False, or it has changed since the maps were begun.
        FkdError: There is not enough disk space for the maps, or the teacher fails.
    """
    started = time.perf_counter()
    folder = Path(folder)
    wanted = _wanted(images, dense, k=k, batch_size=batch_size)
    if threads < 1:
        raise RequestError(f"threads {threads}: must be at least 1")
    if (folder / MANIFEST).exists():
        _check(folder, wanted, images)
        log(_announce(folder, wanted))
    else:
        _create(folder, images, wanted, skip_unreadable=skip_unreadable, progress=progress, log=log)
    manifest = layout.read_manifest(folder)
    paths, sizes = read_images(folder, manifest)
    for place in (folder, folder / layout.MAPS):
        files.remove_leftovers(place)
    missing = layout.missing_shards(folder, manifest)
    done = manifest.count - sum(len(manifest.shard_rows(shard)) for shard in missing)
    made = 0
    bar = tqdm(
        total=manifest.count, initial=done, unit="img", desc="label-maps", smoothing=0.05, disable=bar_disabled(show=progress)
    )
    with ThreadPoolExecutor(threads) as pool, bar:
        for shard in missing:
            path = layout.maps_file(folder, shard)
            count = len(manifest.shard_rows(shard))
            file, unit = work.shard_file(path), manifest.dtype.itemsize
            with work.open_work(file, manifest.digest, unit=unit, crops=count, per_row=1) as rows:
                if rows is None or path.with_suffix(".json").exists():  # another process is writing or has finished it
                    continue
                advance_done(bar, rows.crops)
                left = manifest.shard_rows(shard)[rows.crops :]
                del rows.checksums[rows.crops :]
                for views, checksums in _views(images, sizes, left, manifest, pool, skip_unreadable=skip_unreadable):
                    rows.checksums += checksums
                    rows.add(_sparse(dense, views, manifest))
                    bar.update(len(views))
                    made += sum(view is not None for view in views)
                digest = rows.finish(path, manifest.dtype, (count,))
                maps = files.map_npy(path, manifest.dtype, (count,))
                sidecar = {"file": digest, "images": rows.checksums, "skipped": layout.skipped_in(maps)}
                write_sidecar(path, manifest, shard, sidecar)
    unfinished = layout.missing_shards(folder, manifest)
    for shard in range(manifest.shards):  # work files that killed processes did not remove
        if shard not in unfinished:
            work.clear(work.shard_file(layout.maps_file(folder, shard)))
    return MapSummary(
        images=manifest.count,
        made=made,
        busy=unfinished,
        seconds=time.perf_counter() - started,
        bytes=files.total_bytes(folder),
        unreadable=[
            paths[manifest.shard_rows(shard)[k]]
            for shard in range(manifest.shards)
            if shard not in unfinished
            for k in layout.read_sidecar(layout.maps_file(folder, shard), manifest, shard)["skipped"]
        ],
    )


def _wanted(images: ImageSource, dense: Dense, *, k: int, batch_size: int) -> layout.Manifest:
    """Returns the requested manifest, without the sizes of the images."""
    teacher = replace(dense.teacher.info, pixels=dense.pixels)
    classes = teacher.spec.size
    if not 1 <= k <= classes:
        raise RequestError(f"k {k}: teacher {teacher.name} has {classes} classes; k must be between 1 and {classes}")
    if not 1 <= batch_size <= 2**16:
        raise RequestError(f"batch_size {batch_size}: must be between 1 and {2**16}")
    if classes > layout.MAX_CLASSES:
        raise RequestError(f"teacher {teacher.name}: {classes} classes; the maximum is {layout.MAX_CLASSES}")
    if 4 * classes * dense.height * dense.width > layout.MAX_MAP_BYTES:
        raise RequestError(
            f"teacher {teacher.name}: {classes} classes at {dense.height} x {dense.width} positions are too "
            "many for label maps; choose fewer --pixels"
        )
    creation.check_names(images)
    return layout.Manifest(
        teacher=teacher,
        batch_size=batch_size,
        replay_digest=replay_digest(),
        k=k,
        height=dense.height,
        width=dense.width,
        rows_per_shard=layout.ROWS_PER_SHARD,
        count=len(images),
        images_sha256=files.sha256(images.names.lines),
        sizes_sha256=_UNKNOWN,
    )


def _check(folder: Path, wanted: layout.Manifest, images: ImageSource) -> None:
    """Raises RequestError if the maps in the folder are not the requested ones."""
    if files.read_json(folder / MANIFEST).get("format") != layout.Manifest.FORMAT:
        raise RequestError(f"{folder}: is not a folder of label maps; choose another --out")
    here = layout.read_manifest(folder)
    if here.images_sha256 != wanted.images_sha256:
        listed, given = set(read_images(folder, here)[0]), set(images.names)
        first = sorted(listed ^ given)[0]
        where = f"{images.spec} lacks" if first in listed else "they lack"
        raise RequestError(
            f"{folder}: was made from other images: it lists {here.count}, {images.spec} has {len(images)}; "
            f"{where} {first!r}; pass the same images, or choose another --out"
        )
    _, sizes = read_images(folder, here)
    for row in np.flatnonzero(sizes["width"]).tolist():  # the others could not be read
        expected = int(sizes["bytes"][row])
        if (now := images.byte_size(row)) != expected:
            raise RequestError(
                f"{folder}: was made from other images: {images.where(row)} has {now} bytes, but had {expected} "
                "when the maps were begun; restore it, or choose another --out"
            )
    same = replace(wanted, sizes_sha256=here.sizes_sha256, rows_per_shard=here.rows_per_shard)
    if other := here.difference(same):
        raise RequestError(f"{folder}: its {other}; pass the same, or choose another --out")


def _announce(folder: Path, wanted: layout.Manifest) -> str:
    """Describes what will be written. Raises FkdError if there is not enough disk space."""
    each = wanted.dtype.itemsize
    there = sum(path.stat().st_size for path in (folder / layout.MAPS).glob("*.npy"))
    left = max(0, wanted.count * each - there)
    free = creation.require_space(folder, left, "or choose a smaller --k or --pixels")
    return (
        f"{plural(wanted.count, 'image')}, {wanted.k} of {wanted.classes:,} logits at each of "
        f"{wanted.height} x {wanted.width} positions: {each:,} bytes per image, "
        f"{format_bytes(wanted.count * each)} in all; {format_bytes(free)} free on the disk"
    )


def _create(
    folder: Path,
    images: ImageSource,
    wanted: layout.Manifest,
    *,
    skip_unreadable: bool,
    progress: bool,
    log: Callable[[str], None],
) -> None:
    """Writes the lists of images and sizes of a new folder, then its manifest."""
    creation.check_folder(folder, {layout.MAPS}, what="label maps")
    log(_announce(folder, wanted))
    sizes = creation.read_sizes(images, skip_unreadable=skip_unreadable, progress=progress)
    (folder / layout.MAPS).mkdir(parents=True, exist_ok=True)
    replace(wanted, **creation.write_lists(folder, images, sizes)).write(folder)


def _views(
    images: ImageSource,
    sizes: npt.NDArray[np.void],
    rows: range,
    manifest: layout.Manifest,
    pool: ThreadPoolExecutor,
    *,
    skip_unreadable: bool,
) -> Iterator[tuple[list[UInt8Array | None], list[str]]]:
    """Yields batches of whole images with their sha256. Reads the next batch while the teacher runs on this one."""
    calls = (partial(_whole, images, row, sizes[row], manifest.teacher.pixels, skip_unreadable) for row in rows)
    found = read_ahead(pool, calls, manifest.batch_size)
    while batch := list(islice(found, manifest.batch_size)):
        yield [view for view, _ in batch], [checksum for _, checksum in batch]


def _whole(images: ImageSource, row: int, size: np.void, pixels: int, skip_unreadable: bool) -> tuple[UInt8Array | None, str]:
    """Returns a whole image resized to a square, uint8 [3, P, P], and the sha256 of its bytes; None and "" if skipped."""
    path, height, width = images.where(row), int(size["height"]), int(size["width"])
    if not width:
        if skip_unreadable:
            return None, ""
        raise FkdError(f"{path}: could not be read when the label maps were begun; pass --on_unreadable skip, as before")
    changed = (
        f"{path}: changed since the label maps were begun ({width} x {height} pixels, {size['bytes']} bytes then); restore "
        "it, or choose another --out"
    )
    data = images.read(row)
    if len(data) != size["bytes"]:
        raise FkdError(changed)
    try:
        image = decode(data, path)
    except ImageError:
        if skip_unreadable:
            return None, ""
        raise
    if image.shape[:2] != (height, width):
        raise FkdError(changed)
    view: UInt8Array = replay(image, box_record(0, 0, height, width), pixels)[0]
    return view, files.sha256(data)


def _sparse(dense: Dense, views: list[UInt8Array | None], manifest: layout.Manifest) -> npt.NDArray[Any]:
    """Returns the maps [n] of a batch, NaN for skipped images. Pads the teacher's input with black to `batch_size` images."""
    batch = np.zeros((manifest.batch_size, 3, manifest.teacher.pixels, manifest.teacher.pixels), dtype=np.uint8)
    for k, view in enumerate(views):
        if view is not None:
            batch[k] = view
    found = dense(torch.from_numpy(batch))[: len(views)].topk(manifest.k, dim=1)
    maps = np.zeros(len(views), dtype=manifest.dtype)
    maps["classes"], maps["logits"] = found.indices.cpu().numpy(), found.values.half().cpu().numpy()
    if not np.isfinite(maps["logits"]).all():
        raise FkdError(f"teacher {dense.teacher.info.name}: its logits are not finite or exceed 65,504, the maximum of float16")
    for k, view in enumerate(views):
        if view is None:
            maps[k]["classes"], maps[k]["logits"] = 0, np.nan
    return maps
