"""The cost of codecs: bytes, fidelity, time, and the kNN and linear scores of students trained on their targets.

    python benchmarks/codecs.py --images DIR --val DIR --teacher mocov2 --checkpoint FILE --pixels 64 --out DIR --seeds 3

The teacher runs once, into a lossless column (Flat). Every other codec is trained on those exact targets and encodes them.
Fidelity is measured on one image in nine, which no codec was trained on. Students are trained by `fkd-ssl train` on columns
of one store that differ only in their codec. Finished parts are not run again. Without --seeds, only the table of codecs is
printed.

For a teacher NAME@tokens, the table has the codecs of tokens (--codecs chooses others): bytes per crop, the cosine of tokens to
the exact ones, and the CPU time of decoding a batch of 256 crops on one thread.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits

from fkd_ssl import files
from fkd_ssl.arrays import Float32Array
from fkd_ssl.commands import resolve
from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.eval import knn, logreg, stats
from fkd_ssl.eval.features import extract_split
from fkd_ssl.images import scan
from fkd_ssl.objectives.feature_kl import FeatureKL
from fkd_ssl.store import Store, open_store
from fkd_ssl.store.manifest import in_hash_order
from fkd_ssl.store.write.creation import write_codes
from fkd_ssl.store.write.precompute import precompute
from fkd_ssl.targets.faiss_codecs import FaissCodec, sample_size

SPECS = (
    "Flat",
    "SQbf16",
    "SQfp16",
    "SQ8",
    "SQ6",
    "SQ4",
    "PQ32x8",
    "PQ16x8",
    "PQ64x4",
    "PQ32x4",
    "OPQ16,PQ16x8",
    "OPQ8,PQ8x8",
    "OPQ32,PQ32x8",
    "OPQ64,PQ64x4",
)
TOKEN_SPECS = ("Flat", "SQ8", "SQ4", "PCA64,SQ8", "OPQ16,PQ16x8", "OPQ16_128,PQ16x8", "OPQ8,PQ8x8", "PCA64,PQ16x8")
BATCH = 256  # crops
STUDENTS = ("Flat", "SQ4", "OPQ16,PQ16x8")
HELD_OUT = 9  # one image in nine is held out
PROBES = ("knn_top1", "linear_top1")


def exact_targets(store: Store) -> Float32Array:
    """Returns all targets of the lossless column: float32 [N, C, D]."""
    column = store.column("Flat")
    shards = [np.asarray(column.shard(s)) for s in range(store.manifest.shards)]
    return np.concatenate(shards).view(np.float32)


def fidelity(decoded: Float32Array, exact: Float32Array) -> dict[str, float]:
    """Returns the cosine of decoded to exact targets [n, D], and the KL in nats between feature_kl's distributions of both."""
    a, b = decoded.astype(np.float64), exact.astype(np.float64)
    cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    objective, target = FeatureKL(), torch.from_numpy(b)
    kl = objective(torch.from_numpy(a), target) - objective.floor(target)
    return {"cosine": float(cosine.mean()), "cosine_min": float(cosine.min()), "kl": float(kl)}


def microseconds(call: Callable[[npt.NDArray[np.generic]], object], values: npt.NDArray[np.generic], batch: int) -> float:
    """Returns the CPU time of a call per row of `values`, in batches on one thread: the best of three passes."""
    best = float("inf")
    with threadpool_limits(1):
        for _ in range(3):
            start = time.process_time()
            for k in range(0, len(values), batch):
                call(values[k : k + batch])
            best = min(best, time.process_time() - start)
    return 1e6 * best / len(values)


def split(store: Store) -> tuple[Float32Array, Float32Array]:
    """Returns the targets of the held-out images float32 [n, C, D], and those of the others [m, D]."""
    targets = exact_targets(store)
    order = in_hash_order(list(store.paths), "codecs")
    held = len(order) // HELD_OUT
    return targets[order[:held]], targets[order[held:]].reshape(-1, targets.shape[-1])


