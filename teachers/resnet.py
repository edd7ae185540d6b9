"""ResNets of any width with torchvision's names; their architecture is inferred from the shapes in a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fkd_ssl.errors import CheckpointError

_STAGE_WIDTHS = (64, 128, 256, 512)
_NAMES: dict[tuple[str, tuple[int, ...]], str] = {
    ("BasicBlock", (2, 2, 2, 2)): "resnet18",
    ("BasicBlock", (3, 4, 6, 3)): "resnet34",
    ("Bottleneck", (3, 4, 6, 3)): "resnet50",
    ("Bottleneck", (3, 4, 23, 3)): "resnet101",
    ("Bottleneck", (3, 8, 36, 3)): "resnet152",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The architecture of a ResNet, inferred from shapes."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    width: int
    """Multiplier of every width (SwAV's w2, w4, w5)."""
    base_width: int
    """torchvision's width_per_group: 128 for wide_resnet, 64 otherwise."""

    @property
    def name(self) -> str:
        """The usual name, for instance resnet50w4."""
        known = _NAMES[self.block.__name__, self.depths]
        name = f"wide_{known}_2" if self.base_width == 128 else known
        return name + (f"w{self.width}" if self.width > 1 else "")

    @property
    def feature_dim(self) -> int:
        """F, the dimension of the pooled features."""
        return int(_STAGE_WIDTHS[-1] * self.width * self.block.expansion)

    def build(self) -> ResNet:
        """Makes the backbone on the meta device; its `fc` is the identity."""
        with torch.device("meta"):
            return WidthResNet(self)


class WidthResNet(ResNet):  # type: ignore[misc]
    """torchvision's ResNet with all widths multiplied, as in SwAV's code; torchvision itself widens only 3 x 3 convolutions.

    SwAV pads the stem by 1 and then by 2, which equals torchvision's zero padding of 3.
    """

    def __init__(self, architecture: Architecture) -> None:
        a = architecture
        super().__init__(a.block, [1, 1, 1, 1], width_per_group=a.base_width)
        widths = [width * a.width for width in _STAGE_WIDTHS]
        self.conv1 = nn.Conv2d(3, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.inplanes = widths[0]
        self.layer1 = self._make_layer(a.block, widths[0], a.depths[0])
        self.layer2 = self._make_layer(a.block, widths[1], a.depths[1], stride=2)
        self.layer3 = self._make_layer(a.block, widths[2], a.depths[2], stride=2)
        self.layer4 = self._make_layer(a.block, widths[3], a.depths[3], stride=2)
        self.fc = nn.Identity()


def read_architecture(weights: Mapping[str, Tensor], where: str) -> Architecture:
    """Infers the architecture from `weights` with torchvision's names.

    Raises:
        CheckpointError: They are not the weights of a ResNet; `where` names the file.
    """
    try:
        stem = weights["conv1.weight"].shape
        depths = tuple(
            len({key.split(".")[1] for key in weights if key.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
        )
        bottleneck = "layer1.0.conv3.weight" in weights
        first = weights["layer1.0.conv2.weight"].shape
    except KeyError as error:
        raise CheckpointError(f"{where}: its backbone is not a ResNet in torchvision's layout ({error} is missing)") from error
    width = stem[0] // 64 if stem else 0
    base_width = first[0] // width if bottleneck and width and first else 64
    block = Bottleneck if bottleneck else BasicBlock
    fits = len(stem) == 4 and tuple(stem[1:]) == (3, 7, 7) and stem[0] == 64 * width and width <= 16
    if not fits or (block.__name__, depths) not in _NAMES or base_width not in (64, 128):
        raise CheckpointError(
            f"{where}: its backbone is not one of {', '.join(_NAMES.values())}, plain or wide: found {block.__name__}s "
            f"{list(depths)} of width {base_width}, stem {list(stem)}"
        )
    return Architecture(block=block, depths=depths, width=width, base_width=base_width)
