"""Loads files of weights without executing anything in them, or using more memory than a file of that size needs."""

import errno
import hashlib
import io
import mmap
import re
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from fkd_ssl import pickles
from fkd_ssl.errors import CheckpointError, FkdError, RequestError

_MAX_HEADER = 2**23  # bytes of a safetensors header; a network of 1,000 tensors needs 100 kB
_MAX_STORAGES = 2**20
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9")  # the first bytes of a file from PyTorch before 1.6
_LEGACY_PICKLES = 5  # magic number, version, system, the object, and the keys of its storages
_LOADING = threading.Lock()  # all threads share torch's list of safe globals
# errors of the disk or of its permissions, which do not mean that the file is damaged
_DISK = (errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOENT)


def load(path: str | Path, *, mapped: bool = False, allowed: Mapping[str, Any] | None = None) -> Any:
    """Loads a file of torch.save or safetensors on the CPU.

    Files of torch.save are read with `weights_only`, which unpickles tensors and plain values. Objects of other types, such as
    the options and paths that training scripts save with the weights, are replaced by empty objects. A file of safetensors
    gives a dict of its tensors.

    Args:
        path: The file.
        mapped: Map the file into memory if its format allows it. Use this only for tensors that are copied at once: if the file
            is overwritten while it is mapped, the process is killed.
        allowed: Further functions and types that the pickle may call, by their names in the pickle.

    Raises:
        RequestError: The file is missing.
        CheckpointError: The file is not a checkpoint, needs code that is not executed, or needs more memory than its size.
        FkdError: There is not enough memory.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder, not a checkpoint" if path.is_dir() else "not a regular file" if path.exists() else "not found"
        raise RequestError(f"{path}: {found}")
    start, size = b"", path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(9)
            if path.suffix == ".safetensors" or _is_safetensors(start, size):
                return _load_safetensors(path, start)
            names = _scan_zip(file, allowed or {}) if start.startswith(b"PK") else _scan_legacy(file, allowed or {})
        taken = sum(names.storage_bytes.values())
        if taken > size or len(names.storage_bytes) > _MAX_STORAGES:
            raise pickles.UnsafePickleError(f"its tensors need {taken:,} bytes, but the file has {size:,}")
        safe: list[Any] = [(_stand_in(name, kind), name) for name, kind in names.stand_ins.items()]
        safe += [(value, name) for name, value in (allowed or {}).items()]
        with _LOADING, torch.serialization.safe_globals(safe):
            # only zip files can be mapped; PyTorch before 1.6 did not write zip files
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and start.startswith(b"PK"))
    except pickles.UnsafePickleError as error:
        raise CheckpointError(
            f"{path}: {error}. Only tensors and plain values are loaded, and nothing in a checkpoint is executed: if you trust "
            "the file, load it yourself, save its state_dict alone and pass that"
        ) from error
    except Exception as error:  # an unknown file can make torch raise any error
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        out_of_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if out_of_memory or re.search("out of memory|can't allocate memory", str(error)):
            raise FkdError(f"{path}: not enough memory to load its {size:,} bytes") from error
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {_describe(start)}") from error


def metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file that `load` has read."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def digest(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _load_safetensors(path: Path, start: bytes) -> dict[str, torch.Tensor]:
    header = int(struct.unpack("<Q", start[:8])[0])
    if header > _MAX_HEADER:
        raise pickles.UnsafePickleError(f"has a header of {header:,} bytes; the maximum is {_MAX_HEADER:,}")
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _scan_zip(file: BinaryIO, allowed: Mapping[str, Any]) -> pickles.Names:
    """Returns the names in a zip file of torch.save. Its entries must be unique, uncompressed and laid out as by torch."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 98))
    tail = file.read()
    # Two zip readers may find different lists of entries in one file, unless the file ends in exactly this way.
    end, locator = tail[-22:], tail[-42:-22]
    listed = int(struct.unpack("<L", end[16:20])[0])
    if end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
        raise ValueError("no end of a zip")
    if locator[:4] == b"PK\6\7":
        listed = int(struct.unpack("<Q", tail[-50:-42])[0])
        if tail[:4] != b"PK\6\6" or struct.unpack("<Q", locator[8:16])[0] != size - 98:
            raise ValueError("no end of a zip")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        spelled = {entry.filename.casefold() for entry in entries}
        if archive.start_dir != listed or len(spelled) != len(entries):
            raise ValueError("entries of one name, or in another place")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise pickles.UnsafePickleError("has compressed entries, which torch.save does not write")
        total = sum(entry.file_size for entry in entries)
        if total > size:
            raise pickles.UnsafePickleError(f"its entries have {total:,} bytes, but the file has {size:,}")
        folder = entries[0].filename.partition("/")[0]
        data = archive.read(f"{folder}/data.pkl")
    names = pickles.Names()
    pickles.scan(io.BytesIO(data), len(data), names, allowed)
    sizes = {entry.filename: entry.file_size for entry in entries}
    for key, taken in names.storage_bytes.items():  # torch would read past the end of a storage that is too short
        if sizes.get(f"{folder}/data/{key}", 0) < taken:
            raise pickles.UnsafePickleError(f"needs {taken:,} bytes of its entry data/{key}, which is shorter")
    return names


def _scan_legacy(file: BinaryIO, allowed: Mapping[str, Any]) -> pickles.Names:
    """Returns the names in a file of torch.save from before PyTorch 1.6: several pickles in sequence, then the storages."""
    file.seek(0)
    if file.read(len(_LEGACY)) != _LEGACY:
        raise ValueError("not a file of torch.save")
    names = pickles.Names()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:  # no read goes past the end of the file
        for _ in range(_LEGACY_PICKLES):
            pickles.scan(data, len(data), names, allowed)  # type: ignore[arg-type]
    return names


class _StandIn:
    """Replaces an object that is not needed: accepts any arguments and any state, and keeps nothing."""

    def __new__(cls, *args: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _stand_in(name: str, kind: str) -> Any:
    """Returns a type called `name`, of empty objects; if `kind` is dict or list, of plain OrderedDicts or lists."""
    members: dict[str, Any] = {"__module__": name.rpartition(".")[0]}
    if kind != "object":  # torch sets items only for these types
        content: type[Any] = list if kind == "list" else OrderedDict
        members["__new__"] = lambda cls, *args: content()
    return type(name.rpartition(".")[2], (_StandIn,), members)


def _describe(start: bytes) -> str:
    """Describes a file that cannot be loaded, by its first bytes. PyTorch's own message advises `weights_only=False`."""
    if start.lstrip()[:1] == b"<":
        return "it is a web page, not the file: download it again"
    if start == b"version h":
        return "it is a Git LFS pointer, not the file: run git lfs pull"
    return "not a file of torch.save, or truncated or damaged: download or copy it again"


def _is_safetensors(start: bytes, size: int) -> bool:
    return len(start) == 9 and start[8:] == b"{" and int(struct.unpack("<Q", start[:8])[0]) <= size
