"""Spatial feature maps of any network, read in the same forward pass as its usual features.

Legend: `B` images, `F` channels of the map, `h` x `w` positions, `N` tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fkd_ssl.errors import RequestError

_MAX_PREFIX = 16  # class, distillation and register tokens before the patch tokens


def features_and_map(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what `network(images)` returns, and the network's last spatial map, from one forward pass.

    - If a module has a method `features_and_map`, it is called.
    - A network of timm gives the map of `forward_features`: patch tokens after the final norm, without class and register
      tokens, or the last feature map.
    - Every other network is observed during the pass: its map is the last tensor with positions that it turns into vectors, by
      pooling, flattening or taking the class token. This covers torchvision, ReActNet and most modules of your own.

    Gradients flow through both outputs. The function works in train mode, under autocast and in any floating-point precision.
    If the network was compiled by `network.compile()`, the pass is compiled too, with the default options of torch.compile.

    Args:
        network: Maps floats [B, 3, H, W] to features [B, F'].
        images: Input of the network.

    Returns:
        The features [B, F'] and the map [B, F, h, w].

    Raises:
        RequestError: The network has no map, or it has only one position for images of this size.
    """
    read = _read if getattr(network, "_compiled_call_impl", None) is None else _compiled_read()
    features, found = read(network, images)
    if found is None or found.shape[2] * found.shape[3] < 2 or found.shape[1:] == images.shape[1:]:
        raise RequestError(
            f"{type(network).__name__}: has no feature map for images of {images.shape[3]} x {images.shape[2]} px, or only one "
            "position: use larger images, another network, or a module with a method features_and_map(images) that returns "
            "features [B, F] and a map [B, F, h, w]"
        )
    return features, found


def feature_map(network: nn.Module, images: Tensor) -> Tensor:
    """Returns only the map [B, F, h, w] of `features_and_map`."""
    return features_and_map(network, images)[1]


def to_grid(feature_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pools a map [B, F, h, w] by area to a grid of at most h x w cells; returns [B, *grid, F]."""
    return F.interpolate(feature_map, grid, mode="area").permute(0, 2, 3, 1)


def arrange(tokens: Tensor, size: tuple[int, ...], *, prefix: int = 0) -> Tensor | None:
    """Arranges tokens [B, N, F] of images of `size` (H, W) as a map [B, F, h, w], without the first `prefix` of them.

    h and w are the factors of the number of tokens with the ratio nearest to that of the images.
    Returns None if the ratios differ by a factor of 2 or more.
    """
    tokens = tokens[:, prefix:]
    count, ratio = tokens.shape[1], size[0] / size[1]
    pairs = [(h, count // h) for h in range(1, count + 1) if count % h == 0]
    if not pairs:
        return None

    def apart(pair: tuple[int, int]) -> float:
        found = pair[0] / pair[1]
        return max(found / ratio, ratio / found)

    h, w = min(pairs, key=apart)
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, h, w) if apart((h, w)) < 2 else None


class MapWatch(TorchFunctionMode):
    """Observes a forward pass and records the last tensor with positions that the network turns into one vector per image.

    Attributes:
        map: [B, F, h, w] with several positions; None if there was none.
        pooled: Whether each value of the vectors comes from one channel of the map; False for flattening and single tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.map: Tensor | None = None
        self.pooled = False
        self._vector: Tensor | None = None  # the map, pooled
        self._patches: tuple[int, int] | None = None  # positions of the last convolution, in a vision transformer the patches

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        given = args[0] if args else None
        if isinstance(output, Tensor) and isinstance(given, Tensor) and given.ndim > 2:
            self._see(function, given, output)
        return output

    def _see(self, function: Any, given: Tensor, output: Tensor) -> None:
        batch, *sides = given.shape
        if function in (F.conv2d, torch.conv2d):
            self._patches = (output.shape[2], output.shape[3])
        elif output.shape[:1] != given.shape[:1]:
            return
        elif given.ndim == 4:
            if output.numel() == batch * sides[0] and sides[1] * sides[2] > 1:
                self.map, self.pooled, self._vector = given, True, output
            elif output.numel() == batch * sides[2] and sides[0] * sides[1] > 1:  # channels last
                self.map, self.pooled = given.permute(0, 3, 1, 2), True
            elif function in (torch.flatten, Tensor.flatten) and output.ndim == 2 and sides[1] * sides[2] > 1:
                self.map, self.pooled = given, False
            elif (
                function in (F.adaptive_avg_pool2d, torch.mean, Tensor.mean)
                and sides[1] * sides[2] == 1
                and given is not self._vector  # which is pooled twice, as in a student of torchvision's ConvNeXt
            ):
                self.map = None  # an earlier map, for instance of squeeze-and-excitation, is not the last one
        elif given.ndim == 3 and self._patches is not None:
            first, last = sides
            positions = self._patches[0] * self._patches[1]
            if first > 1 and output.shape == (batch, last) and 0 <= first - positions <= _MAX_PREFIX:  # [B, N, F] to [B, F]
                self.map = given[:, first - positions :].transpose(1, 2).reshape(batch, last, *self._patches)
                self.pooled = False
            elif last == positions > 1 and output.shape in (
                (batch, first),
                (batch, first, 1),
            ):  # [B, F, N] to [B, F] or [B, F, 1]
                self.map, self.pooled = given.reshape(batch, first, *self._patches), True


def _read(network: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    if hasattr(network, "features_and_map"):
        said = network.features_and_map(images)
        outputs = said if isinstance(said, tuple | list) else [said]
        if [getattr(one, "ndim", None) for one in outputs] != [2, 4]:
            found = [list(one.shape) if isinstance(one, Tensor) else type(one).__name__ for one in outputs]
            raise RequestError(
                f"{type(network).__name__}.features_and_map: returned {found}; expected features [B, F] and a map [B, F, h, w]"
            )
        return outputs[0], outputs[1]
    if hasattr(network, "forward_features") and hasattr(network, "forward_head"):
        given = network.forward_features(images)
        return network.forward_head(given), _timm_map(network, given, images)
    with MapWatch() as watch:
        features = network(images)
    return features, watch.map


def _timm_map(network: Any, given: Any, images: Tensor) -> Tensor | None:
    """Arranges what a timm network's `forward_features` gives: a map, with channels first or last, or tokens."""
    if not isinstance(given, Tensor) or given.ndim not in (3, 4):
        return None
    if given.ndim == 3:
        return arrange(given, images.shape[2:], prefix=getattr(network, "num_prefix_tokens", 0))
    last = getattr(network, "output_fmt", "NCHW") == "NHWC"
    return given.permute(0, 3, 1, 2) if last or given.shape[1] != network.num_features == given.shape[3] else given


@functools.cache
def _compiled_read() -> Callable[[Any, Tensor], tuple[Tensor, Tensor | None]]:
    return torch.compile(_read)
