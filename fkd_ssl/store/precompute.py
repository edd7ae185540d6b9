"""Precompute: the teacher sees every stored crop of every image once, and its targets go into a column of a store.

A shard is a pure function of images, recipe, seed, teacher and codec. Its crops, in order, are cut into chunks of a
fixed size; a chunk is what the teacher runs on and what a killed run resumes from.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE, Recipe, Records, draw, image_key, probe_digest, replay_into
from fkd_ssl.crops.records import neutral
from fkd_ssl.errors import FkdError, ImageError, RequestError, StoreError
from fkd_ssl.images import ImageSet, decode, read_bytes
from fkd_ssl.store import manifest as layout
from fkd_ssl.store import work
from fkd_ssl.store.codecs import Codec, Float32Array, code_size, sample_size
from fkd_ssl.store.reader import Column, ColumnMeta, Store

FIDELITY_SHARE = 9  # one target in nine of the codec's sample is held out to measure its fidelity on


class Teacher(Protocol):
    """What precompute asks of a teacher; fkd_ssl.teachers.Teacher is one."""

    name: str
    kind: str
    dim: int
    network: str
    licence: str
    source: str | None
    checkpoint_sha256: str | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: str
    arrays: dict[str, npt.NDArray[np.float32]]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Targets float32 [B, D] of crops uint8 [B, 3, H, W]."""


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


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One image, read and replayed."""

    views: npt.NDArray[np.uint8]
    checksum: str  # of the file's bytes; empty where the image was skipped


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
    if crops < 1 or chunk_size < 1 or pixels < 1:
        raise RequestError(f"--crops {crops}, --chunk_size {chunk_size} and --pixels {pixels} must be at least 1")
    name = layout.checked_name(name or teacher.name)
    folder = Path(folder)
    images = layout.limit_images(images, limit)
    store = _open_or_create(folder, images, seed=seed, recipe=recipe, crops=crops, skip_unreadable=skip_unreadable)
    log(_announce(store, code_size(codec, teacher.dim), name))
    reader = _RowReader(store, images, pixels, skip_unreadable)
    with ThreadPoolExecutor(threads, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        column = _open_or_train(store, name, teacher, codec, pixels, chunk_size, reader, pool, log)
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


def _open_or_create(folder: Path, images: ImageSet, *, seed: int, recipe: Recipe, crops: int, skip_unreadable: bool) -> Store:  # fmt: skip
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


def _announce(store: Store, size: int, name: str) -> str:
    m = store.manifest
    crops = m.count * m.crops_per_image
    needed = layout.shard_bytes(m, size)
    there = sum(path.stat().st_size for path in store.folder.rglob("*.npy"))
    free = shutil.disk_usage(store.folder).free
    if needed - there > free:
        raise FkdError(
            f"{store.folder}: needs {gigabytes(needed - there)} more and the disk has {gigabytes(free)} free: free some, "
            "choose a smaller --codec (SQ4, PQ16x8) or fewer --crops"
        )
    return (
        f"{m.count:,} images x {m.crops_per_image} crops = {crops:,} targets of {name!r} at {size} + "
        f"{CROP_DTYPE.itemsize} bytes: {gigabytes(needed)} in {m.shards} shards; {gigabytes(free)} free on the disk"
    )


def gigabytes(count: float) -> str:
    """A number of bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


class _RowReader:
    """Reads, decodes and replays all crops of a row; safe to call from several threads."""

    def __init__(self, store: Store, images: ImageSet, pixels: int, skip_unreadable: bool) -> None:
        self.store = store
        self.images = images
        self.pixels = pixels
        self.skip_unreadable = skip_unreadable

    def records(self, row: int, count: int) -> Records:
        """The first crops of a row, drawn anew; neutral empty ones where even the image's header was unreadable."""
        m, size = self.store.manifest, self.store.sizes[row]
        if not size["width"]:
            return neutral(count)
        key = image_key(m.seed, self.store.paths[row])
        return draw(m.recipe, key, int(size["height"]), int(size["width"]), 0, count)

    def __call__(self, row: int, count: int, expected: str | None = None) -> _Row:
        path = self.images.file(row)
        blank = _Row(views=np.zeros((count, self.pixels, self.pixels, 3), dtype=np.uint8), checksum="")
        if expected == "":  # skipped when the crops were made: skipped for every teacher
            return blank
        try:
            data = read_bytes(path)
            checksum = files.sha256(data)
            if expected is not None and checksum != expected:
                raise FkdError(f"{path}: changed since the store's crops were made; restore it or make another store")
            pixels = decode(data, path)
        except ImageError as error:
            if self.skip_unreadable and expected is None:
                return blank
            advice = "" if self.skip_unreadable else "; remove it or pass --on_unreadable skip"
            raise ImageError(f"{error}{advice}") from error
        size = self.store.sizes[row]
        if pixels.shape[:2] != (size["height"], size["width"]) or len(data) != size["bytes"]:
            raise ImageError(f"{path}: changed since the store was made ({size['width']} x {size['height']} pixels then)")
        views = blank.views
        replay_into(views, pixels, self.records(row, count))
        return _Row(views=views, checksum=checksum)


