"""Creates new columns of a store: trains their codecs on a sample that depends on the seed, and writes their meta.json."""

import math
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fkd_ssl import files
from fkd_ssl.arrays import Float32Array
from fkd_ssl.crops import replay_digest
from fkd_ssl.errors import ImageError, RequestError
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.column import Column, ColumnMeta
from fkd_ssl.store.reader import Store
from fkd_ssl.store.write import work
from fkd_ssl.store.write.pipeline import Pipeline
from fkd_ssl.store.write.rows import Row, RowReader, Teacher
from fkd_ssl.store.write.streams import Pass, TeacherStream, feed
from fkd_ssl.targets import Codec, TargetSpec
from fkd_ssl.targets.info import difference
from fkd_ssl.text import plural

FIDELITY_SHARE = 9  # one target in nine of the codec's sample is held out for measuring the fidelity
_LOW_COSINE = 0.9  # mean cosine of decoded to original targets, below which a larger codec is suggested


@dataclass(frozen=True, kw_only=True)
class Request:
    """A requested column."""

    name: str
    teacher: Teacher
    codec: str
    """faiss factory string for embeddings, or a label codec for class probabilities."""
    pixels: int
    """Side of the crops that the teacher sees."""
    chunk_size: int
    """Number of crops per forward pass."""
    device: str | None = None
    """torch device that makes the crops; None for the threads."""

    def __post_init__(self) -> None:
        self.teacher.info.spec.check_codec(self.codec, self.teacher.info.name)

    @property
    def target(self) -> TargetSpec:
        """Kind and shape of its targets."""
        return self.teacher.info.spec

    def meta(self) -> dict[str, Any]:
        """Returns the values that meta.json must have: all but the measured ones."""
        return {
            "codec": self.codec,
            "code_size": self.target.check_codec(self.codec, self.teacher.info.name),
            "teacher": replace(self.teacher.info, pixels=self.pixels).to_json(),
            "chunk_size": self.chunk_size,
            "replay_digest": replay_digest(self.device),
        }

    def difference(self, meta: ColumnMeta) -> str:
        """Describes the first difference of a column's meta.json from this request; "" if they are equal."""
        return difference(meta.to_json(), self.meta())


class _DoneError(Exception):
    """Another process has written all the columns that this process is training codecs for."""


def open_or_train(
    store: Store, requests: Sequence[Request], reader: RowReader, pipeline: Pipeline, log: Callable[[str], None]
) -> list[Column]:
    """Returns the requested columns, and creates missing ones with a codec trained on a sample.

    Raises:
        RequestError: A column of that name belongs to another teacher, or has other settings.
    """
    for request in requests:
        log(replace(request.teacher.info, name=request.name).description)
    for request in requests:  # checked before any work
        target = store.folder / layout.TARGETS / request.name
        if target.is_dir() and any(target.iterdir()) and not _exists(store, request):
            raise RequestError(_missing_meta(target))
        if _exists(store, request):
            _check(store, request)
    new = [request for request in requests if not _exists(store, request)]
    for codec, kind in dict.fromkeys((request.codec, request.target.kind) for request in new):
        log(f"training the codec {codec} on a sample")
        train_columns(
            store,
            [request for request in new if (request.codec, request.target.kind) == (codec, kind)],
            reader,
            pipeline,
            lambda request, meta, arrays: write_column(store.folder / layout.TARGETS / request.name, meta, arrays),
            log=log,
        )
    for request in requests:
        work.clear(_sample_file(store, request))
    columns = [_check(store, request) for request in requests]
    for column in columns:
        log(f"codec {column.meta.codec}: {describe_fidelity(column.meta.fidelity)}")
    return columns


def train(request: Request, sample: Float32Array) -> tuple[dict[str, Any], dict[str, Float32Array]]:
    """Trains a column's codec, with part of the sample held out. Returns meta.json without checksums, and the arrays."""
    trained, fidelity = train_codec(request.codec, request.target, sample)
    meta = {**request.meta(), "fidelity": fidelity}
    return meta, {**trained.arrays(), **{f"teacher-{key}": a for key, a in request.teacher.info.arrays.items()}}


