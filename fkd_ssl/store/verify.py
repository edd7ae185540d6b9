"""Verify: that a store is whole and right, file by file, and that its targets are still what the teacher says."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fkd_ssl import files
from fkd_ssl.crops import Records, probe_digest, replay, well_formed
from fkd_ssl.errors import FkdError, ImageError, RequestError, StoreError
from fkd_ssl.images import ImageSet, decode, read_bytes
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.reader import Column, Store
from fkd_ssl.store.rows import Teacher

# a fresh sample's least cosine may lie this many times further from 1 than the recorded one, plus the slack of another
# machine's arithmetic
_TIMES, _SLACK = 4.0, 1e-3
_RECORDS_AT_ONCE = 2**18  # crop records that are checked at once: some 20 MB


@dataclass(kw_only=True)
class Report:
    """What `verify` found.

    Attributes:
        problems: One line each: the file or row, what is wrong, what to do.
        checked: How many files, rows and crops were looked at.
        cosine: Mean and least cosine of the sampled crops to the teacher now; None without a teacher.
    """

    problems: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=lambda: {"files": 0, "images": 0, "crops": 0})
    cosine: dict[str, float] | None = None


def verify(
    store: Store,
    images: ImageSet | None = None,
    teacher: Teacher | None = None,
    *,
    name: str | None = None,
    sample: int = 64,
) -> Report:
    """Checks every file's sha256, shape and records; every image, if given; and a sample of crops, if a teacher is.

    Args:
        store: The store.
        images: Its images, whose contents are compared with what the teacher saw.
        teacher: The teacher of column `name`.
        name: The teacher's column.
        sample: Crops that are replayed and embedded again.
    """
    report = Report()
    columns = list(_columns(store, report))
    for shard in tqdm(range(store.manifest.shards), desc="verify shards", unit="shard"):
        _check_crops(store, shard, report)
        for column in columns:
            _check_codes(column, shard, report)
    if images is not None and not report.problems:
        _check_images(store, images, report)
    if teacher is not None and not report.problems:
        if images is None:
            raise RequestError("--teacher needs --images: crops are replayed from them")
        column = store.column(name)
        column.require_complete()
        _check_targets(store, column, images, teacher, sample, report)
    return report


def check_files(store: Store, column: Column) -> None:
    """Raises StoreError where a file of a store's crops or of one column is not what its checksum says."""
    report = Report()
    for shard in range(store.manifest.shards):
        _check_crops(store, shard, report)
        _check_codes(column, shard, report)
    if report.problems:
        raise StoreError(f"{report.problems[0]} ({len(report.problems)} problems; fkd-ssl verify lists them)")


def _columns(store: Store, report: Report) -> Iterator[Column]:
    for name in store.teachers:
        try:
            column = store.column(name)
        except StoreError as error:
            report.problems.append(f"{error}; if there is no copy, delete {store.folder}/targets/{name} and precompute")
            continue
        report.checked["files"] += 1 + len(column.meta.arrays)
        for array in column.meta.arrays:
            try:
                column.array(array)
            except StoreError as error:
                report.problems.append(str(error))
        if column.meta.probe_digest != probe_digest():
            report.problems.append(
                f"{column.folder}: its crops were made by another pixel path (OpenCV, torchvision or processor) than this "
                "machine's: students here see slightly other pixels; precompute here, or train where it was made"
            )
        yield column
    if not store.teachers:
        report.problems.append(f"{store.folder}: holds no teacher's targets; run fkd-ssl precompute")


def _again(error: StoreError | str, path: Any) -> str:
    return f"{error}; delete {path} and its .json and run the same precompute again"


def _check_crops(store: Store, shard: int, report: Report) -> None:
    path = layout.crops_file(store.folder, shard)
    if not store.has_crops(shard):
        report.problems.append(f"{path}: missing: run the same precompute again to finish the store")
        return
    try:
        sidecar = store.crops_sidecar(shard)
        records = store.crop_shard(shard)
    except StoreError as error:
        report.problems.append(_again(error, path))
        return
    report.checked["files"] += 2
    if files.sha256_file(path) != sidecar.get("file"):
        report.problems.append(_again(f"{path}: altered: its sha256 is not its sidecar's", path))
        return
    where = _impossible(store, shard, records, set(sidecar["skipped"]))
    if where is not None:
        report.problems.append(_again(f"{path}: {where} is impossible", path))


