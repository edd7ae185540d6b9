"""Features of an image set under the evaluation transform.

The transform resizes the short side to round(8/7 P) and takes the centre crop of P pixels. Both are one box in the image's
pixels, which `fkd_ssl.crops.replay` resizes once.

Legend: `B` images in a batch, `N` images in the set, `P` pixels, `D` feature dimension.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from fkd_ssl.arrays import Float32Array, Int64Array
from fkd_ssl.errors import FkdError, ImageError, RequestError
from fkd_ssl.eval import baselines
from fkd_ssl.eval.views import Centred, load
from fkd_ssl.images import ImageSource, open_images
from fkd_ssl.progress import bar_disabled

Model = Callable[[torch.Tensor], torch.Tensor]
"""Maps uint8 [B, 3, P, P] on the CPU to float [B, D] on any device; normalises and moves the pixels itself."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Features of a training and a validation set, with classes matched by folder name."""

    train_features: Float32Array
    """[N, D]."""
    train_labels: Int64Array
    """[N], indices into `classes`."""
    features: Float32Array
    """[n, D], of the validation set."""
    labels: Int64Array
    """[n], indices into `classes`."""
    classes: list[str]
    """The training set's class folders."""
    baselines: dict[str, tuple[Float32Array, Float32Array]] = field(default_factory=dict)
    """Features of both sets by `eval.baselines`, by name; empty if they were not computed."""

    @property
    def common(self) -> dict[str, Any]:
        """Keyword arguments of knn.evaluate_features, logreg.evaluate and sweep.evaluate."""
        return {
            "train_features": self.train_features,
            "train_labels": self.train_labels,
            "features": self.features,
            "labels": self.labels,
            "num_classes": len(self.classes),
        }


def extract(
    model: Model,
    images: str | Path | ImageSource,
    *,
    pixels: int,
    batch_size: int = 256,
    workers: int = 2,
    progress: bool = True,
    desc: str = "features",
    skipped: set[str] | None = None,
) -> tuple[Float32Array, Int64Array]:
    """Features of every image, in the set's order, and their labels (-1 for an image outside any class).

    Apart from the result, it holds a few batches in memory. An `nn.Module` is in eval mode during the call; any other callable
    must ensure this itself. No random state changes, so you can call it in the middle of a training.

    Args:
        model: uint8 [B, 3, P, P] -> float [B, D], such as `student.features`. For a network that takes normalised floats, use
            fkd_ssl.features.
        images: The image set, or an argument of `open_images`; images of any sizes.
        pixels: P, the side of the centre crop.
        batch_size: Images the model gets at once.
        workers: Processes that decode; 0 decodes in this one.
        progress: Show a bar on standard error.
        desc: Title of the bar.
        skipped: Collects the error message of each damaged image, which is left out. By default the first error is raised.

    Returns:
        Features float32 [N, D] and labels int64 [N].

    Raises:
        RequestError: The set is empty, or a number is below its minimum.
        ImageAccessError: An image cannot be opened.
        ImageError: An image is damaged and `skipped` is None, or all images are damaged.
        FkdError: The output of the model is not a finite [B, D] tensor of floats.
    """
    images = open_images(images)
    features, rows = extract_rows(
        model, images, pixels=pixels, batch_size=batch_size, workers=workers, progress=progress, desc=desc, skipped=skipped
    )
    return features, images.labels[rows]


def extract_rows(
    model: Model,
    images: ImageSource,
    *,
    pixels: int,
    batch_size: int = 256,
    workers: int = 2,
    progress: bool = True,
    desc: str = "features",
    skipped: set[str] | None = None,
    with_baselines: bool = False,
) -> tuple[Float32Array, Int64Array]:
    """Like `extract`, but returns the indices of the images, int64 [N], instead of their labels.

    With `with_baselines`, the last `baselines.DIM` dimensions are the features of the baselines.
    """
    check_counts(pixels=pixels, batch_size=batch_size)
    if len(images) == 0:
        raise RequestError(f"{images.spec}: no images to evaluate")
    rows = [range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size)]
    features: Float32Array | None = None
    read = np.zeros(len(images), dtype=bool)
    copying: list[tuple[torch.Tensor, torch.cuda.Event | None, torch.Tensor]] = []

    def keep(got: torch.Tensor, copied: torch.cuda.Event | None, indices: torch.Tensor) -> None:
        nonlocal features
        if copied is not None:
            copied.synchronize()
        require_finite(got, images, indices)
        if features is None:
            features = np.empty((len(images), got.shape[1]), dtype=np.float32)
        if got.shape[1] != features.shape[1]:
            extra = baselines.DIM * with_baselines
            raise FkdError(
                f"the model returned {features.shape[1] - extra} dimensions, then {got.shape[1] - extra}: expected one size"
            )
        features[indices.numpy()] = got.numpy()
        read[indices.numpy()] = True
        bar.update(len(indices))

    with (
        frozen(model),
        torch.inference_mode(),
        tqdm(total=len(images), desc=desc, unit="img", file=sys.stderr, disable=bar_disabled(show=progress)) as bar,
    ):
        for views, indices in load(Centred(images, pixels), rows, workers=workers, skipped=skipped, bar=bar):
            if not len(indices):
                continue
            got = shaped(_run(model, views), indices)
            if with_baselines:
                got = torch.cat([got, baselines.features(views.to(got.device, non_blocking=True))], dim=1)
            copying.append((*_copy_to_host(got), indices))
            if not got.is_cuda or len(copying) > 1:  # a GPU computes a batch while the one before is written
                keep(*copying.pop(0))
        for last in copying:
            keep(*last)
    if features is None:
        raise ImageError(f"{images.spec}: none of its {len(images)} images can be read")
    return (features, np.arange(len(images))) if read.all() else (features[read], np.flatnonzero(read))


