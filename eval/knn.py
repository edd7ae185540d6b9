"""Weighted nearest neighbours: the quickest look at features, and the one with fewest settings.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018 (arXiv 1805.01978),
section 3.4: the k nearest training images vote for their class with weight exp(similarity / T). The similarity is the
cosine; of `metric="euclidean"` it is minus half the squared distance, which on vectors of length 1 gives the same votes.
With T infinite every neighbour has one vote.

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
"""Name -> (every k that is reported, temperature)."""

_LARGEST_EXPONENT = 80.0  # exp of it is a float32 with room for a sum of 2000
_VOTES = 2**23  # scores at once


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
    """Class scores of features: the sum of exp(similarity / temperature) over those of the k nearest that are of the class.

    The search is exact. A class that none of the k neighbours belongs to scores 0. Below a temperature of about 0.0125,
    where exp would leave float32, and for Euclidean distances, each row is divided by its largest weight, which changes
    no ranking.

    Args:
        train_features: Array or tensor [N, D], of any length. A vector of zeros has cosine 0 to everything.
        train_labels: Array or tensor [N] of whole numbers from 0.
        features: Array or tensor [n, D].
        k: Neighbours; more than N are cut to N with a warning.
        temperature: T, above 0.
        num_classes: C; by default the largest training label plus one.
        metric: `cosine` or `euclidean`.
        device: Where the search runs.

    Returns:
        Scores float32 [n, C]; the prediction is their argmax.

    Raises:
        RequestError: Shapes, labels, k or temperature that cannot be right.
        FkdError: Features that are not finite.
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
    """Accuracy of `knn_predict` on features that are already there; see `evaluate` for what is returned.

    All k and all temperatures are scored after one search. Memory beside the features is bounded, see `search.nearest`;
    Euclidean search takes one more copy of the training features.

    Args:
        train_features: Array or tensor [N, D].
        train_labels: Array or tensor [N]. Without `num_classes` any whole numbers from 0, with gaps.
        features: Array or tensor [n, D]; None scores the training images, each by all others (leave one out).
        labels: Array or tensor [n], each of them a label that some training image has.
        num_classes: C, where the labels are indices into a list of classes.
        names: Of the classes, for `per_class`.
        k: Neighbours that vote, or several such numbers.
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
            raise RequestError("train_features: one image; leaving one out needs at least two")
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
                # a class without a neighbour is not ranked: else the order of the folders would decide who fills the top 5
                out[rows][part] = np.where(voted, ranks(votes, truth), classes)
    headline = (K if K in ks else ks[0], TEMPERATURE if TEMPERATURE in temperatures else temperatures[0])
    notes = feature_notes(train, queries)
    notes += [f"k {one} was cut to the {used[one]} training images" for one in ks if used[one] < one]
    if used[headline[0]] < 5:
        notes.append(f"top5 counts at most {used[headline[0]]} classes: k is {used[headline[0]]}")
    if queries is None and (alone := int((np.bincount(known) == 1).sum())):
        notes.append(f"{alone} of {classes} classes have one image, which leaving it out makes impossible to tell")
    scored = {key: accuracy(value) for key, value in rank.items()}
    return {
        **scored[headline],
        "k": used[headline[0]],
        "temperature": headline[1],
        "metric": metric,
        "sweep": [
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
    """`evaluate_features` with a part of the training images, drawn several times: mean and deviation.

    Args:
        train_labels: Array or tensor [N].
        shots: From 1 a whole number of images a class; below 1 the part of each class, at least one image of it.
        draws: Times that the part is drawn.
        seed: Of the draws.
        train_features: Array or tensor [N, D].
        **options: Of `evaluate_features`.

    Returns:
        What `evaluate_features` says of the first draw, but `top1` and `top5` are means over draws; `top1_std` and
        `top5_std`, the standard deviations (0 for one draw); `draws`, each one's `top1`, `top5`; `shots`, `seed`. `correct`
        is that of the first draw.

    Raises:
        RequestError: As `evaluate_features`; a class has fewer images than `shots`, or draws below 1.
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
    """The rows of a draw: `shots` of each class (below 1 that part of it, at least one), in the set's order.

    Raises:
        RequestError: shots is neither a whole number nor a part, or a class has fewer images.
    """
    if not (math.isfinite(shots) and shots > 0) or (shots >= 1 and shots != int(shots)):
        raise RequestError(f"shots {shots:g}: expected a part of each class below 1, or a whole number of images")
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
        `feature_dim`, `pixels`; `sweep`, `top1` and `top5` of every k and temperature, of which those at the top are of k
        20 and T 0.07 if these are among them, else of the first: never of the best; `per_class`, top-1 of each;
        `notes`, what a reader of the figures must know. `top5` counts an image whose class is among the five best of those
        that any neighbour belongs to; with k < 5 these are at most k, and `notes` says so.

    Raises:
        RequestError: An image without a class, or a class that `train` lacks, or a wrong k or temperature.
        FkdError: Images or features that cannot be used.
    """
    check_search(_several(k), _several(temperature))
    split = features_.extract_split(
        model, train, val, pixels=pixels, batch_size=batch_size, workers=workers, progress=progress,
        skipped=skipped,
    )  # fmt: skip
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
    """Raises RequestError where there is none of either, or one that cannot be."""
    if not ks or not temperatures:
        raise RequestError("no k or no temperature to score with")
    for k in ks:
        if k < 1:
            raise RequestError(f"k must be at least 1, got {k}")
    for temperature in temperatures:
        if not temperature > 0:
            raise RequestError(f"temperature must be above 0, got {temperature}")


def _several(value: Any) -> list[Any]:
    return list(dict.fromkeys(value)) if isinstance(value, Sequence) else [value]


def _cut(k: int, most: int) -> int:
    if k > most:
        warnings.warn(f"k is {k}, but there are {most} training images: all of them vote", stacklevel=4)
    return min(k, most)


def _votes(
    similarity: Float32Array, labels: Int64Array, temperature: float, classes: int, metric: Metric
) -> Iterator[tuple[slice, Float32Array]]:
    """Class scores float32 [rows, C] of neighbours [Q, k], in parts of bounded size."""
    at_once = max(1, _VOTES // max(classes, similarity.shape[1]))
    for start in range(0, len(similarity), at_once):
        part = slice(start, min(start + at_once, len(similarity)))
        exponent = similarity[part].astype(np.float64) / temperature
        if metric == "euclidean" or 1 / temperature > _LARGEST_EXPONENT:
            exponent -= exponent.max(axis=1, keepdims=True)
        count = len(exponent)
        cell = np.arange(count)[:, None] * classes + labels[part]
        sums = np.bincount(cell.ravel(), weights=np.exp(exponent).ravel(), minlength=count * classes)
        yield part, sums.reshape(count, classes).astype(np.float32)
