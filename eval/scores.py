"""What the probes share: features and labels as checked arrays, and accuracy from class scores.

Legend: `n` images, `D` feature dimension, `C` classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.errors import FkdError, RequestError

_SAMPLE = 10_000  # features that are looked at
_COLLAPSED = 1e-3  # variance of features of length 1; an untrained network's is above 0.01


def as_features(values: Any, name: str) -> Float32Array:
    """Features as float32 [n, D]; `values` is an array or a tensor on any device, `name` is what messages call it.

    Raises:
        RequestError: Not two-dimensional, or empty.
        FkdError: A value is not finite.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    features = np.asarray(values, dtype=np.float32)
    if features.ndim != 2 or 0 in features.shape:
        raise RequestError(f"{name}: expected [images, dimensions], neither of them 0, got {list(features.shape)}")
    pieces = range(0, len(features), 8192)  # so that no table of booleans as large as a quarter of the features is made
    bad = ~np.concatenate([np.isfinite(features[start : start + 8192]).all(axis=1) for start in pieces])
    if bad.any():
        raise FkdError(f"{name}: {np.sum(bad)} of {len(features)} rows hold NaN or infinity, first row {_first(bad)}")
    return features


def as_labels(values: Any, rows: int, name: str, *, num_classes: int | None = None) -> Int64Array:
    """Labels as int64 [rows], each at least 0 and below `num_classes` where that is given.

    Raises:
        RequestError: Another length or type, an image without a class (-1), or a label that is no class.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    labels = np.asarray(values)
    if labels.dtype.kind not in "iu":
        raise RequestError(f"{name}: expected whole numbers, got {labels.dtype}")
    if labels.shape != (rows,):
        raise RequestError(f"{name}: expected one label for each of {rows} features, got shape {list(labels.shape)}")
    bad = labels < 0
    if bad.any():
        raise RequestError(f"{name}: {np.sum(bad)} of {rows} have no class (label {labels[bad][0]}), first row {_first(bad)}")
    if num_classes is not None and int(labels.max()) >= num_classes:
        raise RequestError(f"{name}: label {labels.max()}, but there are {num_classes} classes, 0 to {num_classes - 1}")
    return labels.astype(np.int64)


def compact(known: Int64Array, wanted: Int64Array) -> tuple[Int64Array, Int64Array, list[str]]:
    """Labels with gaps as indices into the training labels that occur, and these as names.

    Raises:
        RequestError: A label to be told that no training image has.
    """
    present, known = np.unique(known, return_inverse=True)
    place = np.minimum(np.searchsorted(present, wanted), len(present) - 1)
    foreign = np.unique(wanted[present[place] != wanted])
    if len(foreign):
        raise RequestError(
            f"labels: label {foreign[0]}, but there are {len(present)} classes in the training labels and this is none of them"
        )
    return known.astype(np.int64), place.astype(np.int64), [str(label) for label in present]


def require_two_classes(labels: Int64Array, name: str) -> None:
    """Raises RequestError where all labels are the same: every score would be 100 %."""
    if (labels == labels[0]).all():
        raise RequestError(f"{name}: one class only; a score needs two or more classes to tell apart")


def feature_notes(train: Float32Array, features: Float32Array | None) -> list[str]:
    """What is suspicious about features [N, D] and those that are scored [n, D], if any; each a line for the user."""
    notes = []
    sample = train[:: max(1, len(train) // _SAMPLE)]
    length = np.linalg.norm(sample, axis=1, keepdims=True)
    centre = (sample / np.where(length > 0, length, 1)).mean(axis=0, dtype=np.float64)
    if len(train) > 1 and 1 - centre @ centre < _COLLAPSED:
        notes.append("the features are nearly constant (collapsed): the model hardly tells images apart")
    if features is not None and train.shape == features.shape and np.array_equal(train, features):
        notes.append("the features to score are the training features: every image finds itself; use other images")
    return notes


def same_dimension(train: Float32Array, features: Float32Array) -> None:
    """Raises RequestError where the features to score are not of the training features' dimension."""
    if train.shape[1] != features.shape[1]:
        raise RequestError(f"features have {features.shape[1]} dimensions, the training features {train.shape[1]}")


def ranks(scores: npt.NDArray[np.floating[Any]], labels: Int64Array) -> Int64Array:
    """How many classes are ranked ahead of the true one: 0 is a top-1 hit; int64 [n] from scores [n, C].

    Of equal scores the class with the lower index is ahead, so that a result does not depend on a sort's whim.

    Raises:
        FkdError: A score is NaN, which would be ahead of none.
    """
    if np.isnan(scores).any():
        raise FkdError("scores are NaN: the probe diverged")
    own = scores[np.arange(len(labels)), labels][:, None]
    before = np.arange(scores.shape[1]) < labels[:, None]
    ahead: Int64Array = ((scores > own) | ((scores == own) & before)).sum(axis=1, dtype=np.int64)
    return ahead


def as_probe(
    train_features: Any, train_labels: Any, features: Any, labels: Any, num_classes: int | None
) -> tuple[Float32Array, Int64Array, Float32Array, Int64Array, int]:
    """What a probe on features is given, checked: training features and labels, those to score, and C.

    Raises:
        RequestError: Shapes or labels that cannot be right, or one class only.
        FkdError: Features that are not finite.
    """
    train, wanted = as_features(train_features, "train_features"), as_features(features, "features")
    same_dimension(train, wanted)
    known = as_labels(train_labels, len(train), "train_labels", num_classes=num_classes)
    require_two_classes(known, "train_labels")
    classes = int(known.max()) + 1 if num_classes is None else num_classes
    return train, known, wanted, as_labels(labels, len(wanted), "labels", num_classes=classes), classes


def accuracy(rank: Int64Array) -> dict[str, Any]:
    """`top1` and `top5` in percent, and `correct` bool [n] (top-1, for paired bootstraps), from `ranks`."""
    return {
        "top1": 100.0 * float((rank < 1).mean()),
        "top5": 100.0 * float((rank < 5).mean()),
        "correct": rank < 1,
    }


def per_class(rank: Int64Array, labels: Int64Array, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each class that has images: how many, and the top-1 of them in percent."""
    counts = np.bincount(labels, minlength=len(names))
    hits = np.bincount(labels, weights=rank < 1, minlength=len(names))
    return {name: {"n": int(n), "top1": 100.0 * float(hit / n)} for name, n, hit in zip(names, counts, hits, strict=True) if n}


def few_classes(num_classes: int) -> list[str]:
    """The note that a linear probe's top5 needs where there are at most five classes to rank."""
    return [f"top5 is 100 by definition: there are {num_classes} classes"] if num_classes <= 5 else []


def _first(bad: Any) -> int:
    return int(np.argmax(bad))
