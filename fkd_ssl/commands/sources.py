"""Opens the models, image sets and feature files of the evaluation commands, and computes features."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fkd_ssl import files
from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.checkpoints import digest
from fkd_ssl.commands import console, resolve
from fkd_ssl.commands.images import images_of
from fkd_ssl.errors import RequestError
from fkd_ssl.eval import baselines, cache
from fkd_ssl.eval.features import Split, extract_rows, match_classes
from fkd_ssl.eval.scores import as_features, as_labels, compact, numpy_of, same_dimension
from fkd_ssl.images import CONTENTS, ImageSource
from fkd_ssl.options import Named
from fkd_ssl.teachers.state_dicts import tensors_digest


class Options(Protocol):
    """Options of all evaluation commands."""

    @property
    def model(self) -> str | None: ...  # noqa: D102
    @property
    def checkpoint(self) -> str | None: ...  # noqa: D102
    @property
    def pixels(self) -> int | None: ...  # noqa: D102
    @property
    def workers(self) -> int: ...  # noqa: D102
    @property
    def features(self) -> str | None: ...  # noqa: D102
    @property
    def on_unreadable(self) -> str: ...  # noqa: D102


class ScoreOptions(Options, Protocol):
    """Options of the evaluation commands that report scores."""

    @property
    def out(self) -> str | None: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Source:
    """Features of one image set."""

    features: Float32Array
    labels: Int64Array
    details: dict[str, Any]
    rows: Int64Array
    """Indices of the images, or of the rows of a file, without skipped images."""
    skipped: int = 0
    """Number of skipped images."""
    baselines: dict[str, Float32Array] = field(default_factory=dict)
    """Features of each baseline in `eval.baselines`, by its name; empty for files."""


def is_files(spec: str) -> bool:
    """Whether `spec` is FEATURES.npy,LABELS.npy, or two arrays."""
    return isinstance(spec.value, (list, tuple)) if isinstance(spec, Named) else spec.endswith(".npy")


def check_baseline(baseline: str | None, spec: str) -> None:
    """Raises RequestError if the baseline is `pixels` but `spec` has features instead of images."""
    if baseline == "pixels" and is_files(spec):
        raise RequestError(f"--baseline pixels needs images, and {spec} has features; choose --baseline chance")


def read_pair(spec: str) -> Source:
    """Reads FEATURES.npy,LABELS.npy.

    Raises:
        RequestError: These are not two .npy files of numbers, or their lengths do not match.
        FkdError: A feature is not finite.
    """
    if isinstance(spec, Named):
        names = ["features", "labels"]
        features, labels = _arrays(spec)
    else:
        names = spec.split(",")
        if len(names) != 2:
            raise RequestError(f"{spec}: expected two files, FEATURES.npy,LABELS.npy")
        features, labels = (files.map_user_npy(Path(name)) for name in names)
    features = as_features(features, names[0])
    labels = as_labels(labels, len(features), names[1])
    details = {"source": spec, "images": len(features)}
    return Source(features=features, labels=labels, details=details, rows=np.arange(len(features)))


def load_model(config: Options) -> tuple[resolve.Model, int]:
    """Loads the model; returns it and the side of its crops. Raises RequestError if no model is given."""
    if config.model is None:
        raise RequestError("--model must be given, or features as FEATURES.npy,LABELS.npy")
    model = resolve.model_of(config.model, config.checkpoint)
    return model, resolve.pixels_of(config.pixels, model.pixels)


def features_of(model: resolve.Model, pixels: int, spec: str, images: ImageSource, config: Options, desc: str) -> Source:
    """Computes the features of images, or reads them from the cache."""
    details = about_images(spec, images)
    options: dict[str, Any] = {"pixels": pixels, "workers": config.workers, "desc": desc}
    with console.skipping(config.on_unreadable) as skipped:
        if config.features is None:
            both, rows = extract_rows(model.features, images, skipped=skipped, with_baselines=True, **options)
            features, baseline = both[:, : -baselines.DIM], both[:, -baselines.DIM :]
        else:
            folder = Path(config.features)
            features, baseline, rows, entry = cache.cached(
                model.features, images, folder=folder, identity=model.identity, skipped=skipped, **options
            )
            details["features"] = entry.name
    return Source(
        features=features,
        labels=images.labels[rows],
        details=details,
        rows=rows,
        skipped=len(images) - len(rows),
        baselines=baselines.by_name(baseline),
    )


def about_images(spec: str, images: ImageSource) -> dict[str, Any]:
    """The entry of an image set in results.json."""
    return {"source": spec, "images": len(images), "classes": len(images.classes), "sha256": images.digest()}


def about_model(model: resolve.Model | None, pixels: int | None) -> dict[str, Any]:
    """The entries `model` and `transform` in results.json."""
    transform = None if pixels is None else cache.transform_of(pixels)
    return {"model": None if model is None else model.details, "transform": transform}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The opened inputs of an evaluation: a model and images, or feature files."""

    names: Sequence[str]
    """Names of the sets in the evaluation: train, and val if given."""
    specs: list[str]
    """The sets as the user named them."""
    sets: list[ImageSource]
    """The image sets; empty if `pairs` has feature files."""
    pairs: list[Source]
    model: resolve.Model | None
    pixels: int | None
    name: str | None
    """The model as the user named it."""
    out: str | None
    """The run folder."""

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Identifies the model and the sets in the run folder; empty without a run folder."""
        if self.out is None:
            return {}
        if self.model is None:
            found = {name: _files_digest(spec) for name, spec in zip(self.names, self.specs, strict=True)}
            return {"model": self.name or "not named", **found}
        model = f"{self.model.details['network']}, sha256 {self.model.identity}"
        found = {"model": model}
        for name, images in zip(self.names, self.sets, strict=True):
            found |= images.identity(f"{name} images", sizes=False)
            found[f"{CONTENTS}{name} images"] = f"sha256 {images.digest()}"
        return found


def open_evaluation(config: ScoreOptions, train: str, val: str | None, names: Sequence[str] = ("train", "val")) -> Evaluation:
    """Opens the model and the sets of an evaluation and checks them against each other.

    Raises:
        RequestError: One set is images and the other files, classes do not match, or an input does not exist.
    """
    specs = [train] if val is None else [train, val]
    if len({is_files(spec) for spec in specs}) > 1:
        raise RequestError(f"{' and '.join(specs)}: give images for both or files of features for both")
    opened: dict[str, Any] = {"names": names[: len(specs)], "specs": specs, "name": config.model, "out": config.out}
    if is_files(train):
        if config.model is not None and config.checkpoint is not None:
            raise RequestError("--checkpoint cannot be used with files of features")
        pairs = [read_pair(spec) for spec in specs]
        same_dimension(pairs[0].features, pairs[-1].features)
        return Evaluation(**opened, sets=[], pairs=pairs, model=None, pixels=None)
    sets = [images_of(spec) for spec in specs]
    match_classes(sets[0], sets[-1])
    model, pixels = load_model(config)
    return Evaluation(**opened, sets=sets, pairs=[], model=model, pixels=pixels)


def split_of(evaluation: Evaluation, config: Options) -> tuple[Split, dict[str, Any]]:
    """Computes the features of a training and a validation set, and their entries in results.json.

    Without a validation set, its features and labels are empty. Classes of images are matched by folder name, classes of
    files by number.
    """
    sources, sets, model, pixels = evaluation.pairs, evaluation.sets, evaluation.model, evaluation.pixels
    if model is None:
        train_labels, labels, classes = compact(sources[0].labels, sources[-1].labels)
        details = {"model": {"name": config.model}, "transform": None}
    else:
        assert pixels is not None
        labels = match_classes(sets[0], sets[-1])
        sources = [
            features_of(model, pixels, spec, images, config, f"features of {part}")
            for spec, images, part in zip(evaluation.specs, sets, ("train", "val"), strict=False)
        ]
        labels = labels[sources[-1].rows]
        train_labels, classes = sources[0].labels, sets[0].classes
        details = about_model(model, pixels)
    data = {name: source.details for name, source in zip(("train", "val"), sources, strict=False)}
    split = Split(
        train_features=sources[0].features,
        train_labels=train_labels,
        features=sources[1].features if len(sources) > 1 else np.empty((0, sources[0].features.shape[1]), dtype=np.float32),
        labels=labels if len(sources) > 1 else np.empty(0, dtype=np.int64),
        classes=classes,
        baselines={name: (found, sources[-1].baselines[name]) for name, found in sources[0].baselines.items()},
    )
    return split, {**details, "data": data, "unreadable_images": sum(source.skipped for source in sources)}


def _files_digest(spec: str) -> str:
    """The digests of FEATURES.npy,LABELS.npy, or of two arrays."""
    if isinstance(spec, Named):
        arrays = {name: torch.from_numpy(array) for name, array in zip(("features", "labels"), _arrays(spec), strict=True)}
        return f"sha256 {tensors_digest(arrays)}"
    return ", ".join(f"sha256 {digest(name)}" for name in spec.split(","))


def _arrays(spec: Named) -> list[Any]:
    """Features and labels as arrays of numpy. Raises RequestError if they are something else."""
    if len(spec.value) != 2:
        raise RequestError(f"{spec}: expected two arrays (features, labels), got {len(spec.value)}")
    try:
        return [numpy_of(one) if isinstance(one, torch.Tensor) else np.asarray(one) for one in spec.value]
    except (TypeError, ValueError, RuntimeError) as error:  # such as a sparse tensor
        raise RequestError(f"{spec}: {error}; expected two arrays (features, labels)") from error
