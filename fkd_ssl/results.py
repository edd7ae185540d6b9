"""What the functions of `fkd_ssl` return. A result prints as the line that the command line shows."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fkd_ssl.arrays import BoolArray, Float32Array, Int64Array

if TYPE_CHECKING:
    from torch import nn

    from fkd_ssl.store import Store
    from fkd_ssl.students import Student


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Result:
    """The result of a function. It can be given to other functions in place of its folder or file."""

    line: str
    """The result in one line."""
    values: dict[str, Any] = field(default_factory=dict)
    """All figures with their options, inputs and versions, as in results.json."""
    out: Path | None = None
    """The folder or file that was written, if any."""

    def __repr__(self) -> str:
        notes = [f"note: {note}" for note in self.values.get("notes", [])]
        where = [] if self.out is None or str(self.out) in self.line else [f"written to {self.out}"]
        return "\n".join([self.line, *notes, *where])

    def __fspath__(self) -> str:
        if self.out is None:
            raise TypeError(f"a {type(self).__name__} without files: pass out= to the function that made it")
        return os.fspath(self.out)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Score(Result):
    """Accuracy of a model's features."""

    top1: float
    """Accuracy in percent."""
    top5: float
    """Share of images whose class is among the first five, in percent."""
    interval95: tuple[float, float] | None
    """Wilson's 95 % interval of `top1`; None for a mean over draws."""
    correct: BoolArray
    """Which images were classified correctly, bool [n]; compare two models with fkd_ssl.eval.paired_bootstrap."""
    baselines: dict[str, float]
    """Accuracy in percent of `pixels` and `colours`, by the same protocol, and of `chance`."""

    @classmethod
    def of(cls, values: dict[str, Any], correct: BoolArray, out: Path | None) -> Self:
        """Returns the result that a results.json describes."""
        low, high = values.get("interval95") or (0.0, 0.0)
        return cls(
            line=values["line"],
            values=values,
            out=out,
            top1=values["top1"],
            top5=values["top5"],
            interval95=(low, high) if "interval95" in values else None,
            correct=correct,
            baselines=values.get("baselines", {}),
        )


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Retrieval(Result):
    """Accuracy of image retrieval with a model's features."""

    recall: dict[int, float]
    """Share of queries with an image of their class among the first k, in percent, by k."""
    precision: dict[int, float]
    """Share of images of the query's class among the first k, in percent, by k."""
    map_at_r: float
    """Mean average precision at R, in percent."""
    correct: BoolArray
    """Whether the first image has the query's class, bool [n]."""

    @classmethod
    def of(cls, values: dict[str, Any], correct: BoolArray, out: Path | None) -> Self:
        """Returns the result that a results.json describes."""
        by_k = {key: {int(k): share for k, share in values[key].items()} for key in ("recall", "precision")}
        return cls(line=values["line"], values=values, out=out, **by_k, map_at_r=values["map_at_r"], correct=correct)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Segmentation(Result):
    """Semantic segmentation from a model's frozen feature maps."""

    miou: float
    """Mean intersection over union of the linear layer, in percent."""
    pixel_accuracy: float
    """Share of pixels that it classifies correctly, in percent."""
    interval95: tuple[float, float]
    """95 % interval of `miou` by a bootstrap over images."""
    knn_miou: float
    """Mean intersection over union of nearest neighbours, in percent."""
    per_class: dict[str, dict[str, float | None]]
    """`iou`, `knn_iou` and `share` of the pixels of each class, in percent."""
    counts: Int64Array
    """Pixels of intersection, prediction and mask, int64 [n, 3, C]; fkd_ssl.eval.iou.paired_bootstrap compares two models."""
    baselines: dict[str, float]
    """Mean IoU in percent of `colours` and `colours_knn`, by the same protocols, and of `majority`."""

    @classmethod
    def of(cls, values: dict[str, Any], counts: Int64Array, out: Path | None) -> Self:
        """Returns the result that a results.json describes."""
        same = ("miou", "pixel_accuracy", "knn_miou", "per_class", "baselines")
        low, high = values["interval95"]
        return cls(
            line=values["line"],
            values=values,
            out=out,
            interval95=(low, high),
            counts=counts,
            **{key: values[key] for key in same},
        )


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Sheet(Result):
    """A contact sheet; `out` is the PNG, which a notebook shows."""

    def _repr_png_(self) -> bytes:
        return Path(self).read_bytes()


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Nearest(Sheet):
    """The images nearest to one image; `out` is the contact sheet."""

    nearest: list[dict[str, Any]]
    """`image`, `class` and `cosine` of each, the nearest first."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Features(Result):
    """Features of an image set; `out` is their folder in the cache."""

    features: Float32Array
    """[N, D]."""
    labels: Int64Array
    """[N]; -1 for an image without a class."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Precomputed(Result):
    """A store; `out` is its folder."""

    crops: int
    """Number of crops that the teachers saw in this call."""
    seconds: float
    """Time of this call."""
    store_bytes: int
    """Bytes of the store on disk."""

    @property
    def store(self) -> "Store":
        """The opened store."""
        from fkd_ssl.store import open_store

        return open_store(self)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Copied(Result):
    """A copy of a store, or of a part of one; `out` is its folder."""

    @property
    def store(self) -> "Store":
        """The opened store."""
        from fkd_ssl.store import open_store

        return open_store(self)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Published(Result):
    """A store at a URL."""

    url: str
    """The URL, for `open_store` and for the option `store` of other functions."""
    sent_bytes: int
    """Bytes of the files that were not there already."""

    def __fspath__(self) -> str:
        return self.url


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Verified(Result):
    """The check of a store."""

    problems: list[str]
    """What is wrong and what to do; empty if nothing is."""
    repaired: list[str]
    """What was repaired."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Trained(Result):
    """A trained student."""

    steps: int
    """Number of training steps."""
    seconds: float
    """Training time over all sessions."""
    knn_top1: float | None
    """kNN accuracy in percent on `val`, if it was given."""
    backbone: "nn.Module | None" = None
    """The module that was given as `student`, with its initial weights; None for a network that has a name."""

    @property
    def pixels(self) -> int:
        """Side of the crops that the student was trained on."""
        return int(self.values["config"]["pixels"])

    @property
    def student(self) -> "Student":
        """The trained student in eval mode, read from the last checkpoint."""
        from fkd_ssl.students import load_student
        from fkd_ssl.training.monitor import last_checkpoint

        assert self.out is not None
        return load_student(last_checkpoint(self.out), backbone=self.backbone)[0]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Exported(Result):
    """A student's weights; `out` is the file."""

    load: str
    """A line of Python that loads the file."""
    pixels: int
    """Side of the crops that the student was trained on."""


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Compared(Result):
    """A comparison; `out` is its folder, with report.html. `line` is the table, in Markdown."""

    def _repr_markdown_(self) -> str:
        return f"{self.line}\n\n{self.out}/report.html"
