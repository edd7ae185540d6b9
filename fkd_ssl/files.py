"""Files that are never half written: canonical JSON that carries its own sha256, and exclusive publication.

Everything is written under a temporary name in the same folder, synced, and then given its final name in one step.
"""

import hashlib
import io
import json
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fkd_ssl.errors import StoreError

TEMPORARY = ".tmp-"
_MAX_JSON = 64 * 2**20
_MAX_HEADER = 4096
# NumPy parses a header as Python text, and Python 3.11's parser fails now and then where two threads do that at once
_ONE_AT_A_TIME = threading.Lock()


def sha256(data: bytes | memoryview) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces; raises StoreError where it is missing."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error


def canonical(value: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no spaces, ASCII, a final newline."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Publishes `value` with its own sha256 under the key `sha256`; see `publish`."""
    signed = {**value, "sha256": sha256(canonical(value))}
    with publish(path) as file:
        file.write(canonical(signed))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, without its `sha256`.

    Raises:
        StoreError: The file is missing, is no JSON object, or differs from what its sha256 says.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise StoreError(f"{path}: {path.stat().st_size} bytes; no such file of a store is over {_MAX_JSON}")
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path}: a JSON {type(value).__name__} where an object was expected")
    said = value.pop("sha256", None)
    try:
        found = sha256(canonical(value))
    except ValueError:
        found = "a value that is no JSON number"
    if said != found or canonical({**value, "sha256": said}) != data:
        raise StoreError(f"{path}: altered: its sha256 is {found}, it says {said}; restore the file or delete it")
    return value


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` when the block ends well, whole and synced, or not at all.

    A file that is already there stays: equal bytes are what the caller wanted, others are a StoreError. Two processes
    can publish the same bytes at once.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            if sha256_file(path) != sha256_file(temporary):
                raise StoreError(f"{path}: exists with other content; delete it or choose another place") from None
        except OSError as error:  # a file system without hard links
            if path.exists():
                if sha256_file(path) != sha256_file(temporary):
                    raise StoreError(f"{path}: exists with other content; delete it or choose another place") from error
            else:
                temporary.rename(path)
        sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def replace(path: Path, data: bytes) -> None:
    """Replaces a file that belongs to one process alone (progress, a report) in one step, synced."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def sweep(folder: Path) -> None:
    """Removes what killed processes left in `folder` under our temporary names more than an hour ago."""
    for path in folder.glob(f"{TEMPORARY}*-{'[0-9a-f]' * 12}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync_folder(folder: Path) -> None:
    """Makes names given in `folder` survive a power cut, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of a version 1.0 .npy file of a C-ordered array."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def write_npy(path: Path, array: npt.NDArray[Any]) -> str:
    """Publishes an array as .npy; returns the file's sha256."""
    data = npy_header(array.dtype, array.shape) + np.ascontiguousarray(array).tobytes()
    with publish(path) as file:
        file.write(data)
    return sha256(data)


def map_npy(path: Path, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """A read-only memory map of a .npy file.

    Args:
        path: The file.
        dtype: The dtype that it must have.
        shape: The shape that it must have; None stands for any length.

    Raises:
        StoreError: The file is missing, or its header or size is not that of such an array. Nothing is unpickled.
    """
    try:
        with path.open("rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("not version 1.0 of the format")
            with _ONE_AT_A_TIME:
                found, fortran, kind = np.lib.format.read_array_header_1_0(file, max_header_size=_MAX_HEADER)
            offset = file.tell()
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # NumPy's header reader raises many kinds of error on damaged text
        raise StoreError(f"{path}: no .npy header ({error}); the file is damaged") from error
    fits = len(found) == len(shape) and all(want in (None, n) and n >= 0 for want, n in zip(shape, found, strict=True))
    if kind != dtype or fortran or not fits:
        wanted = ["any" if n is None else n for n in shape]
        raise StoreError(f"{path}: holds {kind} {list(found)}, expected {dtype} {wanted}")
    expected = offset + math.prod(found) * dtype.itemsize
    if size != expected:
        raise StoreError(f"{path}: {size} bytes, expected {expected}: truncated, or still being written")
    if expected == offset:
        return np.zeros(found, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=found)
