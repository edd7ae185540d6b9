"""Functions shared by the probes: checks of features and labels, and accuracy from class scores.

Legend: `n` images, `N` training images, `D` feature dimension, `C` classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fkd_ssl.arrays import BoolArray, Float32Array, Int64Array
from fkd_ssl.errors import FkdError, RequestError

COLLAPSED = "the features are nearly constant (collapsed): the model hardly tells images apart"
"""The note of `feature_notes` about collapsed features."""
_SAMPLE = 10_000  # training features that `feature_notes` reads
_MIN_VARIANCE = 1e-3  # variance of features of length 1; an untrained network's is above 0.01


def numpy_of(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Returns a tensor on any device as an array; bfloat16, which NumPy does not have, as float32."""
    tensor = tensor.detach().cpu()
    found: npt.NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def as_features(values: Any, name: str) -> Float32Array:
    """Features as float32 [n, D].

    Args:
        values: Array, or tensor on any device.
        name: Name of the features in error messages.

    Raises:
        RequestError: They are not real numbers, not two-dimensional, or empty.
        FkdError: A value is not finite.
    """
    values = numpy_of(values) if isinstance(values, torch.Tensor) else np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise RequestError(f"{name}: expected real numbers, got {values.dtype}")
    features: Float32Array = values.astype(np.float32, copy=False)
    if features.ndim != 2 or 0 in features.shape:
        raise RequestError(f"{name}: expected a non-empty array [images, dimensions], got {list(features.shape)}")
    pieces = range(0, len(features), 8192)  # a mask of all values would take a quarter of their memory
    bad = ~np.concatenate([np.isfinite(features[start : start + 8192]).all(axis=1) for start in pieces])
    if bad.any():
        raise FkdError(f"{name}: {np.sum(bad)} of {len(features)} rows have NaN or infinity, first row {_first(bad)}")
    return features


