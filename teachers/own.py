"""Your own teachers: module:function."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fkd_ssl import checkpoints
from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.own_code import call, load_function
from fkd_ssl.targets import Precision
from fkd_ssl.teachers import state_dicts
from fkd_ssl.teachers.teacher import Teacher
from fkd_ssl.teachers.wrap import wrap


def load_own(name: str, checkpoint: str | Path | None, precision: Precision) -> Teacher:
    """Calls `module:function` and makes its result a Teacher; the current folder is on the path.

    The function is called without arguments, or with `checkpoint=` if given. It returns a Teacher, or an nn.Module that maps
    ImageNet-normalised floats [B, 3, H, W] to [B, D]. The module can have the attributes `pixels`, its native size, and `kind`,
    which is `distribution` if the outputs are a classifier's logits.

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
            raise RequestError(f"teacher {name}: takes no checkpoint=, and --checkpoint was given")
        given, digest = {"checkpoint": str(checkpoint)}, checkpoints.digest(checkpoint)
    made = call(function, name, "teacher", **given)
    if isinstance(made, Teacher):
        known = made.info.checkpoint_sha256 or digest or _digest(made, name)
        made.info = replace(
            made.info, precision=precision if precision != "fp32" else made.info.precision, checkpoint_sha256=known
        )
        return made
    if not isinstance(made, nn.Module):
        raise FkdError(f"teacher {name}: returned a {type(made).__name__}, expected a torch.nn.Module or a Teacher")
    pixels = getattr(made, "pixels", 224)
    if not isinstance(pixels, int):
        raise FkdError(f"teacher {name}: its pixels are {pixels!r}, expected one whole number, the side of its input")
    teacher = wrap(
        made,
        name=name.partition(":")[2],
        network=type(made).__name__,
        pixels=pixels,
        source=name,
        checkpoint=None if checkpoint is None else Path(checkpoint).name,
        precision=precision,
        kind=getattr(made, "kind", "embedding"),
    )
    # the digest makes a changed function another teacher; after the first forward, which creates lazy layers
    teacher.info = replace(teacher.info, checkpoint_sha256=digest or _digest(made, name))
    return teacher


def _digest(network: nn.Module, name: str) -> str:
    try:
        return state_dicts.weights_digest(network)
    except Exception as error:  # weights that cannot be read: on the meta device, of a layout of their own
        raise FkdError(f"teacher {name}: its weights cannot be read: {type(error).__name__}: {error}") from error
