"""A student: a backbone and one projection head per teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fkd_ssl.errors import RequestError
from fkd_ssl.students.backbones import make_backbone
from fkd_ssl.students.heads import CLASSIFIER, make_head

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Student(nn.Module):
    """A backbone and a projection head, by default that of MoCo v2.

    A student of several teachers has one head per teacher, as in SimReg (arXiv 2201.05131).

    Args:
        name: Name of the backbone: a classifier of torchvision, timm/NAME, reactnet or reactnet_step1.
        dims: D of each teacher's targets.
        head: Name in `HEADS`.
        stem: Stem of the backbone; see make_backbone.
        width: Multiplier of the number of channels; see make_backbone.

    Attributes:
        backbone: Maps [B, 3, H, W] to features [B, F]; it is kept after training.
        head: Maps features [B, F] to the first teacher's targets [B, D].
        more_heads: Heads of the other teachers.
        feature_dim: F.
        spec: Arguments that make the same student again, except `dims`: `name`, and those of `head`, `stem` and `width` that
            differ from their defaults.

    Raises:
        RequestError: The backbone, head, stem or width is unknown or not supported.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, *dims: int, head: str = "mocov2", stem: str = "standard", width: float = 1.0) -> None:
        super().__init__()
        options = {"head": (head, "mocov2"), "stem": (stem, "standard"), "width": (width, 1.0)}
        changed = {key: value for key, (value, default) in options.items() if value != default}
        self.spec: dict[str, Any] = {"name": str(name), **changed}
        self.backbone, self.feature_dim = make_backbone(name, stem=stem, width=width)
        self.head, *more = (make_head(head, self.feature_dim, dim) for dim in dims)
        self.more_heads = nn.ModuleList(more)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255, persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Backbone features [B, F] of uint8 [B, 3, H, W]."""
        images = images.to(self.mean.device, non_blocking=True)
        features: Tensor = self.backbone((images - self.mean) / self.std)
        return features

    def start_from(self, given: Mapping[str, Tensor]) -> None:
        """Copies weights from a student's state_dict: the whole backbone, and heads of the same shape.

        Raises:
            RequestError: The backbones differ.
        """
        own = self.state_dict()
        taken = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
        backbone = {key for key in (*own, *given) if key.startswith("backbone.")}
        if absent := sorted(backbone - taken.keys()):
            network = ", ".join(map(str, self.spec.values()))
            raise RequestError(
                f"init: these weights are not those of {network} ({absent[0]!r} differs); pass those of the same network"
            )
        self.load_state_dict({**own, **taken})

    @property
    def dims(self) -> list[int]:
        """D of each head."""
        return [int(head[-1].out_features) for head in (self.head, *self.more_heads)]

    def forward(self, images: Tensor) -> Tensor:
        """Output of the first head for uint8 [B, 3, H, W]: L2-normalised embeddings [B, D], or a classifier's logits [B, K]."""
        return self._output(self.head(self.features(images)))

    def embeddings(self, images: Tensor) -> list[Tensor]:
        """The output of `forward` for each teacher's head."""
        features = self.features(images)
        return [self._output(head(features)) for head in (self.head, *self.more_heads)]

    def _output(self, projected: Tensor) -> Tensor:
        return projected if self.spec.get("head") == CLASSIFIER else F.normalize(projected, dim=1)


def check_student(name: str, pixels: int, *, head: str = "mocov2", stem: str = "standard", width: float = 1.0) -> None:
    """Raises RequestError if the student cannot be made, or does not accept crops of side `pixels`."""
    student = Student(name, 2, head=head, stem=stem, width=width)
    try:
        with torch.no_grad():
            student.backbone.eval()(torch.zeros(1, 3, pixels, pixels))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RequestError(f"student {name!r}: cannot take crops of {pixels} px: {error}") from error