def train_codec(codec: str, target: TargetSpec, sample: Float32Array) -> tuple[Codec, dict[str, Any]]:
    """Trains a codec on a sample (`Kind.sample`), part of it held out. Returns the codec and its fidelity on that part.

    Raises:
        RequestError: The sample is too small, or the decoded targets are too far from the original ones.
    """
    check_sample(codec, target, len(sample))
    definition = target.definition
    held_out = max(1, len(sample) // FIDELITY_SHARE)
    trained = definition.train(codec, sample[: _trained_on(len(sample))])
    exact = sample[-held_out:]
    fidelity = {**definition.fidelity(exact, trained.decode(trained.encode(exact))), "sample": held_out}
    if not fidelity["cosine_mean"] >= definition.min_cosine:
        larger = [
            other
            for other in definition.larger_codecs
            if definition.code_size(other, target.shape) > definition.code_size(codec, target.shape)
        ]
        raise RequestError(
            f"codec {codec} loses too much: after training on {plural(_trained_on(len(sample)), 'target')}, "
            f"the mean cosine of {plural(held_out, 'other')} is {fidelity['cosine_mean']:.3f}, and at least "
            f"{definition.min_cosine} is needed; choose a larger codec "
            f"({', '.join(larger or definition.larger_codecs[-1:])})"
        )
    return trained, fidelity


def check_sample(codec: str, target: TargetSpec, sample: int) -> None:
    """Raises RequestError if a sample of this many targets, with part of them held out, is too small for a codec."""
    needed = target.definition.min_sample(codec, target.shape)
    if _trained_on(sample) < needed:
        raise RequestError(
            f"codec {codec} needs at least {needed} targets for its training; there are {_trained_on(sample)} "
            f"(one in {FIDELITY_SHARE} is held out): store more crops or images, or choose "
            f"{(target.definition.larger_codecs or [target.definition.default_codec(target.shape)])[0]}"
        )


def _trained_on(sample: int) -> int:
    return sample - sample // FIDELITY_SHARE if sample >= FIDELITY_SHARE else max(1, sample - 1) if sample else 0


def sample_targets(codec: str, target: TargetSpec, targets: int) -> int:
    """Returns how many of a store's `targets` form a codec's sample, including the held-out ones."""
    size = target.definition.sample_size(codec, target.shape)
    return min(size + size // (FIDELITY_SHARE - 1), targets)


def describe_fidelity(fidelity: dict[str, Any]) -> str:
    """Describes how close decoded targets are to the encoded ones: those of the teacher, or of a source column."""
    f = fidelity
    whose = "the source column's targets" if "source_codec" in f else "the teacher's own targets"
    if not f.get("sample", 1):
        return f"the loss to {whose} is unknown"
    if "total_variation_mean" in f:
        return f"total variation to {whose} {f['total_variation_mean']:.4f} mean, {f['total_variation_max']:.4f} max"
    return f"cosine to {whose} {f['cosine_mean']:.5f} mean, {f['cosine_min']:.5f} min"


def sample_rows(store: Store, codec: str, target: TargetSpec) -> tuple[list[int], int, int]:
    """Returns the crops that a codec is trained on: rows in an order hashed from the seed, crops per row, total crops.

    They are from the first part of the store, so that a codec can be made again after the store was extended.
    """
    m = store.manifest
    count = m.parts[0].count
    size = sample_targets(codec, target, count * m.crops_per_image)
    per_image = -(-size // count)
    return layout.in_hash_order(store.paths[:count], f"codec {m.seed}")[: -(-size // per_image)], per_image, size


def train_columns(
    store: Store,
    requests: Sequence[Request],
    reader: RowReader,
    pipeline: Pipeline,
    write: Callable[[Request, dict[str, Any], dict[str, Float32Array]], None],
    *,
    always: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> None:
    """Trains the codecs of several requests, of one codec and kind, on their teachers' targets. Reads the sample once for all.

    The finished part of the sample survives a kill.

    Args:
        store: The store.
        requests: Columns that do not exist, with one codec.
        reader: Reads the sample.
        pipeline: Runs the teachers.
        write: Called with meta.json and arrays of each column.
        always: Write even if another process has written the columns meanwhile. By default its columns are kept.
        log: Called with a warning for each codec that loses much.
    """
    order, per_image, size = sample_rows(store, requests[0].codec, requests[0].target)
    parts: list[list[Float32Array]] = [[] for _ in requests]

    def overtaken() -> bool:
        return not always and all(_exists(store, request) for request in requests)

    with ExitStack() as stack:
        streams = []
        for request, mine in zip(requests, parts, strict=True):
            owner = files.sha256(files.canonical({"sample": request.meta()}))
            unit = math.prod(_sample_shape(request)) * np.dtype(np.float32).itemsize
            progress = stack.enter_context(
                work.open_work(_sample_file(store, request), owner, unit=unit, crops=len(order) * per_image, per_row=per_image)
            )
            streams.append(_sample_stream(request, mine, progress, per_image, overtaken))
        with suppress(_DoneError):
            feed(reader, [Pass(rows=order, streams=streams)], per_image, pipeline)
            for request, mine in zip(requests, parts, strict=True):
                if not mine:
                    raise ImageError(f"{reader.images.spec}: none of the images in the codec's sample can be read")
                sample = np.concatenate(mine)[:size]
                meta, arrays = train(request, sample)
                warn_of_loss(request.name, request.codec, request.target, meta["fidelity"], sample, log)
                write(request, meta, arrays)


def warn_of_loss(
    name: str, codec: str, target: TargetSpec, fidelity: dict[str, Any], sample: Float32Array, log: Callable[[str], None]
) -> None:
    """Logs a warning if a column's codec of vectors or tokens loses much, with the smallest larger codec that does not."""
    cosine = fidelity["cosine_mean"]
    size = target.definition.code_size(codec, target.shape)
    for other in target.definition.larger_codecs if cosine < _LOW_COSINE else ():
        more, kept = target.definition.code_size(other, target.shape), 0.0
        if more > size:
            with suppress(RequestError):  # it may lose too much for any use
                kept = train_codec(other, target, sample)[1]["cosine_mean"]
        if kept >= _LOW_COSINE:
            log(
                f"warning: {name}: in {codec}, with {size:,} bytes per crop, the mean cosine of decoded to original "
                f"{target.definition.display_name} is only {cosine:.3f}; in {other}, with {more:,} bytes, it is {kept:.3f}. To "
                f"store that instead, stop now, and repeat the command with --codec {other} and another store or column"
            )
            break


def _sample_stream(
    request: Request, parts: list[Float32Array], progress: work.WorkFile | None, per_image: int, overtaken: Callable[[], bool]
) -> TeacherStream:
    """Returns a teacher's stream of the sample. Its targets go into `parts`, and into `progress` unless that is None."""
    done: int = 0
    checksums: list[str] = []
    if progress is not None:
        done, checksums = progress.crops, progress.checksums
    readable, first = 0, 0
    while first < len(checksums) and (not checksums[first] or readable + per_image <= done):
        readable += per_image if checksums[first] else 0
        first += 1
    del checksums[first:]
    if progress is not None and done - readable >= per_image:  # the journal counts crops whose rows it lacks
        progress.restart()
        done, checksums, readable, first = 0, progress.checksums, 0, 0
    if progress is not None and done:
        parts.append(np.frombuffer(progress.read(), dtype=np.float32).reshape(done, *_sample_shape(request)))

    def on_row(row: Row) -> bool:
        checksums.append("+" if row.checksum else "")  # keeps the journal small: it lists up to 300,000 rows
        return bool(row.checksum)

    def on_targets(targets: Float32Array) -> None:
        if overtaken():
            raise _DoneError
        sample = np.ascontiguousarray(request.target.definition.sample(targets))
        parts.append(sample)
        if progress is not None:
            progress.add(sample)

    return TeacherStream(
        request.teacher,
        pixels=request.pixels,
        chunk_size=request.chunk_size,
        first=first,
        skip=done - readable,
        on_row=on_row,
        on_targets=on_targets,
        device=request.device,
    )


def _sample_shape(request: Request) -> tuple[int, ...]:
    """Returns the shape of one target in a codec's sample."""
    return request.target.definition.sample(np.empty((0, *request.target.shape), dtype=np.float32)).shape[1:]


def _sample_file(store: Store, request: Request) -> Path:
    return store.folder / layout.TARGETS / f".work-{request.name}-sample"


def _exists(store: Store, request: Request) -> bool:
    return (store.folder / layout.TARGETS / request.name / "meta.json").exists()


def _check(store: Store, request: Request) -> Column:
    """Returns the column of that name, if it is the requested one."""
    column = store.column(request.name)
    if other := request.difference(column.meta):
        raise RequestError(f"{column.folder}: this column's {other}; pass the same, or choose another --column")
    return column


def write_column(target: Path, meta: dict[str, Any], arrays: dict[str, Float32Array]) -> None:
    """Writes the complete folder of a column. If another process was first, its column is kept.

    Raises:
        RequestError: A folder of that name exists but is not a column.
    """
    temporary = target.with_name(f"{files.TEMPORARY}{target.name}-{secrets.token_hex(6)}")
    temporary.mkdir(parents=True)
    try:
        digests = {name: files.write_npy(temporary / f"{name}.npy", array) for name, array in arrays.items()}
        files.write_json(temporary / "meta.json", {**meta, "arrays": digests})
        try:
            temporary.rename(target)
        except OSError as error:
            if not target.exists():
                raise
            if not (target / "meta.json").exists():
                raise RequestError(_missing_meta(target)) from error
        files.sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _missing_meta(target: Path) -> str:
    return (
        f"{target}: the folder exists, but its meta.json is missing: restore it from a backup, or move the folder away and run "
        "this again"
    )