def _impossible(store: Store, shard: int, records: Records, skipped: set[int]) -> str | None:
    """The first record of a shard that no recipe draws for its image, in words; rows that were skipped hold neutral ones."""
    rows = store.manifest.shard_rows(shard)
    step = max(1, _RECORDS_AT_ONCE // store.crops_per_image)
    for first in range(0, len(rows), step):
        block, these = np.asarray(records[first : first + step]), rows[first : first + step]
        sizes = store.sizes[these.start : these.stop]
        bottom = block["top"].astype(np.int64) + block["height"]
        right = block["left"].astype(np.int64) + block["width"]
        inside = (bottom <= sizes["height"][:, None]) & (right <= sizes["width"][:, None])
        inside &= (block["height"] > 0) & (block["width"] > 0)
        readable = np.array([row not in skipped for row in these])
        bad = np.flatnonzero(~inside.all(axis=1) & readable)
        if len(bad):
            row = these[int(bad[0])]
            return f"row {row} ({store.paths[row]})"
        if not well_formed(block):
            return "a record"
    return None


def _check_codes(column: Column, shard: int, report: Report) -> None:
    path = layout.codes_file(column.store.folder, column.name, shard)
    if not path.with_suffix(".json").exists():
        report.problems.append(f"{path}: missing: run the same precompute again to finish the column {column.name}")
        return
    try:
        sidecar = column.sidecar(shard)
        column.shard(shard)
    except StoreError as error:
        report.problems.append(_again(error, path))
        return
    report.checked["files"] += 2
    if files.sha256_file(path) != sidecar.get("file"):
        report.problems.append(_again(f"{path}: altered: its sha256 is not its sidecar's", path))


def _positions(store: Store, images: ImageSet) -> dict[str, int]:
    where = {path: k for k, path in enumerate(images.paths)}
    absent = [path for path in store.paths if path not in where]
    if absent:
        raise StoreError(f"{images.root}: lacks {len(absent)} images of {store.folder}, for instance {absent[0]!r}")
    return where


def _check_images(store: Store, images: ImageSet, report: Report) -> None:
    where = _positions(store, images)
    with tqdm(total=store.manifest.count, desc="verify images", unit="img") as bar:
        for shard in range(store.manifest.shards):
            for row, checksum in zip(store.manifest.shard_rows(shard), store.crops_sidecar(shard)["images"], strict=True):
                bar.update(1)
                file = images.file(where[store.paths[row]])
                try:
                    found = files.sha256(read_bytes(file)) if checksum else ""
                except ImageError as error:
                    report.problems.append(f"row {row}: {error}; restore it")
                    continue
                report.checked["images"] += 1
                if found != checksum:
                    report.problems.append(
                        f"row {row}: {file}: changed since its crops were made; restore it or make another store"
                    )


def _check_targets(store: Store, column: Column, images: ImageSet, teacher: Teacher, sample: int, report: Report) -> None:
    where = _positions(store, images)
    order = layout.in_hash_order([store.paths[int(row)] for row in store.rows], "verify")
    cosines = []
    for k, position in enumerate(tqdm(order[:sample], desc="verify targets", unit="crop")):
        row = int(store.rows[position])
        file = images.file(where[store.paths[row]])
        index = np.array([k % store.crops_per_image])
        pixels = decode(read_bytes(file), file)
        crop = replay(pixels, np.asarray(store.crops(row, index)), column.meta.pixels)
        try:
            now = teacher.embed(torch.from_numpy(crop)).float().cpu().numpy()[0].astype(np.float64)
        except FkdError as error:
            raise FkdError(f"{file}: {error}") from error
        stored = column.codec.decode(column.codes(row, index))[0].astype(np.float64)
        if now.shape != stored.shape:
            report.problems.append(f"{column.folder}: holds D = {len(stored)}, this teacher gives D = {len(now)}")
            return
        cosines.append(float(now @ stored / max(1e-12, np.linalg.norm(now) * np.linalg.norm(stored))))
    report.checked["crops"] = len(cosines)
    report.cosine = {"mean": float(np.mean(cosines)), "min": float(np.min(cosines))}
    least = 1 - _TIMES * (1 - column.meta.fidelity["cosine_min"]) - _SLACK
    bad = [position for position, cosine in zip(order, cosines, strict=False) if cosine < least]
    if bad:
        row = int(store.rows[bad[0]])
        report.problems.append(
            f"{column.folder}: {len(bad)} of {len(cosines)} sampled targets are not what this teacher says (cosine "
            f"{min(cosines):.4f} at least, {least:.4f} expected), first row {row} ({store.paths[row]}): another teacher, "
            "another checkpoint or another pixel path; give the one of meta.json or precompute another column"
        )
