"""Reading checkpoints: nothing in them is executed, and every key must fit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fkd_ssl.errors import CheckpointError, RequestError


def read(path: str | Path) -> tuple[dict[str, Any], str]:
    """A checkpoint as a dict, and the sha256 of its file.

    Files of PyTorch are read with `weights_only`, which unpickles tensors and plain values and nothing else; safetensors
    hold tensors only.

    Raises:
        RequestError: There is no such file.
        CheckpointError: It is no checkpoint, or cannot be read without executing code.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such checkpoint")
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path)), digest(path)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever a foreign file makes torch raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({reason}); only tensors and plain values are read, never code: save "
            "its state_dict alone and pass that"
        ) from error
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{path}: holds a {type(saved).__name__}, expected a dict of weights")
    return dict(saved), digest(path)


def digest(path: str | Path) -> str:
    """Hex sha256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_of(saved: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, those of its `state_dict` if it has one, without DDP's `module.` before their names."""
    inner = saved.get("state_dict", saved)
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{where}: its state_dict is a {type(inner).__name__}")
    tensors = {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{where}: holds no weights")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def load_into(network: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Puts `weights` into `network`; every key must be there, no other, and of the right shape.

    Raises:
        CheckpointError: It names the first keys that are missing, extra or misshapen.
    """
    wanted = network.state_dict()
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # absent from old checkpoints
    problems = {
        "missing": [key for key in wanted if key not in weights and key not in counters],
        "unexpected": [key for key in weights if key not in wanted],
        "misshapen": [
            f"{key} {list(weights[key].shape)}, expected {list(wanted[key].shape)}"
            for key in wanted
            if key in weights and weights[key].shape != wanted[key].shape
        ],
    }
    found = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{where}: its keys do not fit: {'; '.join(found)}")
    network.load_state_dict({**{key: wanted[key] for key in counters}, **weights}, assign=False)


def mlp(shapes: list[tuple[int, int]], *, norm: bool = False) -> nn.Sequential:
    """Linear layers of (in, out) with ReLU between them, and BatchNorm before it if `norm`."""
    layers: list[nn.Module] = []
    for k, (inputs, outputs) in enumerate(shapes):
        if k:
            layers += [nn.BatchNorm1d(inputs)] if norm else []
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)
