"""A small store made without a teacher: every family of codecs, two shards, a skipped row."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fkd_ssl import files
from fkd_ssl.crops import CROP_DTYPE, RECIPES, draw, image_key, replay_digest
from fkd_ssl.crops.records import neutral
from fkd_ssl.store import manifest as layout
from fkd_ssl.store.listing import SIZE_DTYPE
from fkd_ssl.store.write import creation
from fkd_ssl.targets import Codec, TargetSpec, TeacherInfo
from fkd_ssl.targets.label_codecs import is_label

DIM, CROPS, ROWS_PER_SHARD = 16, 3, 4
PATHS = ["a/1.jpg", "a/2.jpg", "b/3.jpg", "b/ä.jpg", "c/5.jpg", "c/6.jpg"]
SKIPPED = 4
FIDELITY = {"distribution": {"total_variation_mean": 0.1, "total_variation_max": 0.2}}
SPECS = (
    "Flat",
    "SQfp16",
    "SQbf16",
    "SQ8",
    "SQ6",
    "SQ4",
    "PQ4x8",
    "PQ4x4",
    "PQ2x10",
    "OPQ4_8,PQ4x4",
    "PCA8,SQ4",
    "PCAR8,SQ8",
    "RR16,SQ6",
    "hard",
    "smoothing",
    "marginal_smoothing_k5",
    "marginal_renorm_k3",
    "full",
    "marginal_quantised_k5",
)


def name_of(spec: str) -> str:
    return spec.replace(",", "-").lower()


def targets(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Returns unit vectors float32 [count, D] with unevenly distributed directions."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(count, DIM)) * 0.8 ** np.arange(DIM)
    values = values @ np.linalg.qr(np.random.default_rng(9).normal(size=(DIM, DIM)))[0]
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def probabilities(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Class probabilities float32 [count, DIM]."""
    powers = np.exp(3 * np.random.default_rng(seed).normal(size=(count, DIM)))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def target_of(spec: str) -> TargetSpec:
    """The kind and shape of the targets of a codec's column."""
    return TargetSpec("distribution" if is_label(spec) else "embedding", (DIM,))


def random_codec(spec: str) -> Codec:
    """Returns a codec with random parameters, without training; none of them could hide a mistake."""
    generator = np.random.default_rng(5)
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for name, shape in target_of(spec).definition.parameter_shapes(spec, (DIM,)).items():
        values = generator.normal(size=shape) * 0.3
        if name == "transform":
            values = np.linalg.qr(generator.normal(size=(DIM, DIM)))[0][: shape[0]]
        elif name == "ranges":
            values = np.stack([-0.6 - abs(values[0]), 1.2 + 2 * abs(values[0])])
        arrays[name] = np.ascontiguousarray(values, dtype=np.float32)
    return target_of(spec).definition.load(spec, (DIM,), arrays)


def make(folder: Path, specs: tuple[str, ...] = SPECS) -> dict[str, npt.NDArray[np.float32]]:
    """Writes the store; returns every column's exact targets float32 [N, C, D], by its name."""
    (folder / "crops").mkdir(parents=True)
    sizes = np.zeros(len(PATHS), dtype=SIZE_DTYPE)
    sizes["bytes"], sizes["width"], sizes["height"] = 4000, 90, 70
    lines = "".join(f"{path}\n" for path in PATHS).encode()
    (folder / "images.txt").write_bytes(lines)
    manifest = layout.Manifest(
        seed=7,
        recipe=RECIPES["mocov2"],
        crops_per_image=CROPS,
        rows_per_shard=ROWS_PER_SHARD,
        count=len(PATHS),
        images_sha256=files.sha256(lines),
        sizes_sha256=files.write_npy(folder / "images.npy", sizes),
    )
    manifest.write(folder)
    for shard in range(manifest.shards):
        rows = manifest.shard_rows(shard)
        records = np.zeros((len(rows), CROPS), dtype=CROP_DTYPE)
        for k, row in enumerate(rows):
            key = image_key(7, PATHS[row])
            records[k] = neutral(CROPS) if row == SKIPPED else draw(manifest.recipe, key, 70, 90, 0, CROPS)
        images = ["" if row == SKIPPED else files.sha256(PATHS[row].encode()) for row in rows]
        creation.write_crops(folder, manifest, shard, records, images)
    made = {}
    for number, spec in enumerate(specs):
        column = folder / "targets" / name_of(spec)
        column.mkdir(parents=True)
        codec = random_codec(spec)
        arrays = {name: files.write_npy(column / f"{name}.npy", array) for name, array in codec.arrays().items()}
        if spec == "SQ8":
            arrays["teacher-prototypes"] = files.write_npy(column / "teacher-prototypes.npy", targets(5))
        meta = {
            "codec": spec,
            "code_size": codec.code_size,
            "fidelity": {"cosine_mean": 0.99, "cosine_min": 0.9, "sample": 100, **FIDELITY.get(target_of(spec).kind, {})},
            "chunk_size": 16,
            "teacher": TeacherInfo(name="t", spec=target_of(spec), network="n", licence="l", pixels=64).to_json(),
            "replay_digest": replay_digest(),
            "arrays": arrays,
        }
        files.write_json(column / "meta.json", meta)
        some = probabilities if target_of(spec).kind == "distribution" else targets
        exact = some(len(PATHS) * CROPS, seed=number + 1).reshape(len(PATHS), CROPS, DIM)
        for shard in range(manifest.shards):
            rows = manifest.shard_rows(shard)
            codes = codec.encode(exact[rows.start : rows.stop].reshape(-1, DIM)).reshape(len(rows), CROPS, -1)
            creation.write_codes(folder, manifest, shard, codes, column=column.name, digest=files.sha256(files.canonical(meta)))
        made[column.name] = exact
    return made
