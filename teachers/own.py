"""Your own teachers: module:function."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fkd_ssl import checkpoints
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.options import OBJECT, Named
from fkd_ssl.own_code import call, load_function
from fkd_ssl.targets import Precision
from fkd_ssl.teachers import state_dicts
from fkd_ssl.teachers.teacher import Teacher
from fkd_ssl.teachers.wrap import wrap


def load_own(name: str, checkpoint: str | Path | None, precision: Precision) -> Teacher:
    """Calls `module:function` and makes its result a Teacher; the current folder is on the path.

    The function is called without arguments, or with `checkpoint=` if given. It returns a Teacher, or an nn.Module that maps
    ImageNet-normalised floats [B, 3, H, W] to [B, D]. The module can have the attributes `pixels`, its native size, and `kind`,
    which is `distribution` if the outputs are a classifier's logits, and `tokens` for targets made of the module's feature map:
    its output [B, F, h, w], or the map that `fkd_ssl.maps.features_and_map` finds.

    Raises:
        RequestError: The module or function does not exist, or a checkpoint is given but not accepted.
        FkdError: The function failed, or returned something else.
    """
    function = load_function(name, "teacher")
    given: dict[str, Any] = {}
    digest = None
    parameters = inspect.signature(function).parameters
    takes = parameters.get("checkpoint") or next((p for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    if checkpoint is None and takes is not None and takes.name == "checkpoint" and takes.default is takes.empty:
        raise RequestError(f"teacher {name}: --checkpoint is needed: the function takes checkpoint=, without a default")
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise RequestError(f"{checkpoint}: not found")
        if takes is None:
            raise RequestError(f"teacher {name}: its function takes no checkpoint=; leave out --checkpoint")
        given, digest = {"checkpoint": str(checkpoint)}, checkpoints.digest(checkpoint)
    made = call(function, name, "teacher", **given)
    file = None if checkpoint is None else Path(checkpoint).name
    return as_teacher(made, name, name.partition(":")[2], precision=precision, checkpoint=file, digest=digest)


def of_object(named: Named, precision: Precision = "fp32") -> Teacher:
    """Makes a Teacher from an nn.Module, a Teacher or a function. A module is copied, so that the user's is not changed.

    A module is identified by its weights, a function by its output for noise.

    Raises:
        RequestError: The object is of another type.
        FkdError: The object cannot be copied, or does not return [B, D].
    """
    if not callable(named.value):
        raise RequestError(f"{named}: expected a torch.nn.Module or a function, got {type(named.value).__name__}")
    try:
        made = copy.deepcopy(named.value) if isinstance(named.value, nn.Module) else _Function(named.value)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise FkdError(f"{named}: cannot be copied: {type(error).__name__}: {error}") from error
    teacher = as_teacher(made, str(named), named.removeprefix(OBJECT), precision=precision, pixels=named.pixels)
    if isinstance(made, _Function):
        side = teacher.info.pixels
        noise = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        made.register_buffer("output", teacher.features(noise))
        teacher.info = replace(teacher.info, checkpoint_sha256=_digest(made, str(named)))
    return teacher


class _Function(nn.Module):
    """A function as a module; its weights, if any, are unknown."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if isinstance(getattr(function, "__self__", None), nn.Module):  # a method of the user's module, which is not changed
            function = copy.deepcopy(function)
            self.owner = function.__self__  # type: ignore[attr-defined]
        self.function = function
        self.pixels, self.kind = getattr(function, "pixels", 224), getattr(function, "kind", "embedding")

    def forward(self, images: Tensor) -> Tensor:
        """Calls the function."""
        return self.function(images)


def as_teacher(
    made: Any,
    name: str,
    column: str,
    *,
    precision: Precision = "fp32",
    pixels: int | None = None,
    checkpoint: str | None = None,
    digest: str | None = None,
) -> Teacher:
    """Makes a Teacher from the user's network.

    Args:
        made: A Teacher, or an nn.Module as for `load_own`.
        name: The user's name of the teacher, for messages.
        column: Default name of its column.
        precision: Precision of the forward pass.
        pixels: Native size of the network; by default its attribute `pixels`, or 224.
        checkpoint: Name of its checkpoint file.
        digest: sha256 of that file; by default the digest of the weights.

    Raises:
        FkdError: `made` is something else, or does not return [B, D].
    """
    if isinstance(made, Teacher):
        known = made.info.checkpoint_sha256 or digest or _digest(made, name)
        made.info = replace(
            made.info, precision=precision if precision != "fp32" else made.info.precision, checkpoint_sha256=known
        )
        return made
    if not isinstance(made, nn.Module):
        raise FkdError(f"teacher {name}: returned a {type(made).__name__}, expected a torch.nn.Module or a Teacher")
    pixels = getattr(made, "pixels", 224) if pixels is None else pixels
    if not isinstance(pixels, int):
        raise FkdError(f"teacher {name}: its pixels are {pixels!r}, expected one whole number, the side of its input")
    teacher = wrap(
        made,
        name=column,
        network=type(made).__name__,
        pixels=pixels,
        source=name,
        checkpoint=checkpoint,
        precision=precision,
        kind=getattr(made, "kind", "embedding"),
    )
    # a function that changed its weights then counts as another teacher; after wrap's forward pass, which creates lazy layers
    teacher.info = replace(teacher.info, checkpoint_sha256=digest or _digest(made, name))
    return teacher


def _digest(network: nn.Module, name: str) -> str:
    try:
        return state_dicts.weights_digest(network)
    except Exception as error:  # for instance, weights on the meta device
        raise FkdError(f"teacher {name}: its weights cannot be read: {type(error).__name__}: {error}") from error
