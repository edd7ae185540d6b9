"""Weights by name, as checkpoints contain them: finds them in a file, and loads them with a check of every key."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fkd_ssl import checkpoints
from fkd_ssl.errors import CheckpointError

# Keys under which training scripts save weights. Moving averages come first, as in timm.
_AVERAGES = ("state_dict_ema", "model_ema")
_PLACES = (*_AVERAGES, "state_dict", "model")
# prefixes that wrappers add to names: torch.compile, activation checkpointing, FSDP
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class StateDict(NamedTuple):
    """The weights of a file."""

    weights: dict[str, Tensor]
    """Tensors by name."""
    sha256: str
    """sha256 of the file."""
    average: str
    """Text about the moving average, for the description of the network; empty if the weights are not one."""


def read(path: str | Path) -> StateDict:
    """Reads the weights of a file: its `state_dict` if it has one, preferably the moving average.

    Raises:
        RequestError: The file is missing.
        CheckpointError: The file is not a checkpoint, has no weights, or cannot be read without executing code.
    """
    saved = checkpoints.load(path, mapped=True)
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{path}: holds a {type(saved).__name__}, expected a dict of weights: save its state_dict")
    place = _place(saved)
    average = f", moving average {place}" if place in _AVERAGES else ""
    return StateDict(find(saved, str(path)), checkpoints.digest(path), average)


def find(saved: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, without the prefixes that DDP, FSDP and torch.compile add to names."""
    inner = saved.get(_place(saved) or "state_dict", saved)
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{where}: its state_dict is a {type(inner).__name__}")
    others = [str(key) for key, value in inner.items() if not isinstance(value, Tensor)]
    if others or not inner:
        what = f": {some(others)} hold something else" if others else ""
        nested = next((key for key, value in inner.items() if isinstance(value, Mapping) and len(value) > 1), None)
        what += f"; if its weights are under {nested!r}, save those alone" if nested is not None else ""
        raise CheckpointError(f"{where}: holds no weights, expected a dict of tensors or one under state_dict{what}")
    tensors = unwrap({str(key): value for key, value in inner.items()}, where)
    odd = [key for key, value in tensors.items() if value.layout is not torch.strided or value.is_meta or value.is_nested]
    if odd:
        raise CheckpointError(f"{where}: {some(odd)} {'are' if len(odd) > 1 else 'is'} sparse, nested or without values")
    return tensors


def _place(saved: Mapping[str, Any]) -> str | None:
    """Returns the key of a training checkpoint that contains the weights, or None if no key does."""
    return next((name for name in _PLACES if isinstance(saved.get(name), Mapping) and saved[name]), None)


def unwrap(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns weights without the prefixes of wrappers. DDP's `module.` is removed only if all names have it."""
    found = dict(weights)
    for wrapper in _WRAPPERS:
        found = {key.replace(wrapper, ""): value for key, value in found.items()}
    if len(found) < len(weights):
        raise CheckpointError(f"{where}: has the same weight with and without a wrapper's prefix")
    counted = {key: value for key, value in found.items() if key != "n_averaged"}  # the counter of torch's AveragedModel
    while counted and all(key.startswith("module.") for key in counted):
        found = counted = part(counted, "module.")
    return found


def backbone(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the weights of a module's `backbone`, or `encoder` as in older solo-learn; empty if there is neither."""
    return unwrap(part(weights, "backbone.") or part(weights, "encoder."), where)


def weights_digest(network: nn.Module) -> str:
    """Returns the hex sha256 of the names and values of a network's parameters and buffers."""
    return tensors_digest(network.state_dict())


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """Returns the hex sha256 of names and values of tensors."""
    sums = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if not isinstance(value, Tensor):  # extra state of a module
            sums.update(f"{name} {value!r}".encode())
            continue
        sums.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        sums.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


def for_network(weights: dict[str, Tensor], network: nn.Module, where: str) -> dict[str, Tensor]:
    """Returns the weights under the network's names; if a module has the network as its `backbone`, those of this part."""
    own = network.state_dict().keys()
    return weights if own & weights.keys() else backbone(weights, where) or weights


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the weights whose names begin with `prefix`, without the prefix."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def load_into(network: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Loads `weights` into `network`. All keys and shapes must match.

    Raises:
        CheckpointError: A key is missing, unexpected or of the wrong shape; the message names the first ones.
    """
    wanted = network.state_dict()  # may be on the meta device, with shapes only
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # missing from old checkpoints
    problems = {
        "missing": [key for key in wanted if key not in weights and key not in counters],
        "unexpected": [key for key in weights if key not in wanted],
        "misshapen": [
            f"{key} {_describe(weights[key])}, expected {_describe(wanted[key])}"
            for key in wanted
            if key in weights
            and (weights[key].shape != wanted[key].shape or weights[key].is_floating_point() != wanted[key].is_floating_point())
        ],
    }
    shapes = [value.shape for value in weights.values()]  # those of a classifier may follow
    renamed = problems["missing"] and shapes[: len(wanted)] == [value.shape for value in wanted.values()]
    advice = "; all shapes fit in their order, so only the names may differ: docs/teachers.md shows how to rename them"
    refuse_keys(problems, where, advice if renamed else "")
    if any(value.is_meta for value in wanted.values()):  # networks of libraries have buffers that files lack
        network.to_empty(device="cpu")
    network.load_state_dict({**{key: torch.zeros((), dtype=torch.int64) for key in counters}, **weights})


def refuse_keys(problems: Mapping[str, list[str]], where: str, advice: str = "") -> None:
    """Raises CheckpointError, which ends with `advice`, unless all lists of keys, by problem, are empty."""
    found = [f"{len(keys)} {what} ({some(keys)})" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{where}: its keys do not fit: {'; '.join(found)}{advice}")


def some(keys: list[str]) -> str:
    """Returns the first of many keys, for messages."""
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def read_head(weights: Mapping[str, Tensor], feature_dim: int, where: str) -> tuple[nn.Module, int, str]:
    """Makes a projection head for `weights`, on the meta device; returns it, its D, and its description.

    Three heads are supported: one Linear (MoCo v1); Linear, ReLU, Linear (MoCo v2, and SwAV's published w5, which was trained
    without BatchNorm in its head); Linear, BatchNorm, ReLU, Linear (SwAV).

    Raises:
        CheckpointError: The weights are of another head.
    """
    layers = sorted({key.rpartition(".")[0] for key in weights})
    if layers not in ([""], ["0", "2"], ["0", "1", "3"]):
        raise CheckpointError(
            f"{where}: its head has keys {some(sorted(weights)) or 'none'}; expected one linear layer, layers 0 and 2, or "
            "layers 0, 1 (BatchNorm) and 3"
        )
    sizes = [feature_dim]
    for key in ("weight",) if layers == [""] else ("0.weight", f"{layers[-1]}.weight"):
        if key not in weights or weights[key].ndim != 2:
            found = _describe(weights[key]) if key in weights else "missing"
            raise CheckpointError(f"{where}: its head's {key} is {found}, expected a matrix")
        sizes.append(weights[key].shape[0])
    words = "-".join(map(str, sizes))
    with torch.device("meta"):
        if layers == [""]:
            return nn.Linear(sizes[0], sizes[1]), sizes[1], f"linear {words}"
        norm = [nn.BatchNorm1d(sizes[1])] if "1" in layers else []
        mlp = nn.Sequential(nn.Linear(sizes[0], sizes[1]), *norm, nn.ReLU(inplace=True), nn.Linear(sizes[1], sizes[2]))
    return mlp, sizes[2], f"MLP {words}" + (" with BatchNorm" if norm else "")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
