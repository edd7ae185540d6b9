"""Makes a Teacher from any network that maps floats to one vector per image."""

from typing import Any

import torch
from torch import nn

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.targets import KINDS
from fkd_ssl.targets.tokens import TOKENS
from fkd_ssl.teachers.teacher import Teacher
from fkd_ssl.teachers.tokens import as_tokens


def wrap(module: nn.Module, *, name: str, source: str, pixels: int, test_pixels: int | None = None, **fields: Any) -> Teacher:
    """Makes a Teacher whose targets are the module's normalised outputs; a forward pass of zeros determines their shape.

    Args:
        module: Maps normalised floats [B, 3, H, W] to [B, D]; for tokens, to features [B, F] or a map [B, F, h, w].
        name: Name of the column.
        source: The user's name of the teacher; error messages begin with it.
        pixels: Native size of the module.
        test_pixels: Side of the zeros; by default `pixels`.
        **fields: Further arguments of Teacher.

    Raises:
        RequestError: The kind is `tokens`, and the module has no feature map.
        FkdError: The module does not map [2, 3, P, P] floats to one tensor [2, D], or gives probabilities, not logits.
    """
    module.eval()
    side = test_pixels or pixels
    if tokens := fields.get("kind") == TOKENS:
        fields["kind"] = "embedding"
    try:
        with torch.inference_mode():
            output = module(torch.zeros(2, 3, side, side))
            if tokens and isinstance(output, torch.Tensor) and output.ndim == 4:
                module = nn.Sequential(module, nn.AdaptiveAvgPool2d(1), nn.Flatten())
                output = module[1:](output)
            dense = isinstance(output, torch.Tensor) and output.layout == torch.strided
            right = dense and len(output) == 2 and _is_target(output, fields.get("kind", "embedding"))
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise FkdError(
            f"teacher {source}: fails on [2, 3, {side}, {side}] floats: {type(error).__name__}: {error}; it must map "
            "them to [2, D]"
        ) from error
    if right and fields.get("kind") == "distribution" and (output >= 0).all() and ((output.sum(dim=1) - 1).abs() < 1e-3).all():
        raise FkdError(f"teacher {source}: returns probabilities, expected logits: remove its softmax")
    if not right:
        found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise FkdError(f"teacher {source}: gives {found} for [2, 3, {side}, {side}] floats, expected one tensor [2, D]")
    teacher = Teacher(module, nn.Identity(), name=name, shape=tuple(output.shape[1:]), pixels=pixels, source=source, **fields)
    return as_tokens(teacher, name=name) if tokens else teacher


def _is_target(output: torch.Tensor, kind: str) -> bool:
    """Whether rows of `output` can be targets of this kind; TargetSpec raises an error for an unknown kind."""
    try:
        KINDS[kind].check_shape(tuple(output.shape[1:]))
    except RequestError:
        return False
    except KeyError:
        return output.ndim == 2
    return True
