"""Students out of files: a checkpoint of a run, or what `fkd-ssl export` wrote."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fkd_ssl.errors import CheckpointError
from fkd_ssl.students.student import Student

STUDENT_KEY = "fkd_ssl_student"
"""Where a checkpoint of Lightning's, and an exported file's metadata, say what the student is."""
LAST_LAYER = "last_layer"
"""What an exported classifier's last layer is called in its file, in that metadata."""
EXPORTED = ".safetensors"


def load_student(path: str | Path) -> tuple[Student, int]:
    """The student of a file, in eval mode, and the side of the crops that it was trained on.

    Of a training with a moving average it is the average. An exported file has a classifier's last layer and no
    projection head: that of its student is untrained.

    Raises:
        CheckpointError: The file is no checkpoint of fkd-ssl train and no file of fkd-ssl export.
    """
    try:
        about, weights = _exported(path) if Path(path).suffix == EXPORTED else _checkpoint(path)
        dims = about["dim"] if isinstance(about["dim"], list) else [about["dim"]]
        options = {key: about[key] for key in ("head", "stem", "width") if key in about}
        student = Student(str(about["name"]), *map(int, dims), **options)
        if Path(path).suffix == EXPORTED:
            weights = {**{key: value for key, value in student.state_dict().items() if key.startswith("head.")}, **weights}
        student.load_state_dict(weights)
    except Exception as error:  # whatever a foreign file makes torch raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a checkpoint of fkd-ssl train ({reason})") from error
    return student.eval().to(memory_format=torch.channels_last), int(about["pixels"])


def _checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "average." if any(key.startswith("average.") for key in saved["state_dict"]) else "student."
    weights = {key.removeprefix(prefix): value for key, value in saved["state_dict"].items() if key.startswith(prefix)}
    return saved[STUDENT_KEY], weights


def _exported(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})[STUDENT_KEY])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    last = about.get(LAST_LAYER)
    head = {} if last is None else {f"head.0.{part}": weights.pop(f"{last}.{part}") for part in ("weight", "bias")}
    return {"dim": 1, **about}, {**{f"backbone.{key}": value for key, value in weights.items()}, **head}
