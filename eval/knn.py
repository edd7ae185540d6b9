"""Weighted nearest neighbours: the quickest score of features, with the fewest settings.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018 (arXiv 1805.01978),
section 3.4: the k nearest training images vote for their class with weight exp(similarity / T). The similarity is the
cosine, or with `metric="euclidean"` minus half the squared distance, which gives the same votes on vectors of length 1. With
infinite T each neighbour has one vote.

Legend: `N` training images, `n` images to score, `D` feature dimension, `C` classes, `Q` images in a chunk.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.errors import RequestError
from fkd_ssl.eval import features as features_
from fkd_ssl.eval import search
from fkd_ssl.eval.features import Model
from fkd_ssl.eval.scores import (
    accuracy,
    as_features,
    as_labels,
    compact,
    feature_notes,
    per_class,
    ranks,
    require_two_classes,
    same_dimension,
)
from fkd_ssl.eval.search import Metric
from fkd_ssl.images import ImageSource

K = 20
TEMPERATURE = 0.07
PRESETS: dict[str, tuple[tuple[int, ...], float]] = {
    "dino": ((10, 20, 100, 200), 0.07),  # eval_knn.py of arXiv 2104.14294
    "instdisc": ((200,), 0.07),  # arXiv 1805.01978
    "lightly": ((200,), 0.1),  # lightly.utils.benchmarking, and VISSL's
}
"""Name -> (values of k, temperature)."""

_MAX_EXPONENT = 80.0  # 2000 exp(80) fits in float32
_VOTES = 2**23  # scores in memory at once


def knn_predict(
    train_features: Any,
    train_labels: Any,
    features: Any,
    k: int = K,
    temperature: float = TEMPERATURE,
    *,
    num_classes: int | None = None,
    metric: Metric = "cosine",
    device: torch.device | str = "cpu",
) -> Float32Array:
    """Class scores: the sum of exp(similarity / temperature) over those of the k nearest neighbours that have the class.

    The search is exact. A class that none of the k neighbours has scores 0. For Euclidean distances, and for temperatures below
    0.0125, where exp overflows float32, each row is divided by its largest weight, which does not change the ranking.

    Args:
        train_features: Array or tensor [N, D], not necessarily normalised. A vector of zeros has cosine 0 to all others.
        train_labels: Array or tensor [N] of integers from 0.
        features: Array or tensor [n, D].
        k: Number of neighbours; reduced to N with a warning if larger.
        temperature: T, positive.
        num_classes: C; by default the largest training label plus one.
        metric: `cosine` or `euclidean`.
        device: Where the search runs.

    Returns:
        Scores float32 [n, C]; the prediction is their argmax.

    Raises:
        RequestError: Shapes, labels, k or temperature are invalid.
        FkdError: A feature is not finite.
    """
    check_search([k], [temperature])
    train = as_features(train_features, "train_features")
    labels = as_labels(train_labels, len(train), "train_labels", num_classes=num_classes)
    queries = as_features(features, "features")
    same_dimension(train, queries)
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    scores = np.empty((len(queries), classes), dtype=np.float32)
    for rows, similarity, neighbours in search.nearest(train, queries, _limit(k, len(train)), metric=metric, device=device):
        for part, votes in _votes(similarity, labels[neighbours], temperature, classes, metric):
            scores[rows][part] = votes
    return scores


def evaluate_features(
    *,
    train_features: Any,
    train_labels: Any,
    features: Any = None,
    labels: Any = None,
    num_classes: int | None = None,
    names: Sequence[str] | None = None,
    k: int | Sequence[int] = K,
    temperature: float | Sequence[float] = TEMPERATURE,
    metric: Metric = "cosine",
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Accuracy of `knn_predict` on given features; see `evaluate` for the result.

    All k and temperatures share one search. Memory besides the features is bounded (see `search`), except that Euclidean search
    copies the training features.

    Args:
        train_features: Array or tensor [N, D].
        train_labels: Array or tensor [N]. Without `num_classes` any integers from 0, also with gaps.
        features: Array or tensor [n, D]. None classifies each training image by all others (leave one out).
        labels: Array or tensor [n] of labels that occur in `train_labels`.
        num_classes: C, if the labels are indices into a list of classes.
        names: Class names, for `per_class`.
        k: Number of neighbours, or several.
        temperature: T, or several.
        metric: `cosine` or `euclidean`.
        device: Where the search runs.
    """
    ks, temperatures = _several(k), _several(temperature)
    check_search(ks, temperatures)
    train = as_features(train_features, "train_features")
    known = as_labels(train_labels, len(train), "train_labels", num_classes=num_classes)
    if features is None:
        if len(train) < 2:
            raise RequestError("train_features: has one image; leave-one-out needs at least two")
        queries, wanted = None, known
    else:
        queries = as_features(features, "features")
        same_dimension(train, queries)
        wanted = as_labels(labels, len(queries), "labels", num_classes=num_classes)
    require_two_classes(known, "train_labels")
    if num_classes is None:
        known, wanted, names = compact(known, wanted)
    classes = num_classes or len(names or ())
    available = len(train) - (queries is None)
    used = {asked: _limit(asked, available) for asked in ks}
    rank = {(asked, t): np.empty(len(wanted), dtype=np.int64) for asked in ks for t in temperatures}
    found = search.nearest(train, queries, max(used.values()), metric=metric, device=device)
    for rows, similarity, neighbours in found:
        voters = known[neighbours]
        for (asked, t), out in rank.items():
            for part, votes in _votes(similarity[:, : used[asked]], voters[:, : used[asked]], t, classes, metric):
                truth = wanted[rows][part]
                voted = votes[np.arange(len(votes)), truth] > 0
                # classes without a neighbour are not ranked: their order in the top 5 would be that of the folders
                out[rows][part] = np.where(voted, ranks(votes, truth), classes)
    headline = (K if K in ks else ks[0], TEMPERATURE if TEMPERATURE in temperatures else temperatures[0])
    notes = feature_notes(train, queries)
    notes += [f"k {asked} was reduced to {used[asked]}, the number of training images" for asked in ks if used[asked] < asked]
    if used[headline[0]] < 5:
        notes.append(f"top5 counts at most {used[headline[0]]} classes: k is {used[headline[0]]}")
    if queries is None and (single := int((np.bincount(known) == 1).sum())):
        notes.append(f"{single} of {classes} classes have only one image, which the others cannot classify correctly")
    scored = {key: accuracy(value) for key, value in rank.items()}
    return {
        **scored[headline],
        "k": used[headline[0]],
        "temperature": headline[1],
        "metric": metric,
        "grid": [
            {"k": used[asked], "temperature": t, "top1": scored[asked, t]["top1"], "top5": scored[asked, t]["top5"]}
            for asked, t in rank
        ],
        "n_train": len(train),
        "n_val": len(wanted),
        "classes": classes,
        "feature_dim": train.shape[1],
        **({} if names is None else {"per_class": per_class(rank[headline], wanted, names)}),
        "notes": notes,
    }