def codec_table(fresh: Float32Array, seen: Float32Array, specs: list[str], saved: Path) -> list[dict[str, object]]:
    """Returns a row per codec; rows in `saved` are not measured again."""
    exact = fresh.reshape(-1, fresh.shape[-1])
    rows: dict[str, dict[str, object]] = json.loads(saved.read_text()) if saved.exists() else {}
    for spec in specs:
        if spec in rows:
            continue
        start, used = time.perf_counter(), time.process_time()
        codec = FaissCodec.train(spec, seen[: sample_size(spec)])
        seconds, used = time.perf_counter() - start, time.process_time() - used
        codes = codec.encode(exact)
        encode, decode = microseconds(codec.encode, exact, 128), microseconds(codec.decode, codes, 512)
        rows[spec] = {
            "codec": spec,
            "bytes": codec.code_size,
            "with_record": codec.code_size + CROP_DTYPE.itemsize,
            **fidelity(codec.decode(codes), exact),
            "encode_us": encode,
            "decode_us": decode,
            "train_s": seconds,
            "train_cpu_s": used,
        }
        print(json.dumps(rows[spec]), file=sys.stderr)
        saved.write_text(json.dumps(rows))
    other = fidelity(np.roll(fresh, 1, axis=1).reshape(exact.shape), exact)
    return [*rows.values(), {"codec": "(another crop of the image)", **other}]


