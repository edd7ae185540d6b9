"""A new column of a store: its codec, trained on a sample that the seed fixes, and its meta.json."""

import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fkd_ssl import files
from fkd_ssl.crops import probe_digest
from fkd_ssl.errors import ImageError, RequestError
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.codecs import Codec, Float32Array, code_size, sample_size
from fkd_ssl.store.reader import Column, Store
from fkd_ssl.store.rows import Row, RowReader, Teacher, chunks, embed, in_order

FIDELITY_SHARE = 9  # one target in nine of the codec's sample is held out to measure its fidelity on


def open_or_train(
    store: Store, name: str, teacher: Teacher, codec: str, pixels: int, chunk_size: int,
    reader: RowReader, pool: ThreadPoolExecutor, log: Callable[[str], None],
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
    store: Store, teacher: Teacher, size: int, chunk_size: int, reader: RowReader, pool: ThreadPoolExecutor
) -> Float32Array:
    """Targets of the first crops of the first images in the order of a hash that the seed fixes: float32 [n, D]."""
    m = store.manifest
    size = min(size + size // (FIDELITY_SHARE - 1), m.count * m.crops_per_image)
    per_image = -(-size // m.count)
    order = layout.in_hash_order(list(store.paths), f"codec {m.seed}")[: -(-size // per_image)]

    def calls() -> Iterator[Callable[[], Row]]:
        for row in order:
            yield lambda row=row: reader(row, per_image)  # type: ignore[misc]

    def readable() -> Iterator[Row]:
        for row in in_order(pool, calls(), ahead=reader.ahead):
            if row.checksum:
                yield row

    parts = [embed(teacher, chunk, chunk_size) for chunk in chunks(readable(), chunk_size, 0)]
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
    temporary = target.with_name(f"{files.TEMPORARY}{target.name}-{secrets.token_hex(6)}")
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
