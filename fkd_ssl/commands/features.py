"""Computes the features of images once and caches them for knn, linear and retrieve.

Prints the paths of features.npy and labels.npy. The other commands find them if given the same --features folder; they also
accept FEATURES.npy,LABELS.npy in place of images. Several processes started with the same command share the work.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fkd_ssl.errors import RequestError

if TYPE_CHECKING:
    from fkd_ssl.results import Features


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of features."""

    model: str
    """A run folder, one of its .ckpt files, teacher:NAME, torchvision/NAME, timm/NAME, or module:function."""
    images: str
    """Images: a folder, tars, Parquet files, a list of files, or another source (docs/sources.md)."""
    features: str | None = None
    """Cache folder; needed on the command line."""
    pixels: int | None = None
    """Side of the centre crop; by default the size that the model was trained at."""
    checkpoint: str | None = None
    """Checkpoint of the teacher; `pretrained` downloads its library's weights."""
    workers: int = 2
    """Processes that read images."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do if an image is damaged: stop and name it, or leave it out and count it."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Prints where the features are."""
    from fkd_ssl.commands import results

    if config.features is None:
        raise RequestError("--features is needed: the folder that keeps them")
    results.show(work(config), json=config.json)
    return 0


def work(config: Config) -> "Features":
    """Computes the features, or reads them from the cache."""
    from pathlib import Path

    import numpy as np

    from fkd_ssl.commands import sources
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.results import Features

    images = images_of(config.images)
    model, pixels = sources.load_model(config)
    source = sources.features_of(model, pixels, config.images, images, config, "features")
    count, dim = source.features.shape
    entry = None if config.features is None else Path(config.features) / source.details["features"]
    files = "" if entry is None else f"{entry / 'features.npy'},{entry / 'labels.npy'}: "
    counts = {"images": count, "unreadable_images": source.skipped, "feature_dim": dim}
    return Features(
        line=f"{files}{count} images, {dim} dimensions",
        values={
            "kind": "features",
            "entry": None if entry is None else str(entry),
            **counts,
            **sources.about_model(model, pixels),
        },
        out=entry,
        features=np.ascontiguousarray(source.features),  # without the baselines beside them
        labels=source.labels,
    )