def _in_order(pool: ThreadPoolExecutor, calls: Iterator[Callable[[], _Row]], ahead: int) -> Iterator[_Row]:
    """Results in the calls' order, at most `ahead` of them in memory."""
    waiting: deque[Future[_Row]] = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _embed(teacher: Teacher, chunk: npt.NDArray[np.uint8], chunk_size: int) -> Float32Array:
    """Targets of at most `chunk_size` crops uint8 [n, P, P, 3]; always run on `chunk_size`, the rest zeros."""
    padded = chunk
    if len(chunk) < chunk_size:
        padded = np.zeros((chunk_size, *chunk.shape[1:]), dtype=np.uint8)
        padded[: len(chunk)] = chunk
    targets = teacher.embed(torch.from_numpy(padded).permute(0, 3, 1, 2))
    result: Float32Array = targets[: len(chunk)].float().cpu().numpy()
    if result.shape != (len(chunk), teacher.dim) or not np.isfinite(result).all():
        raise FkdError(
            f"teacher {teacher.name}: gave targets {list(result.shape)}, expected finite [{len(chunk)}, {teacher.dim}]"
        )
    return result


def _chunks(rows: Iterator[_Row], chunk_size: int, skip: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The rows' crops as one sequence, without its first `skip`, cut into chunks; the last one may be shorter."""
    parts: list[npt.NDArray[np.uint8]] = []
    held = 0
    for row in rows:
        views = row.views[skip:]
        skip = max(0, skip - len(row.views))
        while len(views):
            take = views[: chunk_size - held]
            parts.append(take)
            held += len(take)
            views = views[len(take) :]
            if held == chunk_size:
                yield np.concatenate(parts) if len(parts) > 1 else parts[0]
                parts, held = [], 0
    if held:
        yield np.concatenate(parts)


def _open_or_train(
    store: Store, name: str, teacher: Teacher, codec: str, pixels: int, chunk_size: int,
    reader: _RowReader, pool: ThreadPoolExecutor, log: Callable[[str], None],
) -> Column:  # fmt: skip
    """The column `name`, with its codec trained on a sample if it does not exist."""
    asked = {
        "kind": teacher.kind,
        "dim": teacher.dim,
        "codec": codec,
        "code_size": code_size(codec, teacher.dim),
        "teacher": {
            "name": teacher.name,
            "network": teacher.network,
            "licence": teacher.licence,
            "source": teacher.source,
            "checkpoint_sha256": teacher.checkpoint_sha256,
        },
        "preprocessing": {"mean": list(teacher.mean), "std": list(teacher.std)},
        "pixels": pixels,
        "precision": teacher.precision,
        "chunk_size": chunk_size,
        "probe_digest": probe_digest(),
    }
    target = store.folder / layout.TARGETS / name
    if not (target / "meta.json").exists():
        log(f"training the codec {codec} on a sample")
        sample = _sample(store, teacher, sample_size(codec), chunk_size, reader, pool)
        held_out = max(1, len(sample) // FIDELITY_SHARE)
        trained = Codec.train(codec, sample[:-held_out] if len(sample) > held_out else sample)
        cosines = _cosines(trained, sample[-held_out:])
        fidelity = {"cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min()), "sample": held_out}
        arrays = {**trained.arrays(), **{f"teacher-{key}": a for key, a in teacher.arrays.items()}}
        _publish_column(target, {**asked, "fidelity": fidelity}, arrays)
    column = store.column(name)
    found = asdict(column.meta)
    different = [key for key, value in asked.items() if found[key] != value]
    if different:
        key = different[0]
        raise RequestError(
            f"{target}: this column's {key} is {found[key]}, not {asked[key]}; give the same, or --name another column"
        )
    f = column.meta.fidelity
    log(f"codec {codec}: cosine to the teacher's own targets {f['cosine_mean']:.5f} mean, {f['cosine_min']:.5f} least")
    return column


def _sample(
    store: Store, teacher: Teacher, size: int, chunk_size: int, reader: _RowReader, pool: ThreadPoolExecutor
) -> Float32Array:
    """Targets of the first crops of the first images in the order of a hash that the seed fixes: float32 [n, D]."""
    m = store.manifest
    size = min(size + size // (FIDELITY_SHARE - 1), m.count * m.crops_per_image)
    per_image = -(-size // m.count)
    order = layout.in_hash_order(list(store.paths), f"codec {m.seed}")[: -(-size // per_image)]
    rows: list[int] = []

    def calls() -> Iterator[Callable[[], _Row]]:
        for row in order:
            yield lambda row=row: reader(row, per_image)  # type: ignore[misc]

    def readable() -> Iterator[_Row]:
        for row in _in_order(pool, calls(), ahead=4):
            if row.checksum:
                rows.append(1)
                yield row

    parts = [_embed(teacher, chunk, chunk_size) for chunk in _chunks(readable(), chunk_size, 0)]
    if not parts:
        raise ImageError(f"{reader.images.root}: none of the images in the codec's sample can be read")
    return np.concatenate(parts)[:size]


def _cosines(codec: Codec, targets: Float32Array) -> npt.NDArray[np.float64]:
    decoded = codec.decode(codec.encode(targets)).astype(np.float64)
    exact = targets.astype(np.float64)
    norms = np.linalg.norm(decoded, axis=1) * np.linalg.norm(exact, axis=1)
    cosines: npt.NDArray[np.float64] = (decoded * exact).sum(axis=1) / np.maximum(norms, 1e-12)
    return cosines


def _publish_column(target: Path, meta: dict[str, Any], arrays: dict[str, Float32Array]) -> None:
    """Publishes a column's folder whole; if another process was first, its column stands."""
    temporary = target.with_name(f".tmp-{target.name}-{time.time_ns()}")
    temporary.mkdir(parents=True)
    digests = {name: files.write_npy(temporary / f"{name}.npy", array) for name, array in arrays.items()}
    files.write_json(temporary / "meta.json", {**meta, "arrays": digests})
    try:
        temporary.rename(target)
    except OSError:
        if not (target / "meta.json").exists():
            raise
        shutil.rmtree(temporary)
    files.sync_folder(target.parent)


def _write_shard(
    store: Store, column: Column, teacher: Teacher, shard: int, reader: _RowReader, pool: ThreadPoolExecutor, bar: Any
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
        if codes_path.with_suffix(".json").exists():  # finished by another process since we looked
            bar.update(len(rows) * per_row)
            return 0
        already = progress.crops
        bar.update(already)
        first = already // per_row
        checksums = progress.checksums
        del checksums[first:]

        def calls() -> Iterator[Callable[[], _Row]]:
            for k in range(first, len(rows)):
                expected = known[k] if known else None
                yield lambda k=k, expected=expected: reader(rows[k], per_row, expected)  # type: ignore[misc]

        def read() -> Iterator[_Row]:
            for row in _in_order(pool, calls(), ahead=pool._max_workers + 1):
                checksums.append(row.checksum)
                yield row

        for chunk in _chunks(read(), size, already - first * per_row):
            progress.add(column.codec.encode(_embed(teacher, chunk, size)))
            bar.update(len(chunk))
        if known is None:
            _publish_crops(store, shard, reader, crops_path, checksums)
        shape = (len(rows), per_row, column.meta.code_size)
        digest = progress.publish(codes_path, files.npy_header(np.dtype(np.uint8), shape))
        files.write_json(codes_path.with_suffix(".json"), {"file": digest, "column": column.digest})
        return len(rows) * per_row - already


def _publish_crops(store: Store, shard: int, reader: _RowReader, path: Path, checksums: list[str]) -> None:
    rows = store.manifest.shard_rows(shard)
    records = np.stack([reader.records(row, store.crops_per_image) for row in rows])
    digest = files.write_npy(path, records)
    skipped = [row for row, checksum in zip(rows, checksums, strict=True) if not checksum]
    try:
        files.write_json(path.with_suffix(".json"), {"file": digest, "images": checksums, "skipped": skipped})
    except StoreError as error:
        raise StoreError(f"{error}; another process read other image files: see that all see the same folder") from error
