"""faiss indexes of a gallery: what they find of the exact neighbours, how fast, in how many bytes.

All by cosine: vectors are normalised and compared by their inner product. Saved, a gallery is a folder of plain files,
`features.npy` float32 [N, D] of length 1, `labels.npy`, `images.txt`, `index.json`; the faiss index beside them is read only
where an HMAC of it and of `images.txt` with this user's own key says that this user wrote them, since faiss trusts what it
reads. Elsewhere it is built again from the features.

Legend: `N` images in the gallery, `D` feature dimension, `Q` queries.
"""

import hashlib
import hmac
import math
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fkd_ssl import files
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.eval import search
from fkd_ssl.eval.scores import Float32Array, Int64Array, as_features

Kind = Literal["exact", "hnsw", "ivfflat", "ivfpq"]
KINDS: dict[str, tuple[int, ...]] = {
    "exact": (0,),
    "hnsw": (16, 32, 64, 128, 256, 512),
    "ivfflat": (1, 2, 4, 8, 16, 32, 64),
    "ivfpq": (1, 2, 4, 8, 16, 32, 64),
}
"""Name -> its search effort, least to most, that the curve is drawn over: efSearch of HNSW, lists looked into of IVF."""
DEFAULT_EFFORT = {"exact": 0, "hnsw": 128, "ivfflat": 16, "ivfpq": 16}

_LINKS, _EFFORT_OF_BUILDING = 32, 80  # of HNSW
_IMAGES = 39  # that faiss wants of each centroid
_INDEX, _ABOUT = "index.faiss", "index.json"


@dataclass(frozen=True)
class Index:
    """An index of a gallery; `faiss` is None for the exact one, which needs none."""

    kind: str
    unit: Float32Array
    """The gallery, float32 [N, D] of length 1."""
    faiss: Any

    def search(self, queries: Float32Array, k: int, effort: int | None = None) -> tuple[Float32Array, Int64Array]:
        """Similarities float32 [Q, k], largest first, and rows int64 [Q, k], -1 where fewer were found."""
        if self.faiss is None:
            parts = list(search.nearest(self.unit, queries, min(k, len(self.unit))))
            return np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])
        effort = DEFAULT_EFFORT[self.kind] if effort is None else effort
        if self.kind == "hnsw":
            self.faiss.hnsw.efSearch = max(effort, k)
        else:
            self.faiss.nprobe = min(effort, self.faiss.nlist)
        similarity, rows = self.faiss.search(normalised(queries), k)
        return similarity, rows.astype(np.int64)

    def bytes_per_vector(self) -> float:
        """All that the index takes in a file, for one image."""
        import faiss

        return self.unit.shape[1] * 4.0 if self.faiss is None else faiss.serialize_index(self.faiss).nbytes / len(self.unit)


def normalised(features: Float32Array) -> Float32Array:
    """Rows of length 1; a row of zeros stays."""
    length = search.lengths(features)
    unit: Float32Array = (features / np.where(length > 0, length, 1)[:, None]).astype(np.float32)
    return unit