def token_table(store: Store, specs: Sequence[str]) -> list[dict[str, object]]:
    """Returns a row per codec of tokens, measured on one image in nine."""
    column = store.column("Flat")
    target = column.meta.target
    kind = target.definition
    order = in_hash_order(list(store.paths), "codecs")
    held = len(order) // HELD_OUT
    fresh = np.concatenate([store.targets("Flat", row, slice(None)) for row in order[:held]])
    seen = np.concatenate([kind.sample(store.targets("Flat", row, slice(None))) for row in order[held:]])
    rows: list[dict[str, object]] = []
    for spec in specs:
        used = time.process_time()
        arrays = kind.train(spec, seen[: kind.sample_size(spec, target.shape)]).arrays()
        used = time.process_time() - used
        codec = kind.load(spec, target.shape, arrays)
        codes = codec.encode(fresh)
        batch = np.resize(codes, (BATCH, codes.shape[1]))
        rows.append(
            {
                "codec": spec,
                "bytes": codec.code_size,
                **kind.fidelity(fresh, codec.decode(codes)),
                "decode_ms": BATCH * microseconds(codec.decode, batch, BATCH) / 1e3,
                "train_cpu_s": used,
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    other = kind.fidelity(fresh, np.roll(fresh, 1, axis=0))
    return [*rows, {"codec": "(the next crop)", **other}]


def rabitq(fresh: Float32Array, seen: Float32Array) -> list[dict[str, object]]:
    """Measures faiss's RaBitQ as a codec; fkd_ssl does not support it."""
    import faiss

    exact = fresh.reshape(-1, fresh.shape[-1])
    rows: list[dict[str, object]] = []
    for spec in ("RaBitQ", "RaBitQ4", "RR128,RaBitQ4"):
        try:
            index = faiss.index_factory(exact.shape[-1], spec)
            index.train(seen[:4096])
            decoded = index.sa_decode(index.sa_encode(exact))
        except (RuntimeError, AttributeError) as error:
            rows.append({"codec": spec, "failed": str(error).splitlines()[-1]})
            continue
        norms = np.maximum(np.linalg.norm(decoded, axis=1, keepdims=True), 1e-12)
        rows.append({"codec": spec, "bytes": index.sa_code_size(), **fidelity(decoded / norms, exact)})
    return rows


def write_column(store: Store, spec: str) -> str:
    """Writes a column of the exact targets in another codec unless it exists; returns its name."""
    name = spec.replace(",", "-")
    flat = store.column("Flat")
    folder = store.folder / "targets" / name
    if not (folder / "meta.json").exists():
        fresh, seen = split(store)
        exact = fresh.reshape(-1, fresh.shape[-1])
        codec = FaissCodec.train(spec, seen[: sample_size(spec)])
        found = fidelity(codec.decode(codec.encode(exact)), exact)
        folder.mkdir(exist_ok=True)
        arrays = {key: files.write_npy(folder / f"{key}.npy", array) for key, array in codec.arrays().items()}
        meta = {**files.read_json(flat.folder / "meta.json"), "codec": spec, "code_size": codec.code_size, "arrays": arrays}
        about = {"cosine_mean": found["cosine"], "cosine_min": found["cosine_min"], "sample": len(exact)}
        files.write_json(folder / "meta.json", {**meta, "fidelity": about})
    column = store.column(name)
    for shard in column.missing_shards:
        exact = np.asarray(flat.shard(shard)).view(np.float32)
        codes = column.codec.encode(exact.reshape(-1, exact.shape[-1])).reshape(*exact.shape[:2], -1)
        write_codes(store.folder, store.manifest, shard, codes, column=name, digest=column.digest)
    return name


def training(args: argparse.Namespace, store: Store, name: str, seed: int, out: Path) -> list[str]:
    """Returns the command that trains a student on a column."""
    options = {
        "images": args.images,
        "store": store.folder,
        "column": name,
        "student": args.student,
        "pixels": args.pixels,
        "epochs": args.epochs,
        "lr": args.lr,
        "warmup_epochs": 1,
        "batch_size": 128,
        "crops_per_image": 4,
        "seed": seed,
        "workers": 1,
        "out": out,
    }
    return [sys.executable, "-m", "fkd_ssl", "train", *(str(part) for k, v in options.items() for part in (f"--{k}", v))]


def scores(args: argparse.Namespace, run: Path) -> npt.NDArray[np.bool_]:
    """Returns which test images a student's features classify correctly: bool [probes, n]; cached in the run folder."""
    path = run / "correct.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    features = resolve.model_of(str(run)).features
    split = extract_split(features, scan(args.images), scan(args.val), pixels=args.pixels, workers=1, progress=False)
    common = {
        "train_features": split.train_features,
        "train_labels": split.train_labels,
        "features": split.features,
        "labels": split.labels,
        "num_classes": len(split.classes),
    }
    correct = np.stack(
        [
            knn.evaluate_features(k=20, **common)["correct"],
            logreg.evaluate(progress=False, **common)["correct"],
        ]
    )
    np.save(path, correct)
    return correct


def student_table(args: argparse.Namespace, store: Store) -> list[dict[str, object]]:
    """Returns the mean scores of each codec's students, and their differences to students of exact targets."""
    names = {spec: "Flat" if spec == "Flat" else write_column(store, spec) for spec in STUDENTS}
    correct = {}
    for seed in range(args.seeds):
        for spec in STUDENTS:
            run = Path(args.out) / "runs" / f"{names[spec]}-seed{seed}"
            if not (run / "results.json").exists():
                run.parent.mkdir(exist_ok=True)
                subprocess.run(training(args, store, names[spec], seed, run), check=True, stdout=sys.stderr)
            correct[spec, seed] = scores(args, run)
    rows = []
    for spec in STUDENTS:
        row: dict[str, object] = {"codec": spec, "seeds": args.seeds}
        for k, probe in enumerate(PROBES):
            here, flat = (np.stack([correct[s, seed][k] for seed in range(args.seeds)]) for s in (spec, "Flat"))
            difference, low, high = stats.paired_bootstrap(here, flat)
            by_seed = (100 * (here.mean(axis=1) - flat.mean(axis=1))).round(2).tolist()
            row[probe] = {
                "mean": round(100 * float(here.mean()), 2),
                "deviation": round(100 * float(here.mean(axis=1).std(ddof=1)), 2) if args.seeds > 1 else None,
                "minus_flat": round(difference, 2),
                "low": round(low, 2),
                "high": round(high, 2),
                "equal": stats.equal(low, high),
                "by_seed": by_seed,
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--val", default=None, help="labelled test images; needed with --seeds")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--student", default="mobilenet_v3_small")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--crops", type=int, default=10)
    parser.add_argument("--grid", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--lr", type=float, default=1e-2, help="learning rate of the students; benchmarks/learning_rate.py chose it"
    )
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--codecs", nargs="+", default=None, help="codecs of the table; many by default")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    if args.seeds and not args.val:
        parser.error("--seeds needs --val")
    teacher = resolve.teacher_of(args.teacher, args.checkpoint, grid=args.grid)
    precompute(
        scan(args.images),
        Path(args.out) / "store",
        teacher,
        crops=args.crops,
        recipe=resolve.recipe_of("mocov2"),
        codec="Flat",
        pixels=args.pixels,
        column="Flat",
        log=lambda line: print(line, file=sys.stderr),
    )
    store = open_store(Path(args.out) / "store")
    if teacher.info.spec.kind == "tokens":
        print(json.dumps(token_table(store, args.codecs or TOKEN_SPECS), indent=1))
        return
    fresh, seen = split(store)
    specs = args.codecs or list(SPECS)
    result: dict[str, object] = {"held_out_targets": fresh.shape[0] * fresh.shape[1], "rabitq": rabitq(fresh, seen)}
    print(json.dumps(result), file=sys.stderr)
    result["codecs"] = codec_table(fresh, seen, specs, Path(args.out) / "table.json")
    if args.seeds:
        result["students"] = student_table(args, store)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
