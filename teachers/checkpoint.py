"""Reading checkpoints: nothing in them is executed, and every key must fit."""

import errno
import hashlib
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fkd_ssl.errors import CheckpointError, RequestError


def read(path: str | Path) -> tuple[dict[str, Any], str]:
    """A checkpoint as a dict, and the sha256 of its file.

    Files of PyTorch are read with `weights_only`, which unpickles tensors and plain values and nothing else; a few harmless
    things that training scripts leave beside them become inert placeholders. safetensors hold tensors only.

    Raises:
        RequestError: There is no such file.
        CheckpointError: It is no checkpoint, or cannot be read without executing code.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: {'a folder, not a checkpoint' if path.is_dir() else 'no such checkpoint'}")
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if path.suffix == ".safetensors" or _is_safetensors(start, path.stat().st_size):
            return dict(load_file(path)), digest(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in _INERT]):
            # files of PyTorch before 1.6, such as MoCo's own, are no zip and cannot be mapped
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK"))
    except Exception as error:  # whatever a foreign file makes torch raise
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _DISK):
            raise  # not the file's fault
        if re.search("out of memory|can't allocate memory", str(error)):
            raise MemoryError(str(error)) from error
        lines = str(error).splitlines() or [type(error).__name__]
        refused = next((line.strip() for line in lines if "GLOBAL" in line), None)
        if refused is not None:
            raise CheckpointError(
                f"{path}: holds more than tensors and plain values ({refused}), and nothing in a checkpoint is executed: if "
                "you trust the file, load it yourself, save its state_dict alone and pass that"
            ) from error
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {_what_it_is(start)}") from error
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{path}: holds a {type(saved).__name__}, expected a dict of weights")
    return dict(saved), digest(path)


def weights_digest(network: nn.Module) -> str:
    """Hex sha256 of a network's parameters and buffers, names and values."""
    return tensors_digest(network.state_dict())


def tensors_digest(tensors: Mapping[str, Any]) -> str:
    """Hex sha256 of named tensors, names and values."""
    sums = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if not isinstance(value, Tensor):  # a module's extra state
            sums.update(f"{name} {value!r}".encode())
            continue
        sums.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        sums.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


def digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file: sha256, or the md5 whose first digits MoCo's authors publish."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def weights_of(saved: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, those of its `state_dict` if it has one.

    What DDP and torch.compile put before every name, `module.` and `_orig_mod.`, is taken off.
    """
    inner = saved.get("state_dict", saved)
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{where}: its state_dict is a {type(inner).__name__}")
    others = [str(key) for key, value in inner.items() if not isinstance(value, Tensor)]
    if others or not inner:
        what = f": {some(others)} hold something else" if others else ""
        nested = next((key for key, value in inner.items() if isinstance(value, Mapping) and len(value) > 1), None)
        what += f"; if its weights lie under {nested!r}, save those alone" if nested is not None else ""
        raise CheckpointError(f"{where}: holds no weights, expected a dict of tensors or one under state_dict{what}")
    tensors = {str(key): value for key, value in inner.items()}
    odd = [key for key, value in tensors.items() if value.layout is not torch.strided or value.is_meta]
    if odd:
        raise CheckpointError(f"{where}: {some(odd)} {'are' if len(odd) > 1 else 'is'} sparse or without values")
    while wrapper := next((name for name in ("module.", "_orig_mod.") if all(key.startswith(name) for key in tensors)), None):
        tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    return tensors


def part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def load_into(network: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Puts `weights` into `network`; every key must be there, no other, and of the right shape.

    Raises:
        CheckpointError: It names the first keys that are missing, extra or misshapen.
    """
    wanted = network.state_dict()  # on the meta device: shapes alone
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # absent from old checkpoints
    problems = {
        "missing": [key for key in wanted if key not in weights and key not in counters],
        "unexpected": [key for key in weights if key not in wanted],
        "misshapen": [
            f"{key} {_kind(weights[key])}, expected {_kind(wanted[key])}"
            for key in wanted
            if key in weights
            and (weights[key].shape != wanted[key].shape or weights[key].is_floating_point() != wanted[key].is_floating_point())
        ],
    }
    refuse_keys(problems, where)
    if any(value.is_meta for value in wanted.values()):  # a library's network holds buffers that no file has
        network.to_empty(device="cpu")
    network.load_state_dict({**{key: torch.zeros((), dtype=torch.int64) for key in counters}, **weights})


def refuse_keys(problems: Mapping[str, list[str]], where: str) -> None:
    """Raises CheckpointError if any of the lists of keys, by what is wrong with them, is not empty."""
    found = [f"{len(keys)} {what} ({some(keys)})" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{where}: its keys do not fit: {'; '.join(found)}")


def some(keys: list[str]) -> str:
    """The first of many keys."""
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def read_head(weights: Mapping[str, Tensor], feature_dim: int, where: str) -> tuple[nn.Module, int, str]:
    """A projection head of shapes alone that fits `weights`, its D, and what it is in words.

    Three are known: one Linear (MoCo v1); Linear, ReLU, Linear (MoCo v2; SwAV's published w5, which was trained without
    BatchNorm in its head); Linear, BatchNorm, ReLU, Linear (SwAV).

    Raises:
        CheckpointError: It is none of them.
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
            found = _kind(weights[key]) if key in weights else "missing"
            raise CheckpointError(f"{where}: its head's {key} is {found}, expected a matrix")
        sizes.append(weights[key].shape[0])
    words = "-".join(map(str, sizes))
    with torch.device("meta"):
        if layers == [""]:
            return nn.Linear(sizes[0], sizes[1]), sizes[1], f"linear {words}"
        norm = [nn.BatchNorm1d(sizes[1])] if "1" in layers else []
        mlp = nn.Sequential(nn.Linear(sizes[0], sizes[1]), *norm, nn.ReLU(inplace=True), nn.Linear(sizes[1], sizes[2]))
    return mlp, sizes[2], f"MLP {words}" + (" with BatchNorm" if norm else "")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _what_it_is(start: bytes) -> str:
    """What a file that is no checkpoint seems to be, from its first bytes; torch's own words advise to unpickle it."""
    if start.lstrip()[:1] == b"<":
        return "it is a web page, not the file: download it again"
    if start == b"version h":
        return "it is a pointer of Git LFS, not the file: git lfs pull brings it"
    return "no file of PyTorch's, or one that is cut off or damaged: download or copy it again"


def _is_safetensors(start: bytes, size: int) -> bool:
    return len(start) == 9 and start[8:] == b"{" and int(struct.unpack("<Q", start[:8])[0]) <= size


# of the disk or of its rights, and not of a file that is cut off
_DISK = (errno.EIO, errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOENT)


class _Inert:
    """Stands for objects that nobody needs; takes anything and does nothing.

    A real NumPy dtype or scalar would be rebuilt from bytes that the file controls.
    """

    def __new__(cls, *args: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# options, and the NumPy learning rates that SwAV's script leaves in its optimiser's state
_INERT = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)
