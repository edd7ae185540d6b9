"""What the pretraining of a teacher is made of. No torch here: the command line's help is built from it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fkd_ssl.errors import RequestError

# what each method has of its own, with its published value
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
_OF_A_METHOD = sorted({name for own in METHODS.values() for name in own})
_FROM_ZERO = ("weight_decay", "workers", "queue_epoch", "frozen_epochs", "small_crops")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A teacher trained without labels by MoCo v2 (arXiv 2003.04297) or SwAV (2006.09882), with their published settings.

    They are ImageNet's for 256 images a batch. On some thousand images take more epochs; for MoCo a shorter queue and a
    momentum near 0.99; for SwAV fewer prototypes (some ten a class that may be there), since 3,000 cannot be told apart by
    few images, the queue only when the features have settled, and --epsilon 0.03 if the loss stays at ln(prototypes).
    """

    images: str
    """Folder of images, NAME:SPLIT:ROOT (cifar10:train:/data), or module:function; class folders are not needed."""
    out: str
    """Run folder: checkpoint.pth.tar in the method's own layout (or student.safetensors), config.yaml, metrics.csv,
    results.json."""
    method: Literal["mocov2", "swav"] = "mocov2"
    """How it is trained; also the --teacher that loads it."""
    arch: str = "resnet18"
    """A ResNet of torchvision's, whose checkpoint is a teacher. MoCo also trains any student that train knows, without a
    teacher: its backbone is then what is written, as export writes it."""
    stem: Literal["standard", "small"] = "standard"
    """Of such a student, as train takes it."""
    width: float = 1.0
    """Likewise."""
    dim: int = 128
    """D of its embeddings, and so of the targets."""
    epochs: int = 200
    """Sweeps over the images; each gives fresh crops of every image: two, and SwAV's small ones."""
    batch_size: int = 256
    """Images in a batch; at least twice as many crops."""
    pixels: int = 224
    """Side of the crops; SwAV's small ones have 96/224 of it."""
    lr: float | None = None
    """Peak learning rate, for the batch size as it is; 0.03 (MoCo's SGD) or 0.6 (SwAV's LARS). A cosine to zero follows."""
    weight_decay: float | None = None
    """Of all parameters; 1e-4 (MoCo) or 1e-6 (SwAV, where 0 would also switch LARS's scaling off)."""
    temperature: float | None = None
    """Of the loss; 0.2 (MoCo) or 0.1 (SwAV)."""
    queue: int | None = None
    """Earlier embeddings kept: 65536 negatives (MoCo), 3840 for the assignment (SwAV); shortened to half of the images."""
    momentum: float | None = None
    """MoCo: of the key encoder's running mean; 0.999."""
    queue_epoch: int | None = None
    """SwAV: epochs before the queue is filled and used; 15."""
    prototypes: int | None = None
    """SwAV: K; 3000."""
    frozen_epochs: float | None = None
    """SwAV: epochs in which the prototypes stay as they were drawn; 1."""
    epsilon: float | None = None
    """SwAV: of Sinkhorn's assignment, smaller is sharper; 0.05."""
    small_crops: int | None = None
    """SwAV: small crops beside the two large ones; 6."""
    seed: int = 0
    """Of the initial weights, the order of images and the crops."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic, in Lightning's terms."""
    workers: int = 2
    """Processes that read images."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do about a damaged image: stop and name it, or train on another one of its batch and count it."""
    log_every: int = 20
    """Steps in one line of metrics.csv."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("workers", "on_unreadable")
    PATHS: ClassVar[tuple[str, ...]] = ("images", "out")

    def __post_init__(self) -> None:
        own = METHODS[self.method]
        for name in _OF_A_METHOD:
            if name not in own and getattr(self, name) is not None:
                others = " and ".join(method for method, names in METHODS.items() if name in names)
                raise RequestError(f"{name} {getattr(self, name)}: {self.method} has none; it belongs to {others}")
            if name in own and getattr(self, name) is None:
                object.__setattr__(self, name, own[name])  # so that config.yaml says what was run
        if self.method == "swav" and not self.is_teacher:
            raise RequestError(
                f"arch {self.arch!r}: swav trains teachers, of the standard stem and width: {', '.join(RESNETS)}"
            )
        for name in ("dim", "epochs", "batch_size", "pixels", "log_every", "workers", *own):
            least_is_zero = name in _FROM_ZERO or (self.method, name) == ("swav", "queue")
            if getattr(self, name) < 0 or (getattr(self, name) == 0 and not least_is_zero):
                raise RequestError(
                    f"{name} {getattr(self, name)}: must {'not be negative' if least_is_zero else 'be positive'}"
                )
        if self.batch_size < 2:
            raise RequestError(f"batch_size {self.batch_size}: BatchNorm needs at least 2")
        if self.momentum is not None and self.momentum >= 1:
            raise RequestError(f"momentum {self.momentum}: must lie in 0 to 1, and below 1 or the keys never change")

    @property
    def is_teacher(self) -> bool:
        """Whether the method's own layout has such a network."""
        return self.arch in RESNETS and (self.stem, self.width) == ("standard", 1.0)