def as_labels(values: Any, rows: int, name: str, *, num_classes: int | None = None) -> Int64Array:
    """Labels as int64 [rows], each at least 0 and, if `num_classes` is given, below it.

    Raises:
        RequestError: The length or type is wrong, an image has no class (-1), or a label is too large.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    labels = np.asarray(values)
    if labels.dtype.kind not in "iu":
        raise RequestError(f"{name}: expected integers, got {labels.dtype}")
    if labels.shape != (rows,):
        raise RequestError(f"{name}: expected one label for each of {rows} features, got shape {list(labels.shape)}")
    bad = labels < 0
    if bad.any():
        raise RequestError(f"{name}: {np.sum(bad)} of {rows} have no class (label {labels[bad][0]}), first row {_first(bad)}")
    if num_classes is not None and int(labels.max()) >= num_classes:
        raise RequestError(f"{name}: label {labels.max()}, but there are {num_classes} classes, 0 to {num_classes - 1}")
    return labels.astype(np.int64)


def compact(known: Int64Array, wanted: Int64Array) -> tuple[Int64Array, Int64Array, list[str]]:
    """Replaces labels by their index among the training labels that occur; returns both arrays, and these labels as names.

    Raises:
        RequestError: A label to predict is not a training label.
    """
    present, known = np.unique(known, return_inverse=True)
    place = np.minimum(np.searchsorted(present, wanted), len(present) - 1)
    unknown = np.unique(wanted[present[place] != wanted])
    if len(unknown):
        raise RequestError(f"labels: label {unknown[0]} is not one of the {len(present)} classes in the training labels")
    return known.astype(np.int64), place.astype(np.int64), [str(label) for label in present]


def require_two_classes(labels: Int64Array, name: str) -> None:
    """Raises RequestError if all labels are the same: every score would be 100 %."""
    if (labels == labels[0]).all():
        raise RequestError(f"{name}: one class only; a score needs at least two")


def feature_notes(train: Float32Array, features: Float32Array | None) -> list[str]:
    """Warnings about training features [N, D] and features to score [n, D]: collapsed, or the same arrays."""
    notes = []
    sample = train[:: max(1, len(train) // _SAMPLE)]
    length = np.linalg.norm(sample, axis=1, keepdims=True)
    unit = sample / np.where(length > 0, length, 1)
    if len(train) > 1 and unit.var(axis=0, dtype=np.float64).sum() < _MIN_VARIANCE:  # zeros too
        notes.append(COLLAPSED)
    if features is not None and train.shape == features.shape and np.array_equal(train, features):
        notes.append("the features to score are the training features: every image finds itself; use other images")
    return notes


def same_dimension(train: Float32Array, features: Float32Array) -> None:
    """Raises RequestError if training features and features to score differ in their dimension."""
    if train.shape[1] != features.shape[1]:
        raise RequestError(f"features have {features.shape[1]} dimensions, the training features {train.shape[1]}")


def ranks(scores: npt.NDArray[np.floating[Any]], labels: Int64Array) -> Int64Array:
    """The rank of the true class, 0 for the highest score: int64 [n] from scores [n, C].

    Of equal scores the class with the lower index comes first, so that results do not depend on the order of a sort.

    Raises:
        FkdError: A score is NaN.
    """
    if np.isnan(scores).any():
        raise FkdError("scores are NaN: the probe diverged")
    own = scores[np.arange(len(labels)), labels][:, None]
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank: Int64Array = ((scores > own) | ((scores == own) & before)).sum(axis=1, dtype=np.int64)
    return rank


def as_probe(
    train_features: Any, train_labels: Any, features: Any, labels: Any, num_classes: int | None
) -> tuple[Float32Array, Int64Array, Float32Array, Int64Array, int]:
    """Checks the arguments of a probe; returns training features and labels, features and labels to score, and C.

    Raises:
        RequestError: Shapes or labels are wrong, or there is one class only.
        FkdError: A feature is not finite.
    """
    train, wanted = as_features(train_features, "train_features"), as_features(features, "features")
    same_dimension(train, wanted)
    known = as_labels(train_labels, len(train), "train_labels", num_classes=num_classes)
    require_two_classes(known, "train_labels")
    classes = int(known.max()) + 1 if num_classes is None else num_classes
    return train, known, wanted, as_labels(labels, len(wanted), "labels", num_classes=classes), classes


def probe_result(
    rank: Int64Array,
    truth: Int64Array,
    names: Sequence[str] | None,
    *,
    train: Float32Array,
    features: Float32Array,
    classes: int,
    notes: Sequence[str],
    **settings: Any,
) -> dict[str, Any]:
    """The result of a probe on features: accuracy, its settings, sizes and notes, and `per_class` if there are names."""
    return {
        **accuracy(rank),
        **settings,
        "n_train": len(train),
        "n_val": len(features),
        "classes": classes,
        "feature_dim": train.shape[1],
        **({} if names is None else {"per_class": per_class(rank, truth, names)}),
        "notes": [*few_classes(classes), *feature_notes(train, features), *notes],
    }


def accuracy(rank: Int64Array) -> dict[str, Any]:
    """`top1` and `top5` in percent, and `correct` bool [n] (top-1, for paired bootstraps), from `ranks`."""
    correct: BoolArray = rank < 1
    return {"top1": 100.0 * float(correct.mean()), "top5": 100.0 * float((rank < 5).mean()), "correct": correct}


def per_class(rank: Int64Array, labels: Int64Array, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Number of images and top-1 in percent of each class that has images."""
    counts = np.bincount(labels, minlength=len(names))
    hits = np.bincount(labels, weights=rank < 1, minlength=len(names))
    return {name: {"n": int(n), "top1": 100.0 * float(hit / n)} for name, n, hit in zip(names, counts, hits, strict=True) if n}


def few_classes(num_classes: int) -> list[str]:
    """A note that top-5 is meaningless, if there are at most five classes."""
    return [f"top5 is 100 by definition: there are {num_classes} classes"] if num_classes <= 5 else []


def _first(bad: BoolArray) -> int:
    return int(np.argmax(bad))
