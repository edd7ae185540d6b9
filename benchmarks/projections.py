"""Cost of a projection before the codec: raw targets, and targets after RR and PCA, all in SQ8.

    python benchmarks/projections.py --train DIR --val DIR --teacher mocov2 --checkpoint FILE --pixels 64 --limit 3000

The targets are the teacher's L2-normalised backbone features of centre crops (the head's 128 dimensions need no projection).
Each codec is trained on the training features. Printed are the bytes per code, the cosine of decoded to exact features, how
many of a test image's 20 nearest training images stay the same, and kNN-20 (T = 0.07) with both sides decoded.
"""

import argparse
import json

import numpy as np
import torch

from fkd_ssl.commands import resolve
from fkd_ssl.eval import knn
from fkd_ssl.eval.features import extract, match_classes
from fkd_ssl.images import scan
from fkd_ssl.store.manifest import limit_images
from fkd_ssl.targets.faiss_codecs import FaissCodec

K = 20


def neighbours(train: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Returns the indices [n, K] of the nearest by cosine, exact."""
    scores = torch.from_numpy(queries) @ torch.from_numpy(train).T
    return scores.topk(K, dim=1).indices.numpy()


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the percentage of neighbours that two lists have in common."""
    return 100 * float(np.mean([len(set(x) & set(y)) / K for x, y in zip(a.tolist(), b.tolist(), strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--limit", type=int, default=3000, help="number of training images; a third as many of val")
    args = parser.parse_args()
    train, val = limit_images(scan(args.train), args.limit), limit_images(scan(args.val), args.limit // 3)
    labels = match_classes(train, val)
    model = resolve.teacher_of(args.teacher, args.checkpoint).features
    features = []
    for images in (train, val):
        raw, _ = extract(model, images, pixels=args.pixels)
        features.append(raw / np.linalg.norm(raw, axis=1, keepdims=True))
    nearest = neighbours(*features)
    dim = features[0].shape[1]
    specs = ["Flat", "SQ8"] + [f"{kind}{size},SQ8" for kind in ("RR", "PCA") for size in (256, 128) if size < dim]
    for spec in specs:
        codec = FaissCodec.train(spec, features[0])
        decoded = [codec.decode(codec.encode(part)) for part in features]
        cosine = (decoded[1] * features[1]).sum(axis=1) / np.linalg.norm(decoded[1], axis=1)
        score = knn.evaluate_features(
            train_features=decoded[0],
            train_labels=train.labels,
            features=decoded[1],
            labels=labels,
            k=K,
            num_classes=len(train.classes),
        )
        figures = {
            "codec": spec,
            "dim": dim,
            "bytes": codec.code_size,
            "cosine_mean": round(float(cosine.mean()), 4),
            "cosine_min": round(float(cosine.min()), 4),
            "same_neighbours_percent": round(overlap(nearest, neighbours(*decoded)), 1),
            "knn_top1": round(float(score["top1"]), 2),
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
