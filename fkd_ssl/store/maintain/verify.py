"""Verify: checks every file of a store, and compares a sample of its targets with the teacher."""

import functools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE, Records, replay, replay_digest, well_formed
from fkd_ssl.errors import FkdError, ImageAccessError, RequestError, StoreAccessError, StoreError
from fkd_ssl.images import ImageSource
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.column import COSINES, Column, cosine_to_teacher
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write.rows import Teacher
from fkd_ssl.text import plural

# the cosines of a new sample may be this many times further from 1 than the recorded ones, plus some slack for the arithmetic
# of another machine
_MAX_RATIO, _SLACK = 4.0, 1e-3
_SIDECAR = re.compile(r"(\d{5,})\.json")
_RECORDS_AT_ONCE = 2**18  # crop records that are checked at once, about 20 MB
_MIN_CROPS = 16  # minimum number of crops for a meaningful mean cosine


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A part of a store that is missing or does not match its checksum."""

    kind: Literal["crops", "codes", "array", "access"]
    """The kind of part: a shard's crop records or codes, a column's array, or something that cannot be opened."""
    shard: int | None = None
    """The shard, for crops, codes and parts that cannot be opened."""
    column: str | None = None
    """The column, for codes and arrays."""


@dataclass(kw_only=True)
class Report:
    """Result of `verify`.

    Attributes:
        problems: One line per problem: the file or row, what is wrong, and what to do.
        damage: The damaged parts of the store.
        checked: Number of files, rows and crops that were checked.
        cosine: Mean and minimum cosine of the stored targets of sampled crops to the teacher's; None without a teacher.
    """

    problems: list[str] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=lambda: {"files": 0, "images": 0, "crops": 0})
    cosine: dict[str, float] | None = None

    def add(self, problem: str, damage: Damage | None = None) -> None:
        """Adds a problem."""
        self.problems.append(problem)
        if damage is not None:
            self.damage.append(damage)

    def merge(self, part: "Report") -> None:
        """Adds the report of a part of the store."""
        self.problems += part.problems
        self.damage += part.damage
        for what, count in part.checked.items():
            self.checked[what] += count


def verify(
    store: Store,
    images: ImageSource | None = None,
    teacher: Teacher | None = None,
    *,
    column: str | None = None,
    sample: int = 64,
    threads: int = 2,
) -> Report:
    """Checks the sha256, shape and records of every file; with images, each of them; with a teacher, a sample of its targets.

    Args:
        store: The store.
        images: The store's images; their contents are compared with those that the teacher saw.
        teacher: The teacher of `column`.
        column: The teacher's column. Default: the only column.
        sample: Number of crops to replay and embed again.
        threads: Number of threads that read files.
    """
    report = Report()
    if not store.column_names and not store.shards_with_crops() and not store.sizes["width"].any():
        report.add(
            f"{store.folder}: none of its {store.manifest.count} images could be read when it was made; "
            "delete it, and precompute images that can be read"
        )
        return report
    columns = list(_columns(store, report))
    with suppress(StoreAccessError):  # reported for each shard
        for name in sorted(files.names(store.folder / layout.CROPS)):
            if (match := _SIDECAR.fullmatch(name)) and int(match[1]) >= store.manifest.shards:
                path = store.folder / layout.CROPS / name
                report.add(f"{path}: its shard is in no list of images: restore images-*.json from a backup")
    shards = range(store.manifest.shards)
    with ThreadPoolExecutor(threads) as pool:
        for part in tqdm(
            pool.map(functools.partial(_check_shard, store, columns), shards), total=len(shards), desc="verify shards"
        ):
            report.merge(part)
        bad = {damage.shard for damage in report.damage if damage.kind in ("crops", "access")}
        sound = [shard for shard in shards if shard not in bad]
        changed = set() if images is None else _check_images(store, images, sound, pool, report)
    if teacher is not None:
        if images is None:
            raise RequestError("--teacher needs --images: crops are replayed from them")
        if not any(d.kind == "array" or (d.kind == "access" and d.column) for d in report.damage):
            checked = store.column(column)
            whole = [s for s in sound if Damage(kind="codes", shard=s, column=checked.name) not in report.damage]
            _check_targets(checked, images, teacher, sample, set(whole), changed, report)
    return report


def check_files(store: Store, column: Column) -> None:
    """Raises StoreError if a file of the store's crops or of one column does not match its checksum."""
    report = Report()
    for shard in range(store.manifest.shards):
        report.merge(_check_shard(store, [column], shard))
    if report.problems:
        raise StoreError(f"{report.problems[0]} ({plural(len(report.problems), 'problem')}; fkd-ssl verify lists them)")