def _run(model: Model, views: torch.Tensor) -> object:
    try:
        return model(views)
    except (RuntimeError, TypeError) as error:
        if re.search("unsigned char|byte|uint8", str(error), re.IGNORECASE):
            raise FkdError(
                f"the model does not accept uint8 [B, 3, P, P] ({error}); normalise inside the model, or pass a network of "
                "normalised floats to fkd_ssl.features, knn or linear"
            ) from error
        raise


def extract_split(
    model: Model,
    train: ImageSource,
    val: ImageSource,
    *,
    pixels: int,
    batch_size: int = 256,
    workers: int = 2,
    progress: bool = True,
    skipped: set[str] | None = None,
) -> Split:
    """Extracts the features of both sets. Matches the classes first, so that a wrong pair of folders fails at once."""
    labels = match_classes(train, val)
    options: dict[str, Any] = {
        "pixels": pixels,
        "batch_size": batch_size,
        "workers": workers,
        "progress": progress,
        "skipped": skipped,
    }
    train_features, train_labels = extract(model, train, desc="features of train", **options)
    features, rows = extract_rows(model, val, desc="features of val", **options)
    return Split(
        train_features=train_features,
        train_labels=train_labels,
        features=features,
        labels=labels[rows],
        classes=train.classes,
    )


def match_classes(train: ImageSource, val: ImageSource) -> Int64Array:
    """The labels of `val` as indices into `train.classes`, matched by folder name; int64 [n].

    Raises:
        RequestError: An image is outside any class folder, `train` has one class only, or `val` has a class that `train` lacks.
    """
    for images in (train, val):
        if len(images) == 0:
            raise RequestError(f"{images.spec}: no images to evaluate")
        outside = np.flatnonzero(images.labels < 0)
        if len(outside):
            raise RequestError(
                f"{images.spec}: {len(outside)} of {len(images)} images are outside any class folder "
                f"(first {images.names[outside[0]]!r}); scores need FOLDER/CLASS/IMAGE "
                "(retrieve --query IMAGE does not)"
            )
    require_two_classes(train)
    known = {train.classes[i]: int(i) for i in np.unique(train.labels)}
    present = {int(i): val.classes[i] for i in np.unique(val.labels)}
    missing = sorted(set(present.values()) - set(known))
    if missing:
        names = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise RequestError(
            f"{val.spec}: {len(missing)} of its {len(present)} classes have no image in {train.spec}: {names}; "
            f"classes are matched by the name of their folder{_level_hint(val)}"
        )
    to_train = np.full(len(val.classes), -1, dtype=np.int64)
    for i, name in present.items():
        to_train[i] = known[name]
    labels: Int64Array = to_train[val.labels]
    return labels


def require_two_classes(images: ImageSource) -> None:
    """Raises RequestError if all images are in one class folder: every score would be 100 %."""
    present = np.unique(images.labels)
    if len(present) == 1:
        name = images.classes[present[0]]
        raise RequestError(
            f"{images.spec}: one class only, {name!r}; expected a folder for each of two or more classes{_level_hint(images)}"
        )


def _level_hint(images: ImageSource) -> str:
    """The end of a message about classes: advice if the only class folder contains folders and no images."""
    folders = {tuple(path.split("/", 2)[:2]) for path in images.names if path.count("/") > 1}
    if len(images.classes) != 1 or len(folders) < 2 or any(path.count("/") < 2 for path in images.names):
        return ""
    name = images.classes[0]
    return f": {name!r} holds only folders; if these are the classes, give {images.spec}/{name}"


@contextlib.contextmanager
def frozen(model: object) -> Iterator[None]:
    """Puts an `nn.Module` into eval mode; afterwards restores the mode of each of its parts."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def checked(output: object, images: ImageSource, indices: torch.Tensor) -> torch.Tensor:
    """Returns a model's output for the images at `indices` as finite float32 [B, D]; raises FkdError if it is invalid."""
    features = shaped(output, indices)
    require_finite(features, images, indices)
    return features


def shaped(output: object, indices: torch.Tensor) -> torch.Tensor:
    """Like `checked`, but does not check the values, since that would wait for a GPU."""
    advice = "expected one tensor [B, D] of floats, such as a backbone's pooled features"
    if not isinstance(output, torch.Tensor):
        size = f" of {len(output)}" if isinstance(output, (tuple, list, dict)) else ""
        raise FkdError(f"the model returned a {type(output).__name__}{size}: {advice}")
    if output.ndim != 2 or len(output) != len(indices) or not output.shape[1] or not output.is_floating_point():
        raise FkdError(f"the model returned {output.dtype} {list(output.shape)} for {len(indices)} images: {advice}")
    return output.detach().float()


def require_finite(features: torch.Tensor, images: ImageSource, indices: torch.Tensor) -> None:
    """Raises FkdError if features [B, D] of the images at `indices` have NaN or infinity."""
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        first = images.names[int(indices[int(finite.int().argmin())])]
        raise FkdError(
            f"the model returned NaN or infinity for {int((~finite).sum())} of {len(indices)} images, first {first!r}"
        )


def _copy_to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Starts copying a tensor to pinned host memory; for a GPU tensor, the event is recorded after the copy."""
    if not tensor.is_cuda:
        return tensor.cpu(), None
    host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(tensor.device))
    return host, copied


def check_counts(**counts: int) -> None:
    """Raises RequestError for the first count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise RequestError(f"{name} must be at least 1, got {count}")
