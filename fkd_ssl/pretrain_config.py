"""What the pretraining of a teacher is made of. No torch here: the command line's help is built from it."""

from dataclasses import dataclass
from typing import Literal

from fkd_ssl.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A teacher trained without labels by MoCo v2 (arXiv 2003.04297), whose published settings are the defaults.

    They are ImageNet's. On some thousand images take more epochs, a shorter queue and a momentum near 0.99.
    """

    images: str
    """Folder of images; class folders are not needed."""
    out: str
    """Run folder: checkpoint.pth.tar in MoCo's own layout, config.yaml, metrics.csv, results.json."""
    method: Literal["mocov2"] = "mocov2"
    """How it is trained."""
    arch: Literal[
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ] = "resnet18"
    """One of torchvision's ResNets."""
    dim: int = 128
    """D of its embeddings, and so of the targets."""
    epochs: int = 200
    """Sweeps over the images; each gives two fresh crops of every image."""
    batch_size: int = 256
    """Images in a batch; twice as many crops."""
    pixels: int = 224
    """Side of the crops."""
    lr: float = 0.03
    """Peak learning rate, for the batch size as it is; MoCo's is 0.03 for 256. A cosine to zero follows."""
    weight_decay: float = 1e-4
    """Of all parameters, as in MoCo."""
    temperature: float = 0.2
    """Of the contrastive loss."""
    queue: int = 65536
    """Negatives kept; shortened to a multiple of batch_size and to half of the images."""
    momentum: float = 0.999
    """Of the key encoder's running mean."""
    seed: int = 0
    """Of the initial weights, the order of images and the crops."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Arithmetic, in Lightning's terms."""
    workers: int = 2
    """Processes that read images."""
    log_every: int = 20
    """Steps in one line of metrics.csv."""

    def __post_init__(self) -> None:
        for name in ("dim", "epochs", "batch_size", "pixels", "lr", "temperature", "queue", "log_every"):
            if getattr(self, name) <= 0:
                raise RequestError(f"{name} {getattr(self, name)}: must be positive")
        for name in ("weight_decay", "workers"):
            if getattr(self, name) < 0:
                raise RequestError(f"{name} {getattr(self, name)}: must not be negative")
        if self.batch_size < 2:
            raise RequestError(f"batch_size {self.batch_size}: BatchNorm needs at least 2")
        if not 0 <= self.momentum < 1:
            raise RequestError(f"momentum {self.momentum}: must lie in 0 to 1, and below 1 or the keys never change")