def build(gallery: Float32Array, kind: Kind) -> Index:
    """An index of finite features float32 [N, D]; raises RequestError where the gallery is too small for the kind."""
    if kind not in KINDS:
        raise RequestError(f"index {kind!r}: expected {', '.join(KINDS)}")
    unit = normalised(gallery)
    count, dim = unit.shape
    if kind == "exact":
        return Index(kind, unit, None)
    import faiss

    index: Any
    lists = max(1, min(int(4 * math.sqrt(count)), count // _IMAGES))
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _EFFORT_OF_BUILDING
    elif kind == "ivfflat":
        index = faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    else:
        bits = 8 if count >= 256 else 4
        if count < 2**bits:
            raise RequestError(f"index ivfpq: {count} images in the gallery; product quantisation needs at least {2**bits}")
        pieces = max(m for m in range(1, max(1, dim // 8) + 1) if dim % m == 0)
        index = faiss.index_factory(dim, f"IVF{lists},PQ{pieces}x{bits}", faiss.METRIC_INNER_PRODUCT)
        index.do_polysemous_training = False  # seconds of annealing, for a search that is not used
        index.pq.cp.min_points_per_centroid = 1
    if kind != "hnsw":
        index.cp.min_points_per_centroid = 1  # of a small gallery faiss would warn for each list
        index.train(unit)
    index.add(unit)
    return Index(kind, unit, index)


def curve(
    gallery: Float32Array, queries: Float32Array, *, kinds: Sequence[str] = tuple(KINDS), k: int = 10, seconds: float = 0.5
) -> list[dict[str, Any]]:
    """Each index at each effort, as ann-benchmarks compares them: the part of the exact k neighbours that it finds.

    Args:
        gallery: Finite, float32 [N, D].
        queries: Finite, float32 [Q, D].
        kinds: Of KINDS.
        k: Neighbours sought.
        seconds: The queries are repeated for so long, for queries per second.

    Returns:
        `index`, `effort`, `recall` in percent, `queries_per_second`, `bytes_per_vector`, `build_seconds`.
    """
    k = min(k, len(gallery))
    exact, _ = build(gallery, "exact").search(queries, k)
    rows = []
    for kind in kinds:
        started = time.perf_counter()
        index = build(gallery, kind)  # type: ignore[arg-type]  # checked there
        built = time.perf_counter() - started
        size = index.bytes_per_vector()
        for effort in KINDS[kind]:
            _, found = index.search(queries, k, effort)
            started, rounds = time.perf_counter(), 0
            while rounds == 0 or time.perf_counter() - started < seconds:
                index.search(queries, k, effort)
                rounds += 1
            speed = rounds * len(queries) / (time.perf_counter() - started)
            rows.append(
                {
                    "index": kind,
                    "effort": effort,
                    "recall": 100 * _recall(index.unit, normalised(queries), found, exact),
                    "queries_per_second": speed,
                    "bytes_per_vector": size,
                    "build_seconds": built,
                }
            )
    return rows


def _recall(unit: Float32Array, queries: Float32Array, found: Int64Array, exact: Float32Array) -> float:
    """The part of the k found that are as near as the k-th nearest, as ann-benchmarks counts: of equals any will do."""
    least = exact[:, -1:] - 1e-6
    near = np.einsum("qkd,qd->qk", unit[found], queries) >= least
    return float((near & (found >= 0)).mean())


def save(index: Index, folder: Path, *, labels: Int64Array, images: Sequence[str], about: dict[str, Any]) -> None:
    """Writes a gallery and its index; raises RequestError where the folder holds anything."""
    if folder.exists() and any(folder.iterdir()):
        raise RequestError(f"{folder}: exists; choose another folder for the index")
    folder.mkdir(parents=True, exist_ok=True)
    files.write_npy(folder / "features.npy", index.unit)
    files.write_npy(folder / "labels.npy", labels)
    names, data = "".join(f"{name}\n" for name in images).encode(), b""
    with files.publish(folder / "images.txt") as file:
        file.write(names)
    signed: dict[str, Any] = {"kind": index.kind, "n": len(index.unit), "dim": index.unit.shape[1], **about}
    if index.faiss is not None:
        import faiss

        data = faiss.serialize_index(index.faiss).tobytes()
        with files.publish(folder / _INDEX) as file:
            file.write(data)
    files.write_json(folder / _ABOUT, {**signed, "hmac": _signature(names, data)})


def load(folder: Path) -> tuple[Index, Int64Array, list[str], dict[str, Any]]:
    """A saved index, the labels and image names of its gallery, and what `save` was told about it.

    `ours` there says whether this user wrote index and names; names that a stranger wrote may be of any file.

    Raises:
        RequestError: There is none, or its files do not fit together.
        StoreError: A file is damaged.
        FkdError: A feature is not finite.
    """
    if not (folder / _ABOUT).is_file():
        raise RequestError(f"{folder}: no saved index (looked for {folder / _ABOUT})")
    about = files.read_json(folder / _ABOUT)
    kind, count, dim = about.get("kind"), about.get("n"), about.get("dim")
    if kind not in KINDS or not isinstance(count, int) or not isinstance(dim, int):
        raise RequestError(f"{folder / _ABOUT}: describes no index that is known here (kind {kind!r})")
    unit = as_features(files.map_npy(folder / "features.npy", np.dtype(np.float32), (count, dim)), str(folder / "features.npy"))
    labels = files.map_npy(folder / "labels.npy", np.dtype(np.int64), (count,))
    listed, data = files.read_plain(folder / "images.txt", 2**32), b""
    names = listed.decode(errors="replace").splitlines()
    if len(names) != count:
        raise RequestError(f"{folder / 'images.txt'}: {len(names)} names for {count} vectors")
    if kind != "exact":
        with suppress(StoreError):
            data = files.read_plain(folder / _INDEX, 2**40)
    about["ours"] = hmac.compare_digest(str(about.get("hmac")), _signature(listed, data))
    if kind == "exact" or not about["ours"]:
        return build(unit, kind), labels, names, about
    import faiss

    return Index(kind, unit, faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))), labels, names, about


def _signature(names: bytes, index: bytes) -> str:
    return hmac.new(_key(), f"{len(names)} ".encode() + names + index, hashlib.sha256).hexdigest()


def _key() -> bytes:
    """This user's own key, made when it is first needed."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fkd_ssl"
    path = base / "index.key"
    if not path.exists():
        base.mkdir(parents=True, exist_ok=True)
        temporary = base / f"{files.TEMPORARY}index.key-{secrets.token_hex(6)}"
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        with suppress(FileExistsError):  # another process was first: its key counts
            os.link(temporary, path)
        temporary.unlink()
    return files.read_plain(path, 1024)
