"""Loading of students from files: a checkpoint of a run, or a file written by `fkd-ssl export`."""

import json
import reprlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fkd_ssl import checkpoints
from fkd_ssl.errors import CheckpointError
from fkd_ssl.options import OBJECT, Named
from fkd_ssl.students.student import Dim, Student
from fkd_ssl.targets import TargetSpec
from fkd_ssl.text import first_line

STUDENT_KEY = "fkd_ssl_student"
"""Key of the student's description in a Lightning checkpoint and in the metadata of an exported file."""
LAST_LAYER = "last_layer"
"""Key in that metadata of the name of an exported classifier's last layer."""
EXPORTED = ".safetensors"
_MAX_PIXELS = 4096


def load_student(path: str | Path, *, backbone: nn.Module | None = None) -> tuple[Student, int]:
    """Loads the student of a file, in eval mode; returns it and the side of the crops that it was trained on.

    If the training kept a moving average of the weights, the average is loaded. An exported file has a classifier's last layer
    but no projection head, so the head of its student is untrained.

    Args:
        path: The file.
        backbone: A module of the student's network; needed only if a module was given as student to fkd_ssl.train. It is not
            changed.

    Raises:
        CheckpointError: The file is not a checkpoint of fkd-ssl train nor a file of fkd-ssl export.
    """
    exported = Path(path).suffix == EXPORTED
    saved = checkpoints.load(path)
    try:
        description, weights = _exported(path, saved) if exported else _checkpoint(saved)
        dims = [_dim(dim) for dim in (description["dim"] if isinstance(description["dim"], list) else [description["dim"]])]
        pixels = description["pixels"]
        if type(pixels) is not int or not 1 <= pixels <= _MAX_PIXELS:
            raise ValueError(f"pixels {reprlib.repr(pixels)}")
        heads = {len(value) for key, value in weights.items() if key.startswith(("head.", "more_heads.")) and value.ndim}
        lengths = {dim[-1] if isinstance(dim, tuple) else dim for dim in dims}
        if not exported and (len(dims) > len(weights) or not heads >= lengths):  # before any memory is allocated
            raise ValueError(f"dim {reprlib.repr(dims)}, but no head has this dimension")
        options = {key: description[key] for key in ("head", "stem", "width") if key in description}
        name = str(description["name"])
        if backbone is not None:
            name = Named(name, backbone, pixels)
        elif name.startswith(OBJECT):
            raise ValueError(f"its network is the Python object {name.removeprefix(OBJECT)}: give it as backbone=")
        student = Student(name, *dims, **options)
        state = student.state_dict()
        if exported:
            weights = {**{key: value for key, value in state.items() if key.startswith("head.")}, **weights}
        versioned = OrderedDict(weights)
        versioned._metadata = state._metadata  # type: ignore[attr-defined]  # MNASNet's layers need their version
        student.load_state_dict(versioned)
    except Exception as error:  # torch may raise anything for an untrusted file
        what = "file of fkd-ssl export" if exported else "checkpoint of fkd-ssl train"
        reason = f"{first_line(error):.200}"
        reason = f"no {error} in it" if isinstance(error, KeyError) else reason
        raise CheckpointError(f"{path}: not a {what} ({reason})") from error
    return student.eval().to(memory_format=torch.channels_last), pixels


def _dim(saved: Any) -> Dim:
    """A saved size of targets: D, or [h, w, D] of tokens."""
    if isinstance(saved, list):
        return TargetSpec("tokens", tuple(saved)).shape
    return TargetSpec("embedding", (saved,)).size


def _checkpoint(saved: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    prefix = "average." if any(key.startswith("average.") for key in saved["state_dict"]) else "student."
    weights = {key.removeprefix(prefix): value for key, value in saved["state_dict"].items() if key.startswith(prefix)}
    return saved[STUDENT_KEY], weights


def _exported(path: str | Path, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    description = json.loads(checkpoints.metadata(path)[STUDENT_KEY])
    last, dim = description.get(LAST_LAYER), 1
    head = {} if last is None else {f"head.0.{part}": weights.pop(f"{last}.{part}") for part in ("weight", "bias")}
    if head:
        dim = len(head["head.0.bias"])  # not from the metadata, where a huge value would allocate too much memory
    return {**description, "dim": dim}, {**{f"backbone.{key}": value for key, value in weights.items()}, **head}