def _columns(store: Store, report: Report) -> Iterator[Column]:
    for name in store.column_names:
        damage, inaccessible = Damage(kind="array", column=name), Damage(kind="access", column=name)
        try:
            column = store.column(name)
        except StoreAccessError as error:
            report.add(str(error), inaccessible)
            continue
        except StoreError as error:
            report.add(f"{error}; without a backup, try verify --repair with the teacher of column {name}", damage)
            continue
        report.checked["files"] += 1 + len(column.meta.arrays)
        for array in column.meta.arrays:
            try:
                column.array(array)
            except StoreError as error:
                report.add(str(error), inaccessible if isinstance(error, StoreAccessError) else damage)
        if column.meta.replay_digest != replay_digest():
            report.add(
                f"{column.folder}: its crops were made with another version of OpenCV or torchvision, or on "
                "another kind of processor, so that students here see slightly different pixels; precompute here, or "
                "train where it was made"
            )
        yield column
    broken = store.broken_columns()
    for problem in broken:
        report.add(problem)
    if not store.column_names and not broken:
        report.add(f"{store.folder}: has no targets; run fkd-ssl precompute")


def _again(error: StoreError | str, path: Path, shard: int) -> str:
    return f"shard {shard}: {error}; delete {path} and its .json and run the same precompute again, or pass --repair"


def _check_shard(store: Store, columns: Sequence[Column], shard: int) -> Report:
    report = Report()
    for check in (functools.partial(_check_crops, store), *(functools.partial(_check_codes, column) for column in columns)):
        try:
            check(shard, report)
        except StoreAccessError as error:  # it may be intact, so nothing is deleted or repaired
            report.add(f"shard {shard}: {error}", Damage(kind="access", shard=shard))
    return report


def _check_crops(store: Store, shard: int, report: Report) -> None:
    path = layout.crops_file(store.folder, shard)
    rows = store.manifest.shard_rows(shard)
    damage = Damage(kind="crops", shard=shard)
    if not store.has_crops(shard):
        report.add(f"{path}: missing: run the same precompute again to finish the store", damage)
        return
    try:
        sidecar = store.crops_sidecar(shard)
        fetched = store.crops_file(shard)
        records = files.map_npy(fetched, CROP_DTYPE, (len(rows), store.crops_per_image))
        digest = files.sha256_file(fetched)
    except StoreAccessError:
        raise
    except StoreError as error:
        report.add(_again(error, path, shard), damage)
        return
    report.checked["files"] += 2
    skipped = [row for row, checksum in zip(rows, sidecar["images"], strict=True) if not checksum]
    if digest != sidecar["file"]:
        report.add(_again(f"{path}: damaged: its sha256 differs from the one in its .json", path, shard), damage)
        return
    if sidecar["skipped"] != skipped:
        report.add(
            _again(f"{path.with_suffix('.json')}: the rows without a checksum differ from the skipped rows", path, shard),
            damage,
        )
        return
    row = _impossible(store, shard, records, skipped)
    if row is not None:
        report.add(_again(f"{path}: a crop of row {row} ({store.paths[row]}) is invalid", path, shard), damage)


