"""What the label codecs keep of a teacher's class probabilities: bytes per crop, divergence, the most probable class.

    python benchmarks/label_codecs.py --store STORE [--column COLUMN] [--crops 100000]

The column has the codec `full`. Every other codec is applied to its probabilities and compared with them.
"""

import argparse

import numpy as np

from fkd_ssl.arrays import Float32Array
from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.store import open_store
from fkd_ssl.targets.label_codecs import LabelCodec

KEPT = {"smoothing": (3, 5, 10), "renorm": (3, 5), "quantised": (5, 6, 8, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="a store with a column in the codec full")
    parser.add_argument("--column", help="the column, if there are several")
    parser.add_argument("--crops", type=int, default=100_000, help="number of crops to compare, from images of the whole store")
    args = parser.parse_args()
    store = open_store(args.store)
    column = store.column(args.column)
    if column.meta.codec != "full":
        parser.error(f"{column.name} is in {column.meta.codec}, expected full")
    rows = store.rows[:: max(1, len(store.rows) * store.crops_per_image // args.crops)]
    exact = np.concatenate([store.targets(column.name, int(row), slice(None)) for row in rows])[: args.crops]
    print(
        f"{len(exact):,} crops of {column.meta.teacher.name}, {column.meta.target.size} classes; greatest probability "
        f"{exact.max(axis=1).mean():.3f} in the mean\n"
    )
    print(
        "| codec | bytes per crop, with its record | KL divergence, nats | total variation, mean | 90th percentile | maximum | "
        "same best class |\n|---|---|---|---|---|---|---|"
    )
    marginal = [f"marginal_{kind}_k{k}" for kind, kept in KEPT.items() for k in kept if k < column.meta.target.size]
    for spec in ("hard", "smoothing", *marginal, "full"):
        codec = LabelCodec(spec, column.meta.target.size)
        decoded = codec.decode(codec.encode(exact))
        distances = np.abs(decoded - exact).sum(axis=1) / 2
        same = (decoded.argmax(axis=1) == exact.argmax(axis=1)).mean()
        print(
            f"| `{spec}` | {codec.code_size + CROP_DTYPE.itemsize} | {max(0, divergence(exact, decoded)):.3f} | "
            f"{distances.mean():.4f} | {np.quantile(distances, 0.9):.4f} | {distances.max():.4f} | {100 * same:.2f} % |"
        )


def divergence(exact: Float32Array, decoded: Float32Array) -> float:
    """The mean KL divergence of decoded from exact probabilities, in nats; probabilities below 1e-9 count as 1e-9."""
    p, q = (np.maximum(values.astype(np.float64), 1e-9) for values in (exact, decoded))
    return float((p * np.log(p / q)).sum(axis=1).mean())


if __name__ == "__main__":
    main()
