"""A reader of format 1 written from docs/store-format.md alone, with numpy and json: no faiss, nothing of fkd_ssl."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

RECORD = np.dtype(
    [
        ("top", "<u2"),
        ("left", "<u2"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("flags", "u1"),
        ("order", "u1"),
        ("brightness", "<f2"),
        ("contrast", "<f2"),
        ("saturation", "<f2"),
        ("hue", "<f2"),
        ("sigma", "<f2"),
    ]
)
LABEL = re.compile(r"hard|smoothing|full|marginal_(?:smoothing|renorm|quantised)_k([1-9]\d*)")
SPEC = re.compile(r"(?:(OPQ|PCAR?|RR)(\d+)(?:_(\d+))?,)?(?:(Flat|SQ8|SQ6|SQ4|SQfp16|SQbf16)|PQ(\d+)(?:x(\d+))?)")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def read_json(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    values = json.loads(data)
    assert canonical(values) == data, f"{path}: not canonical"
    said = values.pop("sha256")
    assert sha256(canonical(values)) == said, f"{path}: altered"
    return values


def read_npy(path: Path, digest: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    data = path.read_bytes()
    assert sha256(data) == digest, f"{path}: altered"
    assert data[:8] == b"\x93NUMPY\x01\x00"
    start = 10 + int.from_bytes(data[8:10], "little")
    text = data[10:start].decode("latin-1")
    assert "'fortran_order': False" in text
    stated = re.search(r"'shape': \(([0-9, ]*)\)", text)
    assert stated is not None
    assert tuple(int(n) for n in stated[1].split(",") if n.strip()) == shape, f"{path}: another shape"
    return np.frombuffer(data[start:], dtype=dtype).reshape(shape)


def bits(codes: np.ndarray, width: int, count: int) -> np.ndarray:
    """`count` unsigned numbers of `width` bits each from every code, least significant bit first."""
    stream = np.unpackbits(codes, axis=-1, bitorder="little")[..., : width * count].reshape(*codes.shape[:-1], count, width)
    return (stream.astype(np.int64) << np.arange(width)).sum(axis=-1)


def probabilities(spec: str, dim: int, k: int, codes: np.ndarray) -> np.ndarray:
    """Class probabilities float32 [n, K] of codes uint8 [n, code size]."""
    if "quantised" in spec:
        width = (dim - 1).bit_length()
        numbers = bits(codes, 1, 8 * codes.shape[1])
        classes, levels = bits(codes, width, k), numbers[:, k * width : k * (width + 6)].reshape(-1, k, 6) @ 2 ** np.arange(6)
        assert not numbers[:, k * (width + 6) :].any()
        ratios = 2.0 ** (-(levels + 0.5) * (12 + np.log2(dim)) / 64)
        p = np.repeat(ratios[:, -1:], dim, axis=1)
        np.put_along_axis(p, classes, np.concatenate([np.ones((len(codes), 1)), ratios[:, :-1]], axis=1), axis=1)
        return (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
    classes = codes[:, : 2 * k].copy().view("<u2").astype(int)
    values = codes[:, 2 * k :].copy().view("<f2").astype(float)
    if spec == "full":
        classes, values = np.arange(dim)[None].repeat(len(codes), axis=0), codes.copy().view("<f2").astype(float)
    elif spec == "hard":
        values = np.ones((len(codes), 1))
    p = np.zeros((len(codes), dim))
    if "smoothing" in spec:
        p += np.maximum(0, 1 - values.sum(axis=1, keepdims=True)) / (dim - k)
    for row in range(len(codes)):
        p[row, classes[row]] = values[row]
    return (p / p.sum(axis=1, keepdims=True)).astype(np.float32)


def decode(spec: str, dim: int, arrays: dict[str, np.ndarray], codes: np.ndarray) -> np.ndarray:
    """Targets float32 [n, D] of codes uint8 [n, code size]."""
    if label := LABEL.fullmatch(spec):
        return probabilities(spec, dim, dim if spec == "full" else int(label[1] or 1), codes)
    match = SPEC.fullmatch(spec)
    assert match is not None
    pre, a, b, scalar, parts, width = match.groups()
    inner = dim if not pre or (pre == "OPQ" and b is None) else int(b or a)
    if scalar == "Flat":
        x = codes.copy().view("<f4")
    elif scalar == "SQfp16":
        x = codes.copy().view("<f2").astype(np.float32)
    elif scalar == "SQbf16":
        x = (codes.copy().view("<u2").astype("<u4") << 16).view("<f4")
    elif scalar:
        low, span = arrays["ranges"]
        size = int(scalar[2:])
        x = low + (bits(codes, size, inner) + np.float32(0.5)) / np.float32(2**size - 1) * span
    else:
        numbers = bits(codes, int(width or 8), int(parts))
        x = np.concatenate([arrays["centroids"][m][numbers[:, m]] for m in range(int(parts))], axis=1)
    if pre in ("PCA", "PCAR"):
        x = x - arrays["transform_bias"]
    if pre:
        x = x @ arrays["transform"]
    if pre in ("PCA", "PCAR"):
        mean, rows = arrays["transform_mean"], arrays["transform"]
        x = x + mean - rows.T @ (rows @ mean)
    if spec != "Flat":
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x.astype(np.float32)


def read_store(folder: Path) -> dict[str, Any]:
    """Reads everything: paths, sizes, records [N, C], which rows were skipped, and all targets [N, C, *shape]."""
    m = read_json(folder / "manifest.json")
    digest = sha256(canonical(m))
    assert m["format"] == "fkd_ssl store"
    assert m["version"] == 1
    parts = [(folder / "images", m, digest)]
    for number, path in enumerate(sorted(folder.glob("images-*.json")), 1):
        extension = read_json(path)
        assert (path.name, extension["manifest"]) == (f"images-{number:05d}.json", digest)
        digest = sha256(canonical(extension))
        parts.append((path.with_suffix(""), extension, digest))
    paths, sizes, shards = [], [], []
    crops, size = m["crops_per_image"], m["rows_per_shard"]
    kind = np.dtype([("bytes", "<u8"), ("width", "<u2"), ("height", "<u2")])
    for path, about, digest in parts:
        text, count = path.with_suffix(".txt").read_bytes(), about["count"]
        assert sha256(text) == about["images_sha256"]
        assert len(text.decode("utf-8").split("\n")[:-1]) == count
        paths += text.decode("utf-8").split("\n")[:-1]
        sizes.append(read_npy(path.with_suffix(".npy"), about["sizes_sha256"], kind, (count,)))
        shards += [(min(size, count - first), digest) for first in range(0, count, size)]
    store: dict[str, Any] = {
        "paths": paths,
        "skipped": [],
        "crops": [],
        "columns": {},
        "sizes": np.concatenate(sizes),
    }
    for shard, (rows, digest) in enumerate(shards):
        about = read_json(folder / "crops" / f"{shard:05d}.json")
        assert set(about) == {"file", "images", "manifest", "shard", "skipped"}
        assert (about["manifest"], about["shard"], len(about["images"])) == (digest, shard, rows)
        store["skipped"] += about["skipped"]
        store["crops"].append(read_npy(folder / "crops" / f"{shard:05d}.npy", about["file"], RECORD, (rows, crops)))
    store["crops"] = np.concatenate(store["crops"])
    for column in sorted(path for path in folder.glob("targets/[!.]*") if path.is_dir()):
        meta = read_json(column / "meta.json")
        shapes = {name: shape_of(meta, name) for name in meta["arrays"] if not name.startswith("teacher-")}
        arrays = {name: read_npy(column / f"{name}.npy", meta["arrays"][name], "<f4", shape) for name, shape in shapes.items()}
        codes = []
        for shard, (rows, digest) in enumerate(shards):
            about = read_json(column / f"codes-{shard:05d}.json")
            assert set(about) == {"column", "file", "manifest", "shard"}
            assert (about["manifest"], about["shard"], about["column"]) == (digest, shard, sha256(canonical(meta)))
            codes.append(read_npy(column / f"codes-{shard:05d}.npy", about["file"], "u1", (rows, crops, meta["code_size"])))
        every, (*grid, dim) = np.concatenate(codes), meta["teacher"]["shape"]
        assert len(grid) == (2 if meta["teacher"]["kind"] == "tokens" else 0)
        targets = decode(meta["codec"], dim, arrays, every.reshape(-1, meta["code_size"] // int(np.prod(grid))))
        store["columns"][column.name] = targets.reshape(len(paths), crops, *grid, dim)
    return store


def shape_of(meta: dict[str, Any], name: str) -> tuple[int, ...]:
    match = SPEC.fullmatch(meta["codec"])
    assert match is not None
    pre, a, b, _, parts, width = match.groups()
    dim = meta["teacher"]["shape"][-1]
    inner = dim if not pre or (pre == "OPQ" and b is None) else int(b or a)
    if name == "centroids":
        return (int(parts), 2 ** int(width or 8), inner // int(parts))
    return {"ranges": (2, inner), "transform": (inner, dim), "transform_bias": (inner,), "transform_mean": (dim,)}[name]
