"""What FKD's label codecs keep of a teacher's class probabilities: bytes per crop, total variation, the most probable class.

    python benchmarks/label_codecs.py --store STORE [--column COLUMN] [--crops 100000]

The column has the codec `full`. Every other codec is applied to its probabilities and compared with them.
"""

import argparse

import numpy as np

from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.store import open_store
from fkd_ssl.targets.label_codecs import LabelCodec

KEPT = (3, 5, 10)


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
        "| codec | bytes per crop, with its record | total variation, mean | maximum | same best class |\n|---|---|---|---|---|"
    )
    marginal = [f"marginal_{kind}_k{k}" for kind in ("smoothing", "renorm") for k in KEPT if k < column.meta.target.size]
    for spec in ("hard", "smoothing", *marginal, "full"):
        codec = LabelCodec(spec, column.meta.target.size)
        decoded = codec.decode(codec.encode(exact))
        distances = np.abs(decoded - exact).sum(axis=1) / 2
        same = (decoded.argmax(axis=1) == exact.argmax(axis=1)).mean()
        print(
            f"| `{spec}` | {codec.code_size + CROP_DTYPE.itemsize} | {distances.mean():.4f} | {distances.max():.4f} | "
            f"{100 * same:.2f} % |"
        )


if __name__ == "__main__":
    main()