def _impossible(store: Store, shard: int, records: Records, skipped: list[int]) -> int | None:
    """Returns the first row of a shard with a record that no recipe can draw for its image. Skipped rows have neutral ones."""
    rows = store.manifest.shard_rows(shard)
    step = max(1, _RECORDS_AT_ONCE // store.crops_per_image)
    for first in range(0, len(rows), step):
        block, these = np.asarray(records[first : first + step]), rows[first : first + step]
        sizes = store.sizes[these.start : these.stop]
        bottom = block["top"].astype(np.int64) + block["height"]
        right = block["left"].astype(np.int64) + block["width"]
        inside = (bottom <= sizes["height"][:, None]) & (right <= sizes["width"][:, None])
        inside &= (block["height"] > 0) & (block["width"] > 0)
        possible = inside.all(axis=1) | np.isin(these, skipped)
        if not well_formed(block):
            possible &= [well_formed(of_row) for of_row in block]
        if not possible.all():
            return int(these[int(np.argmin(possible))])
    return None


def _check_codes(column: Column, shard: int, report: Report) -> None:
    m, damage = column.store.manifest, Damage(kind="codes", shard=shard, column=column.name)
    try:
        path = column.require(shard)
    except StoreAccessError:
        raise
    except StoreError:
        path = layout.codes_file(column.store.folder, column.name, shard)
        report.add(f"{path}: missing: run the same precompute again to finish the column {column.name}", damage)
        return
    try:
        sidecar = column.sidecar(shard)
        fetched = column.file(shard)
        files.map_npy(fetched, np.dtype(np.uint8), (len(m.shard_rows(shard)), m.crops_per_image, column.meta.code_size))
        digest = files.sha256_file(fetched)
    except StoreAccessError:
        raise
    except StoreError as error:
        report.add(_again(error, path, shard), damage)
        return
    report.checked["files"] += 2
    if digest != sidecar["file"]:
        report.add(_again(f"{path}: damaged: its sha256 differs from the one in its .json", path, shard), damage)


def _check_images(
    store: Store, images: ImageSource, shards: Sequence[int], pool: ThreadPoolExecutor, report: Report
) -> set[int]:
    """Compares every image of these shards with the one that the teacher saw; returns the rows of changed images."""
    where = store.find_images(images)
    bad: set[int] = set()

    def check(row: int, checksum: str) -> str | None:
        """Returns the problem with an image, or None."""
        index = int(where[row])
        try:
            found = files.sha256(images.read(index)) if checksum else ""
        except ImageAccessError as error:
            return f"row {row}: {error}"
        return (
            None
            if found == checksum
            else (f"row {row}: {images.where(index)}: changed since its crops were made; restore it or make another store")
        )

    with tqdm(total=store.manifest.count, desc="verify images", unit="img") as bar:
        for shard in shards:
            rows = store.manifest.shard_rows(shard)
            for row, problem in zip(rows, pool.map(check, rows, store.crops_sidecar(shard)["images"]), strict=True):
                bar.update(1)
                report.checked["images"] += 1
                if problem is not None:
                    report.add(problem)
                    bad.add(row)
    return bad


def _check_targets(
    column: Column, images: ImageSource, teacher: Teacher, sample: int, shards: set[int], changed: set[int], report: Report
) -> None:
    """Compares a sample of the targets in these shards with the teacher's targets now."""
    store = column.store
    where = store.find_images(images)
    left_out = changed.union(*(store.skipped(shard) for shard in shards))
    rows = [row for shard in sorted(shards) for row in store.manifest.shard_rows(shard) if row not in left_out]
    order = [rows[k] for k in layout.in_hash_order([store.paths[row] for row in rows], "verify")[:sample]]
    cosines = []
    for k, row in enumerate(tqdm(order, desc="verify targets", unit="crop")):
        file, pixels = images.where(int(where[row])), images.pixels(int(where[row]))
        index = np.array([k % store.crops_per_image])
        crop = replay(pixels, np.asarray(store.crops(row, index)), column.meta.teacher.pixels)
        try:
            now = teacher.embed(torch.from_numpy(crop)).float().cpu().numpy()[0].astype(np.float64)
        except FkdError as error:
            raise FkdError(f"{file}: {error}") from error
        stored = column.codec.decode(column.codes(row, index))[0].astype(np.float64)
        if now.shape != stored.shape:
            report.add(f"{column.folder}: holds targets {list(stored.shape)}, this teacher gives {list(now.shape)}")
            return
        now, stored = now.ravel(), stored.ravel()
        cosines.append(float(now @ stored / max(1e-12, np.linalg.norm(now) * np.linalg.norm(stored))))
    if not cosines:
        return
    report.checked["crops"] = len(cosines)
    report.cosine = {"mean": float(np.mean(cosines)), "min": float(np.min(cosines))}
    min_mean, min_cosine = (1 - _MAX_RATIO * (1 - cosine_to_teacher(column.meta, key)) - _SLACK for key in COSINES)
    bad = [row for row, cosine in zip(order, cosines, strict=True) if cosine < min_cosine]
    if bad:
        shard, _ = store.locate(bad[0])
        report.add(
            f"{column.folder}: {len(bad)} of {len(cosines)} sampled targets differ from this teacher's "
            f"(minimum cosine {min(cosines):.4f}, expected at least {min_cosine:.4f}), the first in row "
            f"{bad[0]} ({store.paths[bad[0]]}, shard {shard}): pass the teacher and checkpoint of its "
            "meta.json, or precompute another column"
        )
    elif len(cosines) >= _MIN_CROPS and report.cosine["mean"] < min_mean:
        report.add(
            f"{column.folder}: the mean cosine of {len(cosines)} sampled targets to this teacher's is "
            f"{report.cosine['mean']:.5f}, expected at least {min_mean:.5f}: its checkpoint or the versions "
            "of the libraries differ slightly; precompute another column"
        )
