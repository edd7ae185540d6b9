"""The config of a pretraining. This module does not import torch, since the command line's help is built from it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fkd_ssl.errors import RequestError
from fkd_ssl.training.groups import check_not_negative, check_positive

# options of one method only, with their published values
METHODS: dict[str, dict[str, float]] = {
    "mocov2": {"lr": 0.03, "weight_decay": 1e-4, "temperature": 0.2, "queue": 65536, "momentum": 0.999},
    "swav": {
        "lr": 0.6,
        "weight_decay": 1e-6,
        "temperature": 0.1,
        "queue": 3840,
        "queue_epoch": 15,
        "prototypes": 3000,
        "frozen_epochs": 1,
        "epsilon": 0.05,
        "small_crops": 6,
    },
}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2")
# of --optimizer adamw: MoCo v3 (arXiv 2104.02057)
_ADAMW = {"lr": 1.5e-4, "weight_decay": 0.1}
_METHOD_OPTIONS = sorted({name for own in METHODS.values() for name in own})
_ABOVE_ZERO = ["dim", "epochs", "batch_size", "pixels", "log_every"]
_FROM_ZERO = ["warmup_epochs", "workers", "checkpoint_interval", "weight_decay", "queue_epoch", "frozen_epochs", "small_crops"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Config of a teacher's pretraining by MoCo v2 (arXiv 2003.04297) or SwAV (2006.09882), by default as published.

    The defaults are for ImageNet and batches of 256 images. For a few thousand images, use more epochs. For MoCo also use a
    shorter queue and a momentum near 0.99; for SwAV use fewer prototypes (about ten per expected class), start the queue only
    after the features have stabilised, and set --epsilon 0.03 if the loss stays at ln(prototypes).
    """

    images: str
    """Images: a folder, tars, Parquet files, a list of files, or another source (docs/sources.md). Labels are not needed."""
    out: str
    """Run folder for checkpoint.pth.tar in the method's own layout (or student.safetensors), config.yaml, metrics.csv and
    results.json. Repeat the command to resume."""
    method: Literal["mocov2", "swav"] = "mocov2"
    """Method of pretraining; also the name of the --teacher that loads the checkpoint."""
    arch: str = "resnet18"
    """Network to train: a ResNet of torchvision, whose checkpoint is a teacher. MoCo can also train any student of train
    without a teacher; its backbone is then written in the format of export."""
    stem: Literal["standard", "small"] = "standard"
    """Stem, as for train. A network with the small stem is a student, not a teacher."""
    width: float = 1.0
    """Multiplier of the number of channels, as for train. A network with a width other than 1 is a student, not a teacher."""
    dim: int = 128
    """D, dimension of the embeddings and so of the targets."""
    epochs: int = 200
    """Number of passes over the images. Each draws new crops of every image: two, and SwAV's small crops."""
    batch_size: int = 256
    """Number of images in a batch; each gives two or more crops."""
    pixels: int = 224
    """Side of the crops; the side of SwAV's small crops is 96/224 of it."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """MoCo: optimiser; ViTs need adamw. SwAV always uses LARS."""
    lr: float | None = None
    """Peak learning rate of a cosine schedule to zero, not scaled with the batch size. Default: 0.03 (MoCo), 1.5e-4 (MoCo with
    adamw, as in MoCo v3) or 0.6 (SwAV)."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up; ViTs need some."""
    weight_decay: float | None = None
    """Weight decay of all parameters. Default: 1e-4 (MoCo), 0.1 (MoCo with adamw, as in MoCo v3) or 1e-6 (SwAV, where 0 would
    also disable the scaling of LARS)."""
    temperature: float | None = None
    """Temperature of the loss. Default: 0.2 (MoCo) or 0.1 (SwAV)."""
    queue: int | None = None
    """Number of earlier embeddings kept, as negatives (MoCo) or for the assignment (SwAV); at most half the images. Default:
    65536 (MoCo) or 3840 (SwAV)."""
    momentum: float | None = None
    """MoCo: momentum of the key encoder's moving average. Default: 0.999."""
    queue_epoch: int | None = None
    """SwAV: number of epochs before the queue is filled and used. Default: 15."""
    prototypes: int | None = None
    """SwAV: K, number of prototypes. Default: 3000."""
    frozen_epochs: float | None = None
    """SwAV: number of epochs at the start in which the prototypes are frozen. Default: 1."""
    epsilon: float | None = None
    """SwAV: epsilon of the Sinkhorn assignment. A smaller one gives sharper assignments. Default: 0.05."""
    small_crops: int | None = None
    """SwAV: number of small crops per image, in addition to two large ones. Default: 6."""
    seed: int = 0
    """Seed of the initial weights, the order of images and the crops."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision, in Lightning's terms."""
    workers: int = 2
    """Processes that read images."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do if an image is damaged: stop and name it, or replace it with another image of its batch and count it."""
    log_every: int = 20
    """Steps per line of metrics.csv."""
    checkpoint_interval: float = 60.0
    """Minimum seconds between checkpoints, which are saved at the end of an epoch. The last step is always saved."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("workers", "on_unreadable", "checkpoint_interval")
    PATHS: ClassVar[tuple[str, ...]] = ("images", "out")

    def __post_init__(self) -> None:
        own = METHODS[self.method] | (_ADAMW if self.optimizer == "adamw" else {})
        if self.method == "swav" and self.optimizer == "adamw":
            raise RequestError("optimizer adamw: is for mocov2; swav always uses LARS")
        for name in _METHOD_OPTIONS:
            if name not in own and getattr(self, name) is not None:
                others = " and ".join(method for method, names in METHODS.items() if name in names)
                raise RequestError(f"{name} {getattr(self, name)}: {self.method} has no such option; it belongs to {others}")
            if name in own and getattr(self, name) is None:
                object.__setattr__(self, name, own[name])  # so that config.yaml has the value that was used
        if self.method == "swav" and not self.is_teacher:
            raise RequestError(
                f"arch {self.arch!r}: swav trains only ResNets of the standard stem and width: {', '.join(RESNETS)}"
            )
        from_zero = [*_FROM_ZERO, "queue"] if self.method == "swav" else _FROM_ZERO
        check_not_negative(self, *from_zero)
        check_positive(self, *(name for name in (*_ABOVE_ZERO, *own) if name not in from_zero))
        if self.batch_size < 2:
            raise RequestError(f"batch_size {self.batch_size}: BatchNorm needs at least 2")
        if self.warmup_epochs >= self.epochs:
            raise RequestError(f"warmup_epochs {self.warmup_epochs:g}: must be fewer than epochs {self.epochs}")
        if self.momentum is not None and self.momentum >= 1:
            raise RequestError(f"momentum {self.momentum}: must be positive and below 1")

    @property
    def is_teacher(self) -> bool:
        """Whether the checkpoint layout of the method supports the network."""
        return self.arch in RESNETS and (self.stem, self.width) == ("standard", 1.0)
