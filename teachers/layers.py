"""Features of a named layer of a network, pooled to one vector per image."""

from typing import Any

from torch import Tensor, nn

from fkd_ssl.errors import RequestError, did_you_mean

PROBABILITIES = "probabilities"
"""Name to give instead of a layer, for the softmax of the whole classifier."""


class AtLayer(nn.Module):
    """A network up to one of its layers: maps [B, 3, H, W] to [B, F]. Later layers are not run.

    Maps [B, F, h, w] (or [B, h, w, F], recognised by h = w for square inputs) are averaged over positions, tokens [B, T, F]
    over all tokens including the class token; vectors [B, F] are used unchanged.

    Args:
        network: Any network.
        layer: Name of a submodule, as in `network.named_modules()`.
        teacher: The user's name of the teacher; error messages begin with it.

    Raises:
        RequestError: The network does not have the layer.
    """

    def __init__(self, network: nn.Module, layer: str, teacher: str) -> None:
        super().__init__()
        names = [name for name, _ in network.named_modules() if name]
        if layer not in names:
            tops = [name for name in names if "." not in name]
            raise RequestError(
                f"teacher {teacher}: has no layer {layer!r}{did_you_mean(layer, names)} (top-level layers: {', '.join(tops)})"
            )
        self.network = network
        self.layer = layer
        network.get_submodule(layer).register_forward_hook(_stop)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, F] of normalised floats [B, 3, H, W]."""
        try:
            self.network(images)
        except _ReachedError as reached:
            return pool(reached.output)
        raise ValueError(f"its layer {self.layer} was not reached")


def pool(output: Any) -> Tensor:
    """Pools a layer's output to [B, F]; raises ValueError if it is not a 2- to 4-D tensor or its layout is unclear."""
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        what = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the layer gives {what}, expected a tensor [B, F], [B, T, F] or [B, F, h, w]")
    if output.ndim == 2:
        return output
    if output.ndim == 3:
        return output.mean(dim=1)
    first, last = output.shape[2] == output.shape[3], output.shape[1] == output.shape[2]
    if first == last:
        raise ValueError(f"the layer gives {list(output.shape)}: the dimension of the channels is ambiguous")
    return output.mean(dim=(2, 3) if first else (1, 2))


class _ReachedError(Exception):
    """Ends a forward pass at the requested layer."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _ReachedError(output)
