"""Repair: rebuilds only the parts that `verify` found damaged. The result must match the recorded checksums."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from fkd_ssl import files
from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.crops import IMPORTED
from fkd_ssl.errors import ImageError, RequestError, StoreAccessError, StoreError
from fkd_ssl.images import ImageSource, Names
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.column import read_meta
from fkd_ssl.store.listing import SIZE_DTYPE, Part, read_names
from fkd_ssl.store.maintain.verify import Damage
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write.columns import Request, train_columns
from fkd_ssl.store.write.pipeline import Pipeline
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.store.write.rows import RowReader, Teacher, records_of, write_crops
from fkd_ssl.store.write.streams import image_checksums
from fkd_ssl.text import plural

Log = Callable[[str], None]


def repair_lists(folder: Path, images: ImageSource, log: Log) -> None:
    """Rebuilds lists of images and sizes that do not match the manifest or an extension, if the folder of images still does.

    Raises:
        StoreError: The manifest is damaged, or the images have changed. Only a backup can help then.
    """
    parts = layout.read_manifest(folder).parts
    where = {part: _find(folder, part, images) for part in parts}
    for part, found in where.items():
        if found is not None and _digest(part.file(folder, ".npy")) == part.sizes_sha256:
            continue
        if found is not None:
            own = images.subset(found)
        else:  # the images that no other part lists
            left = np.ones(len(images), dtype=bool)
            for other in where.values():
                left[other if other is not None else []] = False
            own = images.subset(np.flatnonzero(left))
            if files.sha256(own.names.lines) != part.images_sha256:
                own = layout.limit_images(own, part.count)
            _replace(part.file(folder, ".txt"), own.names.lines, part.images_sha256, log)
        if _digest(part.file(folder, ".npy")) != part.sizes_sha256:
            sizes = np.zeros(len(own), dtype=SIZE_DTYPE)
            for row in range(len(own)):
                with suppress(ImageError):  # zeros for an image that was skipped; for any other image the digest will differ
                    sizes[row] = own.size(row)
            header = files.npy_header(sizes.dtype, sizes.shape)
            _replace(part.file(folder, ".npy"), header + sizes.tobytes(), part.sizes_sha256, log)


def repair(
    store: Store,
    damage: list[Damage],
    images: ImageSource | None = None,
    teacher: Teacher | None = None,
    *,
    column: str | None = None,
    threads: int = 2,
    log: Log = lambda message: None,
) -> None:
    """Rebuilds the damaged parts of a store and changes nothing else.

    Crop records are drawn again. This reads the images only if the sidecar is damaged. A codec is trained again, and its arrays
    are kept only if they match the checksums in meta.json. Codes are computed again by their teacher.

    Args:
        store: The store.
        damage: The damage that `verify` found.
        images: The store's images; the image set may have more.
        teacher: The teacher of `column`.
        column: The teacher's column. Default: the only column.
        threads: Number of threads that read images.
        log: Called with a line for each part that was or was not repaired.
    """
    own = None if images is None else images.subset(store.find_images(images))
    crops = [d.shard for d in damage if d.kind == "crops" and d.shard is not None]
    if crops and store.manifest.recipe == IMPORTED:  # imported crops cannot be drawn again
        log(
            f"crops of {plural(len(crops), 'shard')}: were imported and cannot be drawn again: restore them "
            "from a backup, or import them again"
        )
        crops = []
    crops = [shard for shard in crops if not _redraw(store, shard, log)]
    if crops and own is None:
        log(f"crops of {plural(len(crops), 'shard')}: --images is needed to make them again")
    columns = {d.column for d in damage if d.column is not None}
    target = None
    if teacher is not None and (columns or crops):
        target = column if column is not None else columns.pop() if len(columns) == 1 else store.column().name
    for other in sorted({d.column for d in damage if d.column is not None} - {target}):
        log(f"column {other}: to make it again, pass --images, --teacher, --checkpoint and --column {other}")
    if own is None:
        return
    with Pipeline(threads, [] if teacher is None else [teacher]) as pipeline:
        reader = RowReader(store, own, skip_unreadable=True)
        for shard in crops:
            path = layout.crops_file(store.folder, shard)
            if not any(store.folder.glob(f"{layout.TARGETS}/*/codes-{shard:05d}.json")):
                continue  # never finished; precompute writes them with the codes
            _remove(path)
            write_crops(reader, shard, image_checksums(reader, store.manifest.shard_rows(shard), pipeline))
            log(f"{path}: made again from the images")
        if target is None or teacher is None:
            return
        if Damage(kind="array", column=target) in damage:
            _retrain(store, target, teacher, reader, pipeline, log)
    _recompute(store, [d.shard for d in damage if d.kind == "codes" and d.column == target], own, teacher, target, threads, log)


def _find(folder: Path, part: Part, images: ImageSource) -> Int64Array | None:
    """Returns the indices of a part's images, without missing ones; None if its list is damaged or missing."""
    try:
        where = images.names.positions(Names(read_names(folder, part)))
    except StoreAccessError:
        raise
    except StoreError:
        return None
    return where[where >= 0]