def few_shot(
    *, train_labels: Any, shots: float, draws: int = 5, seed: int = 0, train_features: Any, **options: Any
) -> dict[str, Any]:
    """`evaluate_features` with random subsets of the training images: mean and standard deviation over several draws.

    Args:
        train_labels: Array or tensor [N].
        shots: Number of images of each class; below 1 their share, at least one image of each class.
        draws: Number of random draws.
        seed: Seed of the draws.
        train_features: Array or tensor [N, D].
        **options: Options of `evaluate_features`.

    Returns:
        The result of `evaluate_features` for the first draw, with `top1` and `top5` as means over draws; `top1_std` and
        `top5_std`, the standard deviations (0 for one draw); `draws`, the `top1` and `top5` of each; `shots`, `seed`.

    Raises:
        RequestError: As `evaluate_features`; a class has fewer images than `shots`, or `draws` is below 1.
    """
    if draws < 1:
        raise RequestError(f"draws must be at least 1, got {draws}")
    features = as_features(train_features, "train_features")
    labels = as_labels(train_labels, len(features), "train_labels", num_classes=options.get("num_classes"))
    results = []
    for draw in range(draws):
        rows = shot_rows(labels, shots, np.random.default_rng([seed, draw]))
        results.append(evaluate_features(train_features=features[rows], train_labels=labels[rows], **options))
    found: dict[str, Any] = {**results[0], "shots": shots, "seed": seed}
    for key in ("top1", "top5"):
        values = [result[key] for result in results]
        found |= {key: float(np.mean(values)), f"{key}_std": float(np.std(values, ddof=1)) if draws > 1 else 0.0}
    return {**found, "draws": [{"top1": result["top1"], "top5": result["top5"]} for result in results]}


