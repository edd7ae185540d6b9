"""A student: a backbone and one projection head per teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fkd_ssl.errors import RequestError
from fkd_ssl.maps import feature_map, features_and_map, to_grid
from fkd_ssl.students.backbones import make_backbone, map_dim
from fkd_ssl.students.heads import CLASSIFIER, make_head
from fkd_ssl.targets import TeacherInfo

Dim = int | tuple[int, ...]
"""Size of a target: D of a vector, or (h, w, D) of a grid of tokens."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Student(nn.Module):
    """A backbone and a projection head, by default that of MoCo v2.

    A student of several teachers has one head per teacher, as in SimReg (arXiv 2201.05131), and one forward pass for all heads.
    A head for tokens is applied to each position of the backbone's last map (1 x 1 convolutions) and resized to the grid.

    Args:
        name: Name of the backbone: a classifier of torchvision, timm/NAME, reactnet or reactnet_step1.
        dims: Size of each teacher's targets: D, or (h, w, D) for tokens.
        head: Name in `HEADS`.
        stem: Stem of the backbone; see make_backbone.
        width: Multiplier of the number of channels; see make_backbone.
        drop_path: Rate of stochastic depth in train mode; see make_backbone.

    Attributes:
        backbone: Maps [B, 3, H, W] to features [B, F]; it is kept after training.
        head: Maps features [B, F] to the first teacher's targets [B, D].
        more_heads: Heads of the other teachers.
        dims: As given.
        feature_dim: F.
        spec: Arguments that make the same student again, except `dims`: `name`, and those of `head`, `stem` and `width` that
            differ from their defaults.

    Raises:
        RequestError: The backbone, head, stem or width is unknown or not supported.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *dims: Dim,
        head: str = "mocov2",
        stem: str = "standard",
        width: float = 1.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        options = {"head": (head, "mocov2"), "stem": (stem, "standard"), "width": (width, 1.0)}
        changed = {key: value for key, (value, default) in options.items() if value != default}
        self.spec: dict[str, Any] = {"name": str(name), **changed}
        self.backbone, self.feature_dim = make_backbone(name, stem=stem, width=width, drop_path=drop_path)
        self.dims = [*dims]
        channels = map_dim(self.backbone, name) if any(isinstance(dim, tuple) for dim in dims) else 0
        self.head, *more = (
            make_head(head, channels, dim[-1]) if isinstance(dim, tuple) else make_head(head, self.feature_dim, dim)
            for dim in dims
        )
        self.more_heads = nn.ModuleList(more)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255, persistent=False)

    @property
    def dim(self) -> int:
        """D of the first head's targets."""
        first = self.dims[0]
        return first if isinstance(first, int) else first[-1]

    def features(self, images: Tensor) -> Tensor:
        """Backbone features [B, F] of uint8 [B, 3, H, W]."""
        features: Tensor = self.backbone(self._normalised(images))
        return features

    def map(self, images: Tensor) -> Tensor:
        """The backbone's last map, float32 [B, h, w, F], of uint8 [B, 3, H, W]. Raises RequestError if it has no map."""
        return feature_map(self.backbone, self._normalised(images)).permute(0, 2, 3, 1).float()

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

    def forward(self, images: Tensor) -> Tensor:
        """Output of the first head for uint8 [B, 3, H, W].

        L2-normalised embeddings [B, D] or tokens [B, h, w, D], or a classifier's logits [B, K].

        Raises:
            RequestError: A head is for tokens, and the backbone has no map of several positions for images of this size.
        """
        return self._outputs(images, 1)[0]

    def embeddings(self, images: Tensor) -> list[Tensor]:
        """The output of `forward` for each teacher's head."""
        return self._outputs(images, len(self.dims))

    def _outputs(self, images: Tensor, count: int) -> list[Tensor]:
        """The outputs of the first `count` heads."""
        heads = list(zip(self.dims, (self.head, *self.more_heads), strict=True))[:count]
        if not any(isinstance(dim, tuple) for dim, _ in heads):
            features, found = self.features(images), None
        else:
            features, found = features_and_map(self.backbone, self._normalised(images))
        outputs = []
        for dim, head in heads:
            if isinstance(dim, tuple):
                assert found is not None
                positions = found.permute(0, 2, 3, 1)
                projected = head(positions.flatten(0, 2)).unflatten(0, positions.shape[:3])
                outputs.append(F.normalize(resize(projected, dim[:2]), dim=-1))
            else:
                projected = head(features)
                outputs.append(projected if self.spec.get("head") == CLASSIFIER else F.normalize(projected, dim=1))
        return outputs

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.device, non_blocking=True) - self.mean) / self.std


def resize(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Resizes [B, H, W, D] to the targets' grid [B, h, w, D]: bilinear where the grid is finer, then by area.

    Both treat a token as an equal part of the crop, with its value at the centre, so that positions do not shift. Area is how
    the teacher's map was pooled. To refine, bilinear interpolation is used, because area would repeat the same token.
    """
    found, (height, width) = tokens.permute(0, 3, 1, 2), grid
    finer = max(height, found.shape[2]), max(width, found.shape[3])
    if finer != found.shape[2:]:
        found = F.interpolate(found, finer, mode="bilinear", align_corners=False)
    return to_grid(found, (height, width))


def dims_of(targets: Sequence[TeacherInfo]) -> list[Dim]:
    """The sizes of the teachers' targets, for `Student`."""
    return [teacher.spec.shape if teacher.spec.kind == "tokens" else teacher.spec.size for teacher in targets]


def check_student(
    name: str,
    pixels: int,
    *dims: Dim,
    head: str = "mocov2",
    stem: str = "standard",
    width: float = 1.0,
    drop_path: float = 0.0,
) -> None:
    """Raises RequestError if the student cannot be made, or does not accept crops of side `pixels`."""
    student = Student(name, *(dims or (2,)), head=head, stem=stem, width=width, drop_path=drop_path).eval()
    try:
        with torch.no_grad():
            student.embeddings(torch.zeros(1, 3, pixels, pixels, dtype=torch.uint8))
    except RequestError as error:
        raise RequestError(f"student {name!r}: {error}") from error
    except (RuntimeError, AssertionError, ValueError) as error:
        raise RequestError(f"student {name!r}: cannot take crops of {pixels} px: {error}") from error