def _redraw(store: Store, shard: int, log: Log) -> bool:
    """Draws a shard's records again, without images, if its sidecar with their checksum is intact."""
    path = layout.crops_file(store.folder, shard)
    try:
        expected = store.crops_sidecar(shard).get("file")
    except StoreError:
        return False
    records = np.stack([records_of(store, row, store.crops_per_image) for row in store.manifest.shard_rows(shard)])
    data = files.npy_header(records.dtype, records.shape) + records.tobytes()
    if files.sha256(data) != expected:
        return False
    if _digest(path) != expected:
        files.replace(path, data)
        log(f"{path}: drawn again, as it was")
    return True


def _retrain(store: Store, name: str, teacher: Teacher, reader: RowReader, pipeline: Pipeline, log: Log) -> None:
    """Trains a column's codec again, and replaces the arrays that match their checksums in meta.json."""
    folder = files.reject_symlink(store.folder / layout.TARGETS / name)
    try:
        meta, _ = read_meta(folder / "meta.json")
    except StoreError as error:
        log(f"{error}: restore meta.json from a backup, or move the folder {folder} away and precompute the column again")
        return
    request = Request(name=name, teacher=teacher, codec=meta.codec, pixels=meta.teacher.pixels, chunk_size=meta.chunk_size)
    if difference := request.difference(meta):
        raise RequestError(f"{folder}: its {difference}; this is not the teacher of the column")
    arrays: dict[str, Float32Array] = {f"teacher-{key}": array for key, array in teacher.info.arrays.items()}
    bad = [array for array, digest in meta.arrays.items() if _digest(folder / f"{array}.npy") != digest]
    if any(array not in arrays for array in bad):
        train_columns(store, [request], reader, pipeline, lambda _, __, trained: arrays.update(trained), always=True)
    for array in bad:
        if array not in arrays:
            raise StoreError(
                f"{folder}: its meta.json names an array {array!r}, which neither the codec nor the teacher has "
                f"(they have {sorted(arrays)}): restore {array}.npy from a backup, or precompute another column"
            )
        values = np.ascontiguousarray(arrays[array], dtype=np.float32)
        data = files.npy_header(values.dtype, arrays[array].shape) + values.tobytes()
        _replace(folder / f"{array}.npy", data, meta.arrays[array], log)


def _recompute(
    store: Store, shards: list[int | None], images: ImageSource, teacher: Teacher, name: str, threads: int, log: Log
) -> None:
    """Runs the teacher again for the damaged or missing shards of its column."""
    if not shards:
        return
    column = Store(store.folder).column(name)  # opened again, since its codec may have been repaired
    m, was = store.manifest, {}
    for shard in shards:
        assert shard is not None  # codes always have a shard
        path = layout.codes_file(store.folder, name, shard)
        try:
            was[path] = column.sidecar(shard).get("file")
        except StoreError:
            was[path] = None
        _remove(path)
    precompute(
        images,
        store.folder,
        teacher,
        crops=m.crops_per_image,
        recipe=m.recipe,
        codec=column.meta.codec,
        pixels=column.meta.teacher.pixels,
        seed=m.seed,
        chunk_size=column.meta.chunk_size,
        column=name,
        skip_unreadable=True,
        threads=threads,
        log=log,
    )
    for path, digest in was.items():
        now = _digest(path)
        how = (
            ""
            if digest is None
            else ", as it was"
            if now == digest
            else ", but with other bytes than recorded; run fkd-ssl verify"
        )
        log(f"{path}: {'not made again' if now is None else f'made again{how}'}")


def _replace(path: Path, data: bytes, digest: str, log: Log) -> None:
    """Replaces a damaged file by `data`, if `data` matches the recorded digest."""
    if files.sha256(data) == digest:
        files.replace(path, data)
        log(f"{path}: made again, as it was")
    else:
        log(
            f"{path}: cannot be made again: the result differs from what was recorded (other images, another "
            "machine or other versions of the libraries, or a recoded column); restore it from a backup"
        )


def _remove(path: Path) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _digest(path: Path) -> str | None:
    try:
        return files.sha256_file(path)
    except StoreAccessError:
        raise
    except StoreError:
        return None
