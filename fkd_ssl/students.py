"""Students: a torchvision backbone and a projection head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fkd_ssl.errors import RequestError, did_you_mean

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLASSIFIERS = ("fc", "classifier", "heads", "head")  # what torchvision's families call their last layers


class Student(nn.Module):
    """A backbone and MoCo v2's projection head: Linear, ReLU, Linear (arXiv 2003.04297, section 3).

    Attributes:
        backbone: [B, 3, H, W] to features [B, F]; what is kept after training.
        head: Features [B, F] to [B, D].
        feature_dim: F.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.backbone, self.feature_dim = make_backbone(name)
        self.head = nn.Sequential(
            nn.Linear(self.feature_dim, self.feature_dim), nn.ReLU(inplace=True), nn.Linear(self.feature_dim, dim)
        )
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255, persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Backbone features [B, F] of uint8 [B, 3, H, W]."""
        images = images.to(self.mean.device, non_blocking=True)
        features: Tensor = self.backbone((images - self.mean) / self.std)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """L2-normalised embeddings [B, D] of uint8 [B, 3, H, W]."""
        return F.normalize(self.head(self.features(images)), dim=1)


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
