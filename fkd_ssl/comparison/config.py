"""What a comparison is made of. No torch here: the command line's help is built from it."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from fkd_ssl.errors import RequestError
from fkd_ssl.training.groups import checkpoints_of, split


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Options of compare."""

    images: str
    """Folder of training images in class folders; the labels are used by the probes, and by the arm labels, alone."""
    val: str
    """Folder of test images in class folders."""
    teacher: str
    """A family, a preset, torchvision/NAME, timm/NAME, or module:function of your own (fkd-ssl teachers explains them); A,B
    for two."""
    teacher_weights: str | None = None
    """With two teachers: each one's share of the loss of both, as 2,1; equal by default."""
    checkpoint: str | None = None
    """The teacher's weights; of two teachers F,G in their order."""
    out: str
    """Folder of the comparison: store, runs, report.html, report.md, results.json, plots."""
    further_arms: str = ""
    """Beside stored and online, with blanks between them: online:stored_crops (the teacher runs on the store's crops),
    alone (no teacher: MoCo v2, for as long as stored takes with its precomputing), stored:C=4 (only the first 4 crops),
    stored:SQ4 (that codec); of a classifier also labels (plain training, no teacher) and
    relabel (ReLabel's maps)."""
    student: str = "resnet18"
    """As train takes it."""
    head: str = "mocov2"
    """Projection head: mocov2 or simreg; classifier for class probabilities."""
    stem: Literal["standard", "small"] = "standard"
    """small for images of 32 or 64 px."""
    width: float = 1.0
    """Factor of the student's channels, as train takes it."""
    epochs: float = 100
    """Of every arm with a teacher; one epoch is one crop of every image."""
    seeds: int = 1
    """Repetitions, with seeds 0, 1, ...; more of them can be asked for later."""
    crops: int | None = None
    """C, stored crops per image; as many as epochs by default, since more are never read."""
    codec: str | None = None
    """Of the store, as precompute takes it."""
    recipe: str = "mocov2"
    """What crops are drawn from, in all arms with a teacher."""
    pixels: int = 224
    """Side of all crops."""
    crops_per_image: int = 4
    """M, in all arms with a teacher."""
    batch_size: int = 256
    """Crops in a batch; for the arm alone images, of two crops each."""
    objective: str = "feature_kl"
    """As train takes it; prototype_ce if every teacher has prototypes."""
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    """Of all arms with a teacher."""
    lr: float = 3e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Of weights."""
    warmup_epochs: float = 0.0
    """Linear warm-up."""
    alone_lr: float = 0.03
    """Peak learning rate of the arm alone (MoCo's SGD)."""
    alone_momentum: float = 0.999
    """Of its key encoder's running mean; near 0.99 for some thousand images."""
    workers: int = 2
    """Processes that read images."""
    knn_every: float = 5
    """Epochs between the kNN scores that the curves are drawn from."""
    knn_k: int = 20
    """Neighbours."""
    json: bool = False
    """Print results.json on standard output."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("further_arms", "seeds", "workers", "json")
    PATHS: ClassVar[tuple[str, ...]] = ("images", "val", "checkpoint", "out")

    def __post_init__(self) -> None:
        if len(split(self.teacher)) > 2:
            raise RequestError(f"teacher {self.teacher}: compare takes one or two teachers; train takes more")
        if self.teacher_weights is not None and len(split(self.teacher)) < 2:
            raise RequestError(f"teacher_weights {self.teacher_weights!r}: there is one teacher; name two as --teacher A,B")
        checkpoints_of(self.teacher, self.checkpoint)
        if self.seeds < 1 or self.epochs <= 0:
            raise RequestError(f"seeds {self.seeds} and epochs {self.epochs}: must be positive")
        if self.stored_crops < self.crops_per_image:
            raise RequestError(
                f"crops {self.stored_crops} stored an image: fewer than the {self.crops_per_image} of --crops_per_image"
            )

    @property
    def stored_crops(self) -> int:
        """C of the store."""
        return math.ceil(self.epochs) if self.crops is None else self.crops
