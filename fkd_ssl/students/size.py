"""The size of a student: parameters and multiply-adds."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fkd_ssl.students.reactnet import BinaryConv2d


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of a backbone, without its head."""

    parameters: int
    """Number of parameters."""
    multiply_adds: int
    """Multiply-adds per image in convolutions, linear layers and attention, without binary convolutions."""
    binary_multiply_adds: int
    """Multiply-adds per image in binary convolutions; a processor does 64 of them at once (ReActNet, section 5.1)."""

    def __str__(self) -> str:
        binary = f" and {self.binary_multiply_adds / 1e6:,.1f} M binary ones" if self.binary_multiply_adds else ""
        return f"{self.parameters / 1e6:,.2f} M parameters, {self.multiply_adds / 1e6:,.1f} M multiply-adds{binary} per image"


def measure(backbone: nn.Module, pixels: int) -> Size:
    """Measures a backbone with an input [1, 3, P, P]; the backbone is not changed."""
    binary = [0]

    def count(module: BinaryConv2d, inputs: Any, output: torch.Tensor) -> None:
        binary[0] += output.numel() * module.weight[0].numel()

    hooks = [part.register_forward_hook(count) for part in backbone.modules() if isinstance(part, BinaryConv2d)]
    training = backbone.training
    backbone.eval()
    first = next(backbone.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, pixels, pixels, device=first.device))
    backbone.train(training)
    for hook in hooks:
        hook.remove()
    everything = counter.get_total_flops() // 2
    return Size(
        parameters=sum(p.numel() for p in backbone.parameters()),
        multiply_adds=everything - binary[0],
        binary_multiply_adds=binary[0],
    )
