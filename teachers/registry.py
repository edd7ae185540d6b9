"""Teachers by name: families, published presets, and one's own as module:function."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fkd_ssl.errors import CheckpointError, FkdError, RequestError, did_you_mean
from fkd_ssl.teachers import checkpoint as files
from fkd_ssl.teachers.moco import load_mocov2
from fkd_ssl.teachers.presets import PRESETS
from fkd_ssl.teachers.swav import load_swav
from fkd_ssl.teachers.teacher import Teacher

FAMILIES = {"mocov2": load_mocov2, "swav": load_swav}
Precision = Literal["fp32", "bf16", "fp16"]


def load_teacher(name: str, *, checkpoint: str | Path | None = None, precision: Precision = "fp32") -> Teacher:
    """A frozen teacher.

    Args:
        name: A family (`mocov2`, `swav`: the architecture is read off the checkpoint's shapes), a preset of `PRESETS`,
            or `module:function` of one's own. The function is called without arguments, or with `checkpoint=` if one is
            given; it returns a Teacher, or an nn.Module that maps ImageNet-normalised floats [B, 3, H, W] to [B, D].
        checkpoint: File of weights.
        precision: Arithmetic of the forward.

    Raises:
        RequestError: The name is unknown or needs a checkpoint.
        CheckpointError: The checkpoint is of another layout or network.
        FkdError: One's own function failed.
    """
    if ":" in name:
        return _own(name, checkpoint, precision)
    if name in PRESETS:
        return _preset(name, checkpoint, precision)
    if name not in FAMILIES:
        raise RequestError(
            f"teacher {name!r} is unknown{did_you_mean(name, [*FAMILIES, *PRESETS])} "
            f"(families {', '.join(FAMILIES)}; presets {', '.join(PRESETS)}; or "
            "module:function of your own)"
        )
    if checkpoint is None:
        raise RequestError(f"teacher {name}: --checkpoint is needed, a file in the layout of {name}")
    return FAMILIES[name](checkpoint, precision=precision)


def _preset(name: str, checkpoint: str | Path | None, precision: Precision) -> Teacher:
    preset = PRESETS[name]
    if checkpoint is None:
        raise RequestError(f"teacher {name}: download {preset.url} (licence: {preset.licence}) and pass it as --checkpoint")
    teacher = FAMILIES[preset.family](checkpoint, name=name, precision=precision, licence=preset.licence, source=preset.url)
    advice = f"pass --teacher {preset.family} for another checkpoint of this layout"
    if not teacher.network.startswith(f"{preset.network},") or teacher.dim != preset.dim:
        raise CheckpointError(
            f"{checkpoint}: holds a {teacher.network}; {name} is a {preset.network} with {preset.dim}-d targets; {advice}"
        )
    if preset.md5 is not None and not (md5 := files.digest(checkpoint, "md5")).startswith(preset.md5):
        raise CheckpointError(
            f"{checkpoint}: its md5 begins with {md5[: len(preset.md5)]}, that of {name} with {preset.md5}: another file, or "
            f"a damaged one; {advice}"
        )
    return teacher


def _own(name: str, checkpoint: str | Path | None, precision: Precision) -> Teacher:
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise RequestError(f"teacher {name}: {error} (the current folder is on the path)") from error
    except Exception as error:  # one's own code may raise anything
        raise FkdError(f"teacher {name}: its module failed: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        hint = did_you_mean(name, [f"{module_name}:{key}" for key, value in vars(module).items() if callable(value)])
        raise RequestError(f"teacher {name}: module {module_name!r} has no function {function_name!r}{hint}")
    given: dict[str, Any] = {}
    digest = None
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise RequestError(f"{checkpoint}: no such checkpoint")
        if "checkpoint" not in inspect.signature(function).parameters:
            raise RequestError(f"teacher {name}: takes no checkpoint=, and --checkpoint was given")
        given, digest = {"checkpoint": str(checkpoint)}, files.digest(checkpoint)
    try:
        made = function(**given)
    except FkdError:
        raise
    except Exception as error:  # one's own code may raise anything
        raise FkdError(f"teacher {name}: {type(error).__name__}: {error}") from error
    if isinstance(made, Teacher):
        made.precision = precision if precision != "fp32" else made.precision
        made.checkpoint_sha256 = made.checkpoint_sha256 or digest or files.weights_digest(made)
        return made
    if not isinstance(made, nn.Module):
        raise FkdError(f"teacher {name}: returned a {type(made).__name__}, expected a torch.nn.Module or a Teacher")
    digest = digest or files.weights_digest(made)  # so that a changed function is another teacher
    return _wrap(made, name, function_name, None if checkpoint is None else Path(checkpoint).name, digest, precision)


def _wrap(
    network: nn.Module, name: str, function: str, checkpoint: str | None, digest: str | None, precision: Precision
) -> Teacher:
    """A Teacher around a plain network: its output is both feature and embedding."""
    pixels = int(getattr(network, "pixels", 224))
    network.eval()
    try:
        with torch.inference_mode():
            output = network(torch.zeros(2, 3, pixels, pixels))
            dim = int(output.shape[1]) if isinstance(output, torch.Tensor) and output.ndim == 2 and len(output) == 2 else 0
    except Exception as error:  # one's own code may raise anything
        raise FkdError(
            f"teacher {name}: fails on [2, 3, {pixels}, {pixels}] floats: {type(error).__name__}: {error}; it must map "
            "them to [2, D]"
        ) from error
    if not dim:
        found = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise FkdError(f"teacher {name}: gives {found} for [2, 3, {pixels}, {pixels}] floats, expected one tensor [2, D]")
    return Teacher(
        network,
        nn.Identity(),
        name=function,
        dim=dim,
        feature_dim=dim,
        network=type(network).__name__,
        pixels=pixels,
        source=name,
        checkpoint=checkpoint,
        checkpoint_sha256=digest,
        precision=precision,
    )
