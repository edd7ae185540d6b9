"""Converts FKD's published label files to stores, and stores to such files."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from fkd_ssl import files
from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops import IMPORTED, Records, replay_digest
from fkd_ssl.errors import ImageError, RequestError, StoreError
from fkd_ssl.images import ImageSource
from fkd_ssl.progress import advance_done
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.column import Column
from fkd_ssl.store.exchange import fkd_files
from fkd_ssl.store.listing import MANIFEST
from fkd_ssl.store.maintain.subset import atomic_folder
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write import creation
from fkd_ssl.store.write.columns import write_column
from fkd_ssl.targets import TargetSpec, TeacherInfo
from fkd_ssl.targets.label_codecs import LabelCodec

_LISTED = 10


def import_fkd(
    labels: str | Path,
    images: ImageSource,
    out: str | Path,
    *,
    classes: int,
    codec: str | None = None,
    column: str = "fkd",
    pixels: int = 224,
    threads: int = 2,
    log: Callable[[str], None] = lambda message: None,
) -> Store:
    """Makes a store of published label files: their boxes and flips become crops, their labels a column.

    The store appears when it is complete. After a kill, call it again to continue. Labels are kept, rounded to float16.

    Args:
        labels: Folder of label files with the folder structure of the images, possibly below `train` or `imagenet/train`.
        images: The images that the label files were made from.
        out: The new store.
        classes: Number of classes K.
        codec: Codec of the labels. Default: inferred from their shape, as marginal_smoothing_k5, not marginal_renorm_k5, for
            five classes.
        column: Name of the column.
        pixels: Side of the crops that the teacher saw.
        threads: Number of threads that read images and labels.
        log: Called with each line for the user.

    Raises:
        RequestError: No label file of these images is found, two images share a label file, or `out` has other contents.
        StoreError: Label files are missing or damaged; the message lists them.
    """
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out}: exists; choose another --store")
    fkd_files.check_names(images.names)
    folder = fkd_files.find(Path(labels), images.names)
    paths = [folder / fkd_files.label_file(path) for path in images.names]
    first = _first(paths)
    kept = LabelCodec(codec or first.codec(), classes)
    if kept.quantised:
        raise RequestError(f"codec {codec}: changes the labels; import-fkd keeps them as they are: leave --codec out")
    log(f"{len(images):,} images x {len(first)} crops, {kept.spec} of {classes} classes: {kept.code_size} + 20 bytes per crop")
    layout.checked_name(column)
    with atomic_folder(out) as new, ThreadPoolExecutor(threads) as pool:
        if not any(new.glob(f"{layout.CROPS}/*.json")):  # nothing to continue; it may have begun with wrong options
            for left in new.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not (new / MANIFEST).exists():
            creation.create_store(
                new,
                images,
                seed=0,
                recipe=IMPORTED,
                crops=len(first),
                skip_unreadable=False,
                advice="repair or remove it",
            )
        store, meta = Store(new), _meta(kept, Path(labels).name, pixels)
        if not store.column_names:
            write_column(new / layout.TARGETS / column, meta, {})
        same = store.paths == images.names and (store.crops_per_image, store.column_names) == (len(first), [column])
        digest = files.sha256(files.canonical({**meta, "arrays": {}}))
        if not same or store.column(column).digest != digest:
            raise RequestError(_other(new))
        wrong: list[str] = []
        with tqdm(total=len(images), unit="img", desc="labels") as bar:
            for shard in range(store.manifest.shards):
                rows = store.manifest.shard_rows(shard)
                if layout.codes_file(new, column, shard).with_suffix(".json").exists():
                    if not _is_of(store.column(column), rows[0], _row(store, images, paths, kept, len(first), rows[0])):
                        raise RequestError(_other(new))
                    advance_done(bar, len(rows))
                    continue
                made = []
                for row, found in zip(rows, pool.map(partial(_row, store, images, paths, kept, len(first)), rows), strict=True):
                    bar.update(1)
                    if isinstance(found, str):
                        wrong.append(f"row {row}: {found}")
                    else:
                        made.append(found)
                if not wrong:
                    _write(store, column, shard, digest, made)
        if wrong:
            some = "\n  ".join(wrong[:_LISTED])
            more = f"\n  and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
            raise StoreError(f"{labels}: {len(wrong)} label files cannot be used:\n  {some}{more}")
    return Store(out)


def export_fkd(column: Column, out: str | Path, *, fp16: bool = False) -> int:
    """Writes a column as FKD's label files; returns the number of files that did not exist.

    Raises:
        RequestError: The targets are embeddings, the crops have augmentations other than box and flip, float16 cannot represent
            the class numbers, or two images share a label file.
        StoreError: The column is incomplete or damaged, or a label file exists with other contents.
    """
    store, codec = column.store, column.codec
    if not isinstance(codec, LabelCodec):
        raise RequestError(f"{column.folder}: its targets are embeddings; FKD's files hold class probabilities")
    if fp16 and codec.spec != "full" and codec.dim > fkd_files.LARGEST_EXACT:
        raise RequestError(f"--fp16: float16 is exact up to {fkd_files.LARGEST_EXACT}, and there are {codec.dim} classes")
    recipe = store.manifest.recipe
    if recipe.jitter or recipe.grey or recipe.blur:
        raise RequestError(f"{store.folder}: crops of the recipe {recipe.name} change colours, which FKD's files cannot store")
    column.require_complete()
    fkd_files.check_names(store.paths[row] for row in store.rows.tolist())
    written = 0
    for row in tqdm(store.rows.tolist(), unit="img", desc="files"):
        path = Path(out) / fkd_files.label_file(store.paths[row])
        path.parent.mkdir(parents=True, exist_ok=True)
        size = store.sizes[row]
        everything = slice(0, store.crops_per_image)
        records, codes = np.asarray(store.crops(row, everything)), column.codes(row, everything)
        labels = fkd_files.unpacked(codec, codes)
        written += fkd_files.write(path, records, int(size["height"]), int(size["width"]), labels, fp16=fp16)
    return written


def _first(paths: list[Path]) -> fkd_files.Labels:
    """Returns the first label file that can be read, so that later all damaged files can be listed together."""
    wrong: StoreError | None = None
    for path in paths:
        try:
            return fkd_files.read(path)
        except StoreError as error:
            wrong = wrong or error
    raise StoreError(f"{wrong}; no other label file of these images can be read either")


def _other(folder: Path) -> str:
    return f"{folder}: holds other unfinished work; delete this folder, or choose another --store"


def _is_of(column: Column, row: int, found: tuple[str, Records, UInt8Array] | str) -> bool:
    """Whether a finished row was made from this image and this label file."""
    if isinstance(found, str):
        return False
    checksum, records, codes = found
    shard, within = column.store.locate(row)
    same = column.store.crops_sidecar(shard)["images"][within] == checksum
    return same and all(
        np.array_equal(there, new)
        for there, new in ((column.store.crops(row, slice(None)), records), (column.codes(row, slice(None)), codes))
    )


def _row(
    store: Store, images: ImageSource, paths: list[Path], codec: LabelCodec, crops: int, row: int
) -> tuple[str, Records, UInt8Array] | str:
    """Returns an image's checksum, records and codes, or a message if its label file is invalid."""
    size = store.sizes[row]
    try:
        labels = fkd_files.read(paths[row])
        if len(labels) != crops:
            return f"{paths[row]}: {len(labels)} crops, the first file has {crops}"
        records = labels.records(int(size["height"]), int(size["width"]))
        return files.sha256(images.read(row)), records, labels.codes(codec)
    except (StoreError, ImageError) as error:
        return str(error) if str(paths[row]) in str(error) else f"{paths[row]}: {error}"


def _write(store: Store, column: str, shard: int, digest: str, made: list[tuple[str, Records, UInt8Array]]) -> None:
    images, records, codes = zip(*made, strict=True)
    creation.write_crops(store.folder, store.manifest, shard, np.stack(records), images)
    creation.write_codes(store.folder, store.manifest, shard, np.stack(codes), column=column, digest=digest)


def _meta(codec: LabelCodec, folder: str, pixels: int) -> dict[str, Any]:
    """Returns meta.json for imported labels. The codec is lossless for them, and their teacher is unknown."""
    exact = {"cosine_mean": 1.0, "cosine_min": 1.0, "sample": 0, "total_variation_mean": 0.0, "total_variation_max": 0.0}
    teacher = TeacherInfo(
        name="fkd",
        spec=TargetSpec("distribution", (codec.dim,)),
        network=f"not known: imported from {folder}",
        pixels=pixels,
    )
    return {
        "codec": codec.spec,
        "code_size": codec.code_size,
        "fidelity": exact,
        "teacher": teacher.to_json(),
        "chunk_size": 1,
        "replay_digest": replay_digest(),
    }
