"""Weighted nearest neighbours on cosine similarity: the quickest look at features without labels.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018 (arXiv 1805.01978),
section 3.4: the k nearest training images vote for their class with weight exp(similarity / T).

Legend: `N` training images, `n` images to score, `D` feature dimension, `C` classes, `Q` images in a chunk.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from fkd_ssl.errors import RequestError
from fkd_ssl.eval import features as features_
from fkd_ssl.eval.features import Model
from fkd_ssl.eval.scores import Float32Array, Int64Array, accuracy, as_features, as_labels, ranks, same_dimension
from fkd_ssl.images import ImageSet

K = 20
TEMPERATURE = 0.07
PRESETS: dict[str, tuple[tuple[int, ...], float]] = {
    "dino": ((10, 20, 100, 200), 0.07),  # eval_knn.py of arXiv 2104.14294
    "instdisc": ((200,), 0.07),  # arXiv 1805.01978
    "lightly": ((200,), 0.1),  # lightly.utils.benchmarking, and VISSL's
}
"""Name -> (every k that is reported, temperature)."""

_CHUNK_BYTES = 2**27  # of scores and neighbours at once
_LARGEST_EXPONENT = 80.0  # exp of it is a float32 with room for a sum of 2000


def knn_predict(
    train_features: Any,
    train_labels: Any,
    features: Any,
    k: int = K,
    temperature: float = TEMPERATURE,
    *,
    num_classes: int | None = None,
) -> Float32Array:
    """Class scores of features: the sum of exp(cosine / temperature) over those of the k nearest that are of the class.

    The search is exact. A class that none of the k neighbours belongs to scores 0. Below a temperature of about 0.0125,
    where exp would leave float32, each row is divided by its largest weight, which changes no ranking.

    Args:
        train_features: Array or tensor [N, D]; normalised here. A vector of zeros has cosine 0 to everything.
        train_labels: Array or tensor [N] of whole numbers from 0.
        features: Array or tensor [n, D].
        k: Neighbours; more than N are cut to N with a warning.
        temperature: T, above 0.
        num_classes: C; by default the largest training label plus one.

    Returns:
        Scores float32 [n, C]; the prediction is their argmax.

    Raises:
        RequestError: Shapes, labels, k or temperature that cannot be right.
        FkdError: Features that are not finite.
    """
    train, labels, queries, k, classes = _check(train_features, train_labels, features, k, temperature, num_classes)
    scores = np.empty((len(queries), classes), dtype=np.float32)
    for rows, chunk in _scores(train, labels, queries, k, temperature, classes):
        scores[rows] = chunk
    return scores


def evaluate_features(
    *,
    train_features: Any,
    train_labels: Any,
    features: Any,
    labels: Any,
    num_classes: int | None = None,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> dict[str, Any]:
    """Accuracy of `knn_predict` on features that are already there; see `evaluate` for what is returned.

    Memory beside the features is one normalised copy of the training features and a chunk of scores.
    """
    asked = k
    train, known, queries, k, classes = _check(train_features, train_labels, features, k, temperature, num_classes)
    wanted = as_labels(labels, len(queries), "labels", num_classes=classes)
    rank = np.empty(len(queries), dtype=np.int64)
    for rows, chunk in _scores(train, known, queries, k, temperature, classes):
        voted = chunk[np.arange(len(chunk)), wanted[rows]] > 0
        # a class without a neighbour is not ranked: else the order of the folders would decide who fills the top 5
        rank[rows] = np.where(voted, ranks(chunk, wanted[rows]), classes)
    notes = []
    if k < asked:
        notes.append(f"k {asked} was cut to the {k} training images")
    if k < 5:
        notes.append(f"top5 counts at most {k} classes: k is {k}")
    return {
        **accuracy(rank),
        "k": k,
        "temperature": temperature,
        "n_train": len(train),
        "n_val": len(queries),
        "classes": classes,
        "feature_dim": train.shape[1],
        "notes": notes,
    }


def evaluate(
    *,
    model: Model,
    train: ImageSet,
    val: ImageSet,
    pixels: int,
    k: int = K,
    temperature: float = TEMPERATURE,
    batch_size: int = 256,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Accuracy of kNN on `val` with `train` as the neighbours; classes are matched by folder name.

    For several k, `features.extract_split` once and `evaluate_features` for each.

    Args:
        model: uint8 [B, 3, P, P] -> float [B, D].
        train: The neighbours.
        val: The images that are scored.
        pixels: P, the side of the evaluation crop.
        k: Neighbours that vote.
        temperature: T.
        batch_size: Images the model gets at once.
        workers: Processes that decode.
        progress: Show a bar on standard error.

    Returns:
        `top1`, `top5` in percent; `correct` bool [n]; `k`, `temperature`, `n_train`, `n_val`, `classes`, `feature_dim`,
        `pixels`; `notes`, what a reader of the figures must know. `top5` counts an image whose class is among the five
        best of those that any neighbour belongs to; with k < 5 these are at most k, and `notes` says so.

    Raises:
        RequestError: An image without a class, or a class that `train` lacks, or a wrong k or temperature.
        FkdError: Images or features that cannot be used.
    """
    _check_search(k, temperature)
    split = features_.extract_split(model, train, val, pixels=pixels, batch_size=batch_size, workers=workers, progress=progress)
    result = evaluate_features(
        train_features=split.train_features,
        train_labels=split.train_labels,
        features=split.features,
        labels=split.labels,
        num_classes=len(split.classes),
        k=k,
        temperature=temperature,
    )
    return {**result, "pixels": pixels}


