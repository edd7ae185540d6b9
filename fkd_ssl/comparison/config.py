"""The config of a comparison. This module does not import torch, since the command line's help is built from it."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from fkd_ssl.errors import RequestError
from fkd_ssl.training.groups import FROM_DATA, checkpoints_of, split


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Options of compare."""

    images: str
    """Folder of training images in class folders. Only the probes, and the further arm `labels`, use the classes."""
    val: str
    """Folder of test images in class folders."""
    teacher: str
    """A family, a preset, torchvision/NAME, timm/NAME, or module:function of your own (fkd-ssl teachers explains them); A,B
    for two."""
    teacher_weights: str | None = None
    """Weight of each of two teachers in the loss, for instance 2,1; by default equal."""
    checkpoint: str | None = None
    """Checkpoint of the teacher; F,G for teachers A,B."""
    out: str
    """Folder of the comparison, for store, runs, report.html, report.md, results.json and plots."""
    store: str | None = None
    """Folder or URL of an existing store of these images and teachers, with its crops per image and codec. By default, compare
    makes a store. The time to make an existing store is unknown, so there is no break-even."""
    further_arms: str = ""
    """Arms in addition to stored and online, separated by spaces: online:stored_crops (the teacher runs on the store's crops),
    alone (MoCo v2 without a teacher, for as long as precompute and stored together), stored:C=4 (only the first 4 crops),
    stored:SQ4 (another codec); with a classifier as teacher also labels (supervised training without a teacher) and relabel
    (ReLabel's label maps)."""
    student: str = "resnet18"
    """Student network, as for train."""
    head: str = "mocov2"
    """Projection head: mocov2 or simreg; classifier for class probabilities."""
    stem: Literal["standard", "small"] = "standard"
    """Stem of the student; small is for images of 32 or 64 px."""
    width: float = 1.0
    """Multiplier of the student's number of channels, as for train."""
    epochs: float = 100
    """Number of epochs of every arm with a teacher; one epoch is one crop of every image."""
    seeds: int = 1
    """Number of repetitions, with seeds 0, 1, ...; you can increase it later."""
    crops: int | None = None
    """C, stored crops per image; by default the number of epochs, since more are never read. Every crop is read once before
    any is read twice, even if M does not divide C."""
    codec: str | None = None
    """Codec of the store, as for precompute."""
    recipe: str = "mocov2"
    """Augmentation that crops are drawn from, in all arms with a teacher."""
    pixels: int = FROM_DATA
    """Side of all crops; by default the teacher's."""
    crops_per_image: int = 4
    """M, crops per image in a batch, in all arms with a teacher."""
    batch_size: int = FROM_DATA
    """Number of crops in a batch, by default as for train; in the arm alone, number of images with two crops each."""
    objective: str = FROM_DATA
    """Loss, by default as for train; prototype_ce only if every teacher has prototypes."""
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    """Optimizer of all arms with a teacher."""
    lr: float = FROM_DATA
    """Peak learning rate, by default as for train."""
    weight_decay: float = 0.0
    """Weight decay, as for train."""
    warmup_epochs: float = FROM_DATA
    """Epochs of linear warm-up, by default as for train."""
    alone_lr: float | None = None
    """Peak learning rate of the arm alone. Default: 0.03 (MoCo v2's SGD), or 1.5e-4 with --optimizer adamw (AdamW)."""
    alone_momentum: float = 0.999
    """Momentum of the key encoder's moving average in the arm alone; use about 0.99 for a few thousand images."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of all trainings, in Lightning's terms."""
    teacher_precision: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the teacher, for the store and online; by default that of the trainings."""
    grid: int | None = None
    """Number of tokens along each side of the crop, for teachers NAME@tokens; by default 7."""
    workers: int = 2
    """Processes that read images."""
    knn_every: float = 5
    """Number of epochs between the kNN scores of the curves."""
    knn_k: int = 20
    """Number of neighbours of kNN."""
    json: bool = False
    """Print results.json on standard output."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("further_arms", "seeds", "workers", "json")
    PATHS: ClassVar[tuple[str, ...]] = ("images", "val", "checkpoint", "out", "store")

    def __post_init__(self) -> None:
        if len(split(self.teacher)) > 2:
            raise RequestError(f"teacher {self.teacher}: compare takes one or two teachers; train takes more")
        if self.teacher_weights is not None and len(split(self.teacher)) < 2:
            raise RequestError(f"teacher_weights {self.teacher_weights!r}: there is one teacher; name two as --teacher A,B")
        checkpoints_of(self.teacher, self.checkpoint)
        if self.seeds < 1 or self.epochs <= 0:
            raise RequestError(f"seeds {self.seeds} and epochs {self.epochs}: must be positive")
        if (self.store is None or self.crops is not None) and self.stored_crops < self.crops_per_image:
            raise RequestError(f"crops {self.stored_crops}: must be at least crops_per_image {self.crops_per_image}")

    @property
    def stored_crops(self) -> int:
        """C, crops per image in the store."""
        return math.ceil(self.epochs) if self.crops is None else self.crops
