"""Students: a torchvision backbone and a projection head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fkd_ssl.errors import RequestError, did_you_mean

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLASSIFIERS = ("fc", "classifier", "heads", "head")  # what torchvision's families call their last layers


class Student(nn.Module):
    """A backbone and MoCo v2's projection head: Linear, ReLU, Linear (arXiv 2003.04297, section 3).

    A student of several teachers has a head for each, as in SimReg (arXiv 2201.05131).

    Args:
        name: Of the backbone, a classifier of torchvision's.
        dims: D of each teacher's targets.

    Attributes:
        backbone: [B, 3, H, W] to features [B, F]; what is kept after training.
        head: Features [B, F] to the first teacher's [B, D].
        more_heads: The other teachers'.
        feature_dim: F.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *dims: int) -> None:
        super().__init__()
        self.backbone, self.feature_dim = make_backbone(name)
        self.head, *more = (make_head(self.feature_dim, dim) for dim in dims)
        self.more_heads = nn.ModuleList(more)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255, persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Backbone features [B, F] of uint8 [B, 3, H, W]."""
        images = images.to(self.mean.device, non_blocking=True)
        features: Tensor = self.backbone((images - self.mean) / self.std)
        return features

    @property
    def dims(self) -> list[int]:
        """D of each head."""
        return [int(head[-1].out_features) for head in (self.head, *self.more_heads)]

    def forward(self, images: Tensor) -> Tensor:
        """L2-normalised embeddings [B, D] of uint8 [B, 3, H, W], by the first head."""
        return F.normalize(self.head(self.features(images)), dim=1)

    def embeddings(self, images: Tensor) -> list[Tensor]:
        """L2-normalised embeddings [B, D] of uint8 [B, 3, H, W], one for each teacher."""
        features = self.features(images)
        return [F.normalize(head(features), dim=1) for head in (self.head, *self.more_heads)]


def make_head(features: int, dim: int) -> nn.Sequential:
    """MoCo v2's projection head, F to D."""
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim))


def make_backbone(name: str) -> tuple[nn.Module, int]:
    """A torchvision classifier, untrained, without its last layers, and the dimension F of its features.

    Raises:
        RequestError: torchvision has no classifier of that name, or one whose last layers are not known here.
    """
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise RequestError(f"student {name!r}: torchvision has no such classifier{did_you_mean(name, names)}")
    extra = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    network = models.get_model(name, weights=None, **extra)
    last = next((part for part in _CLASSIFIERS if hasattr(network, part)), None)
    if last is None:
        raise RequestError(f"student {name!r}: cannot tell its classifier from its backbone")
    # these pool or flatten in their classifier, all others before it
    late = name.startswith(("squeezenet", "convnext", "maxvit"))
    setattr(network, last, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if late else nn.Identity())
    network.eval()
    with torch.no_grad():
        dim = network(torch.zeros(1, 3, 224, 224)).shape[1]
    network.train()
    return network, int(dim)


def check_student(name: str, pixels: int) -> None:
    """Raises RequestError where torchvision has no such classifier, or it cannot take crops of `pixels`."""
    network, _ = make_backbone(name)
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, pixels, pixels))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RequestError(f"student {name!r}: cannot take crops of {pixels} px: {error}") from error
