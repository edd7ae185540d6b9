"""ReActNet-A: a MobileNet with binary convolutions except the first; the student of S2-BNN.

Liu et al., "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions", ECCV 2020 (arXiv
2003.03488). It is trained in two steps: `reactnet_step1` has binary activations and real weights; `reactnet` has binary
activations and weights, and starts from the weights of step 1. Both have the same parameters with the same names.

Two things differ from the authors' code. There sign(0) is 0, which is not a bit; here it is -1. And a `reactnet` that is not
initialised from step 1 has weights between 0 and 0.001 there, which are all +1 when binary; here it has torch's default for
convolutions, with both signs.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
"""Channels after the first convolution and each of 13 blocks. Blocks that double them, except the first, have stride 2."""


class Sign(torch.autograd.Function):
    """1 if x > 0 and -1 otherwise, with the gradient of a piecewise quadratic (Bi-Real Net, arXiv 1808.00278, eq. 8).

    The gradient is max(0, 2 - 2|x|).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Signs of any shape."""
        ctx.save_for_backward(x)
        signs: Tensor = torch.where(x > 0, 1.0, -1.0).to(x.dtype)
        return signs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The gradient straight through, times the quadratic's slope."""
        (x,) = ctx.saved_tensors
        through: Tensor = grad * (2 - 2 * x.abs()).clamp_(min=0)
        return through


class BinaryConv2d(nn.Conv2d):
    """A convolution with the weights sign(w) times the mean |w| of the output channel (ReActNet, eq. 1; XNOR-Net's scale).

    The gradient of a weight is that of its binary weight if |w| <= 1, otherwise 0; the scale has no gradient. The real weights
    are trained and saved.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C', h, w] of signs [B, C, H, W]."""
        scale = self.weight.detach().abs().mean(dim=(1, 2, 3), keepdim=True)
        binary = torch.where(self.weight.detach() > 0, scale, -scale)
        clipped = self.weight.clamp(-1, 1)
        output: Tensor = self._conv_forward(input, binary + (clipped - clipped.detach()), self.bias)
        return output


class Shift(nn.Module):
    """Adds a learned number to each channel: the threshold of a sign, or a shift of a PReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        return x + self.bias


class RSign(nn.Module):
    """sign(x - alpha) with an alpha for each channel (eq. 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = Shift(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to signs."""
        return Sign.apply(self.shift(x))  # type: ignore[no-any-return]


def rprelu(channels: int) -> nn.Sequential:
    """A PReLU that is shifted on both axes, for each channel (eq. 5)."""
    return nn.Sequential(Shift(channels), nn.PReLU(channels), Shift(channels))


class Block(nn.Module):
    """A binary 3x3 and a binary 1x1 convolution, each with BatchNorm, a shortcut and an RPReLU (figure 3 and section 4.1).

    Where the width doubles, two 1x1 convolutions give a half each, so that both have the shortcut; where the stride is 2, the
    first shortcut is an average over 2 x 2.
    """

    def __init__(self, channels: int, out_channels: int, stride: int, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.sign1, self.act1 = RSign(channels), rprelu(channels)
        self.conv1 = conv(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        self.sign2, self.act2 = RSign(channels), rprelu(out_channels)
        halves = out_channels // channels
        self.conv2 = nn.ModuleList(conv(channels, channels, 1, bias=False) for _ in range(halves))
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(halves))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', h, w]."""
        x = self.act1(self.bn1(self.conv1(self.sign1(x))) + self.pool(x))
        signs = self.sign2(x)
        return self.act2(torch.cat([bn(conv(signs)) + x for conv, bn in zip(self.conv2, self.bn2, strict=True)], dim=1))  # type: ignore[no-any-return]


class ReActNet(nn.Module):
    """The backbone, from normalised floats [B, 3, H, W] to pooled features [B, 1024 x width].

    Args:
        binary_weights: False for the first step of the training.
        width: Multiplier of all numbers of channels.
    """

    def __init__(self, *, binary_weights: bool = True, width: float = 1.0) -> None:
        super().__init__()
        first = max(4, round(STAGES[0] * width))
        channels = [first * stage // STAGES[0] for stage in STAGES]
        conv: type[nn.Conv2d] = BinaryConv2d if binary_weights else nn.Conv2d
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(first))
        self.blocks = nn.Sequential(
            *(Block(one, two, 2 if two > one and k else 1, conv) for k, (one, two) in enumerate(pairwise(channels)))
        )
        self.feature_dim = channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, F] of [B, 3, H, W]."""
        return F.adaptive_avg_pool2d(self.blocks(self.stem(images)), 1).flatten(1)