def _check(
    train_features: Any, train_labels: Any, features: Any, k: int, temperature: float, num_classes: int | None
) -> tuple[Float32Array, Int64Array, Float32Array, int, int]:
    _check_search(k, temperature)
    train = as_features(train_features, "train_features")
    labels = as_labels(train_labels, len(train), "train_labels", num_classes=num_classes)
    queries = as_features(features, "features")
    same_dimension(train, queries)
    if k > len(train):
        warnings.warn(f"k is {k}, but there are {len(train)} training images: all of them vote", stacklevel=3)
        k = len(train)
    return train, labels, queries, k, int(labels.max()) + 1 if num_classes is None else num_classes


def _check_search(k: int, temperature: float) -> None:
    if k < 1:
        raise RequestError(f"k must be at least 1, got {k}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise RequestError(f"temperature must be above 0, got {temperature}")


def _scores(
    train: Float32Array, labels: Int64Array, queries: Float32Array, k: int, temperature: float, classes: int
) -> Iterator[tuple[slice, Float32Array]]:
    """Scores of `knn_predict` in chunks float32 [Q, C], each with the rows that it covers."""
    import faiss

    index = faiss.IndexFlatIP(train.shape[1])
    for start in range(0, len(train), 65536):  # in pieces: one normalised copy, not two
        index.add(_normalised(train[start : start + 65536]))
    size = max(1, min(4096, _CHUNK_BYTES // (16 * max(classes, k))))
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        similarity, neighbours = index.search(_normalised(queries[rows]), k)
        exponent = similarity.astype(np.float64) / temperature
        if 1 / temperature > _LARGEST_EXPONENT:
            exponent -= exponent.max(axis=1, keepdims=True)
        count = len(similarity)
        cell = np.arange(count)[:, None] * classes + labels[neighbours]
        sums = np.bincount(cell.ravel(), weights=np.exp(exponent).ravel(), minlength=count * classes)
        yield rows, sums.reshape(count, classes).astype(np.float32)


def _normalised(features: Float32Array) -> Float32Array:
    # float64: the squares of large float32 values overflow
    norm = np.sqrt(np.square(features, dtype=np.float64).sum(axis=1, keepdims=True))
    unit: Float32Array = (features / np.where(norm > 0, norm, 1.0)).astype(np.float32)
    return unit
