"""Exact kNN compared with lightly's and scikit-learn's on random features: seconds and peak memory, all in one run.

    python benchmarks/knn.py --sizes 7000x2500 200000x10000 --dim 512

Every method runs in a process of its own that loads the same features, so that its peak memory is its own. Memory is what
the process takes in addition to the features. lightly's is the arithmetic of KNNClassifier in batches of 256, as in its
benchmarks. `faiss` is IndexFlatIP on normalised features, which an earlier kNN here used, and `faiss_sse3` the same on a
processor that the OpenBLAS of its wheel does not know. Each query's correctness is compared with ours. `--imagenet`
extrapolates to 1.28 M x 50 k x 2048: the cost of the product grows with its size, which is measured at two sizes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

K, T, CLASSES = 20, 0.1, 100

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def ours(train: Array, labels: Labels, queries: Array) -> Labels:
    from fkd_ssl.eval import knn

    return knn.knn_predict(train, labels, queries, K, T, num_classes=CLASSES).argmax(axis=1)


def lightly(train: Array, labels: Labels, queries: Array) -> Labels:
    import torch
    from lightly.utils.benchmarking import knn_predict
    from torch.nn.functional import normalize

    bank, known = normalize(torch.from_numpy(train)).t().contiguous(), torch.from_numpy(labels)
    found = [
        knn_predict(normalize(torch.from_numpy(queries[i : i + 256])), bank, known, CLASSES, K, T)[:, 0]
        for i in range(0, len(queries), 256)
    ]
    return torch.cat(found).numpy()


def sklearn(train: Array, labels: Labels, queries: Array) -> Labels:
    from sklearn.neighbors import KNeighborsClassifier

    vote = KNeighborsClassifier(K, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / T))
    found: Labels = vote.fit(train, labels).predict(queries)
    return found


def faiss(train: Array, labels: Labels, queries: Array) -> Labels:
    import faiss as library

    unit = train / np.linalg.norm(train, axis=1, keepdims=True)
    index = library.IndexFlatIP(train.shape[1])
    index.add(unit)
    similarity, rows = index.search(queries / np.linalg.norm(queries, axis=1, keepdims=True), K)
    scores = np.zeros((len(queries), CLASSES))
    np.add.at(scores, (np.arange(len(queries))[:, None], labels[rows]), np.exp(similarity / T))
    return scores.argmax(axis=1)


CONTENDERS: dict[str, Callable[[Array, Labels, Array], Labels]] = {
    "ours": ours,
    "lightly": lightly,
    "sklearn": sklearn,
    "faiss": faiss,
    "faiss_sse3": faiss,
}
ENVIRONMENT = {"faiss_sse3": {"OPENBLAS_CORETYPE": "Prescott"}}


def one(name: str, folder: Path, k: int) -> None:
    """Runs one method in this process: prints seconds and bytes, writes its predictions."""
    global K
    K = k
    train, labels, queries = (np.load(folder / f"{part}.npy", allow_pickle=False) for part in ("train", "labels", "queries"))
    CONTENDERS[name](train[:500], labels[:500], queries[:50])  # imports, threads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    predicted = CONTENDERS[name](train, labels, queries)
    seconds = time.perf_counter() - started
    np.save(folder / f"{name}.npy", predicted)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # Linux counts in KiB
    print(json.dumps({"seconds": seconds, "bytes": peak}))


def measure(n: int, queries: int, dim: int, names: list[str], repeats: int, k: int) -> dict[str, dict[str, float]]:
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        np.save(folder / "train.npy", generator.standard_normal((n, dim), dtype=np.float32))
        np.save(folder / "queries.npy", generator.standard_normal((queries, dim), dtype=np.float32))
        np.save(folder / "labels.npy", generator.integers(0, CLASSES, n))
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(repeats):  # in alternation, so that a disturbance affects all
            for name in names:
                command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--k", str(k)]
                environment = {**os.environ, **ENVIRONMENT.get(name, {})}
                said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
                runs[name].append(json.loads(said))
        reference = np.load(folder / "ours.npy", allow_pickle=False)
        rows = {}
        for name in names:
            same = int((np.load(folder / f"{name}.npy", allow_pickle=False) == reference).sum())
            best = {key: min(run[key] for run in runs[name]) for key in ("seconds", "bytes")}
            rows[name] = {**best, "same": same}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["7000x2500", "200000x10000"], help="training images x queries")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=K)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--repeats", type=int, default=3, help="number of runs; the fastest is printed")
    parser.add_argument("--imagenet", action="store_true", help="extrapolate ours to 1.28 M x 50 k, 2048-d")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.folder, args.k)
        return
    names = list(dict.fromkeys(["ours", *args.contenders]))
    print("| size | contender | seconds | of ours | MB beyond the features | of ours | same answers |")
    print("|---|---|---|---|---|---|---|")
    for size in args.sizes:
        n, queries = map(int, size.split("x"))
        rows = measure(n, queries, args.dim, names, args.repeats, args.k)
        for name, row in rows.items():
            ratios = [f"{row[key] / max(rows['ours'][key], 1e-9):.2f}" for key in ("seconds", "bytes")]
            print(
                f"| {size} x {args.dim} | {name} | {row['seconds']:.2f} | {ratios[0]} | {row['bytes'] / 1e6:.0f} | "
                f"{ratios[1]} | {int(row['same'])} of {queries} |",
                flush=True,
            )
    if args.imagenet:
        small, large = (measure(n, 2000, 2048, ["ours"], args.repeats, args.k)["ours"]["seconds"] for n in (50_000, 100_000))
        slope = (large - small) / (50_000 * 2000)
        hours = (slope * 1_281_167 * 50_000) / 3600
        print(f"\n50,000 and 100,000 x 2,000 x 2048: {small:.1f} s, {large:.1f} s; ImageNet by their difference: {hours:.2f} h")


if __name__ == "__main__":
    main()
