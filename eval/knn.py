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

_MAX_EXPONENT = 80.0  # the sum of 2000 times its exp is a float32
_VOTES = 2**23  # scores in memory


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

    The search is exact. A class without a neighbour among the k scores 0. If the temperature is below about 0.0125, where exp
    overflows float32, and for Euclidean distances, each row is divided by its largest weight: the ranking stays the same.

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
    for rows, similarity, neighbours in search.nearest(train, queries, _cut(k, len(train)), metric=metric, device=device):
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

    All k and temperatures take one search. Memory besides the features is bounded, see `search.nearest`; Euclidean search takes
    one more copy of the training features.

    Args:
        train_features: Array or tensor [N, D].
        train_labels: Array or tensor [N]. Without `num_classes` any integers from 0, also with gaps.
        features: Array or tensor [n, D]; None classifies each training image by all others (leave one out).
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
    most = len(train) - (queries is None)
    used = {asked: _cut(asked, most) for asked in ks}
    rank = {(one, t): np.empty(len(wanted), dtype=np.int64) for one in ks for t in temperatures}
    found = search.nearest(train, queries, max(used.values()), metric=metric, device=device)
    for rows, similarity, neighbours in found:
        of = known[neighbours]
        for (one, t), out in rank.items():
            for part, votes in _votes(similarity[:, : used[one]], of[:, : used[one]], t, classes, metric):
                truth = wanted[rows][part]
                voted = votes[np.arange(len(votes)), truth] > 0
                # a class without a neighbour is not ranked, or the order of the folders would decide the rest of the top 5
                out[rows][part] = np.where(voted, ranks(votes, truth), classes)
    headline = (K if K in ks else ks[0], TEMPERATURE if TEMPERATURE in temperatures else temperatures[0])
    notes = feature_notes(train, queries)
    notes += [f"k {one} was reduced to {used[one]}, the number of training images" for one in ks if used[one] < one]
    if used[headline[0]] < 5:
        notes.append(f"top5 counts at most {used[headline[0]]} classes: k is {used[headline[0]]}")
    if queries is None and (alone := int((np.bincount(known) == 1).sum())):
        notes.append(f"{alone} of {classes} classes have one image only, which cannot be classified by the others")
    scored = {key: accuracy(value) for key, value in rank.items()}
    return {
        **scored[headline],
        "k": used[headline[0]],
        "temperature": headline[1],
        "metric": metric,
        "grid": [
            {"k": used[one], "temperature": t, "top1": scored[one, t]["top1"], "top5": scored[one, t]["top5"]}
            for one, t in rank
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
        train: The neighbours.
        val: The images that are scored.
        pixels: P, the side of the evaluation crop.
        k: Neighbours that vote, or several such numbers.
        temperature: T, or several.
        metric: `cosine` or `euclidean`.
        device: Where the search runs.
        batch_size: Images the model gets at once.
        workers: Processes that decode.
        progress: Show a bar on standard error.
        skipped: Takes the error message of each damaged image, which is then left out. By default the first
            one is raised. `n_train` and `n_val` count the others.

    Returns:
        `top1`, `top5` in percent; `correct` bool [n]; `k`, `temperature`, `metric`, `n_train`, `n_val`, `classes`,
        `feature_dim`, `pixels`; `grid`, the `top1` and `top5` of every k and temperature; `per_class`; `notes`. The headline
        `top1` and `top5` are those of k 20 and T 0.07 if these are among them, else of the first; never of the best. `top5`
        ranks only classes of the k neighbours, so with k < 5 it ranks at most k classes, and `notes` says so.

    Raises:
        RequestError: An image without a class, or a class that `train` lacks, or a wrong k or temperature.
        FkdError: Images or features that cannot be used.
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


def _cut(k: int, most: int) -> int:
    if k > most:
        warnings.warn(f"k is {k}, but there are {most} training images; using all of them", stacklevel=4)
    return min(k, most)


def _votes(
    similarity: Float32Array, labels: Int64Array, temperature: float, classes: int, metric: Metric
) -> Iterator[tuple[slice, Float32Array]]:
    """Class scores float32 [rows, C] from neighbours [Q, k], in parts of bounded size."""
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