def shot_rows(labels: Int64Array, shots: float, generator: np.random.Generator) -> Int64Array:
    """The rows of a random draw: `shots` of each class (below 1 that share, at least one), in ascending order.

    Raises:
        RequestError: `shots` is neither an integer nor below 1, or a class has fewer images.
    """
    if not (math.isfinite(shots) and shots > 0) or (shots >= 1 and shots != int(shots)):
        raise RequestError(f"shots {shots:g}: expected an integer number of images per class, or a share below 1")
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(shots * len(rows))) if shots < 1 else int(shots)
        if count > len(rows):
            raise RequestError(f"shots {count}: class {label} has {len(rows)} training images")
        chosen.append(generator.permutation(rows)[:count])
    return np.sort(np.concatenate(chosen))


def evaluate(
    *,
    model: Model,
    train: ImageSource,
    val: ImageSource,
    pixels: int,
    k: int | Sequence[int] = K,
    temperature: float | Sequence[float] = TEMPERATURE,
    metric: Metric = "cosine",
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int = 2,
    progress: bool = True,
    skipped: set[str] | None = None,
) -> dict[str, Any]:
    """Accuracy of kNN on `val` with `train` as the neighbours; classes are matched by folder name.

    Args:
        model: uint8 [B, 3, P, P] -> float [B, D].
        train: Images to search in.
        val: Images to score.
        pixels: P, the side of the centre crop.
        k: Number of neighbours, or several.
        temperature: T, or several.
        metric: `cosine` or `euclidean`.
        device: Where the search runs.
        batch_size: Images the model gets at once.
        workers: Processes that decode.
        progress: Show a bar on standard error.
        skipped: Collects the error message of each damaged image, which is left out. By default the first error is raised.

    Returns:
        `top1`, `top5` in percent; `correct` bool [n]; `k`, `temperature`, `metric`, `n_train`, `n_val`, `classes`,
        `feature_dim`, `pixels`; `grid`, the `top1` and `top5` of each k and temperature; `per_class`; `notes`. The headline
        `top1` and `top5` are those of k 20 and T 0.07 if these are included, else of the first k and T, never of the best.
        `top5` ranks only the classes of the k neighbours, so at most k classes.

    Raises:
        RequestError: An image has no class, `train` lacks a class, or k or a temperature is invalid.
        FkdError: An image cannot be read, or a feature is not finite.
    """
    check_search(_several(k), _several(temperature))
    split = features_.extract_split(
        model,
        train,
        val,
        pixels=pixels,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
        skipped=skipped,
    )
    result = evaluate_features(
        **split.common,
        names=split.classes,
        k=k,
        temperature=temperature,
        metric=metric,
        device=device,
    )
    return {**result, "pixels": pixels}


def check_search(ks: Sequence[int], temperatures: Sequence[float]) -> None:
    """Raises RequestError if k or temperatures are missing or invalid."""
    if not ks or not temperatures:
        raise RequestError("at least one k and one temperature are needed")
    for k in ks:
        if k < 1:
            raise RequestError(f"k must be at least 1, got {k}")
    for temperature in temperatures:
        if not temperature > 0:
            raise RequestError(f"temperature must be positive, got {temperature}")


def _several(value: Any) -> list[Any]:
    return list(dict.fromkeys(value)) if isinstance(value, Sequence) else [value]


def _limit(k: int, available: int) -> int:
    if k > available:
        warnings.warn(f"k is {k}, but there are {available} training images; using all of them", stacklevel=4)
    return min(k, available)


def _votes(
    similarity: Float32Array, labels: Int64Array, temperature: float, classes: int, metric: Metric
) -> Iterator[tuple[slice, Float32Array]]:
    """Class scores float32 [rows, C] of queries with neighbours [Q, k], a few rows at a time to bound memory."""
    at_once = max(1, _VOTES // max(classes, similarity.shape[1]))
    for start in range(0, len(similarity), at_once):
        part = slice(start, min(start + at_once, len(similarity)))
        exponent = similarity[part].astype(np.float64) / temperature
        if metric == "euclidean" or 1 / temperature > _MAX_EXPONENT:
            exponent -= exponent.max(axis=1, keepdims=True)
        count = len(exponent)
        cell = np.arange(count)[:, None] * classes + labels[part]
        sums = np.bincount(cell.ravel(), weights=np.exp(exponent).ravel(), minlength=count * classes)
        yield part, sums.reshape(count, classes).astype(np.float32)
