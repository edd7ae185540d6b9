"""Atomic writes and safe reads of files: canonical JSON that contains its own sha256, .npy arrays and user files.

Every file is written under a temporary name in the same folder, synced, and then renamed to its final name in one step.
Only regular files are read. Links in a store are not followed, since those of an untrusted store may point anywhere.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fkd_ssl.errors import RequestError, StoreAccessError, StoreError

TEMPORARY = ".tmp-"
CACHE_VARIABLE = "FKD_SSL_CACHE"
MAX_JSON = 8 * 2**20  # a shard's sidecar has 67 bytes per image; parsed JSON takes up to 30 times its size
MAX_HEADER = 4096
# NumPy parses a header as Python code, and the parser of Python 3.11 sometimes fails if two threads use it at once
_HEADER_LOCK = threading.Lock()


def sha256(data: bytes | memoryview) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def open_regular(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a file for reading.

    Raises:
        StoreError: The file is missing, or is a link, a pipe or a device.
        StoreAccessError: The file exists but cannot be opened.
    """
    try:
        with os.fdopen(open_descriptor(path), "rb") as file:
            yield file
    except OSError as error:
        raise access_error(path, error) from error


def access_error(path: Path, error: OSError) -> StoreError:
    """Returns the error for a file or folder of a store that cannot be opened: StoreError if it is missing, else access."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return StoreError(f"{path}: cannot be read: {error.strerror}")
    return StoreAccessError(f"{path}: cannot be read: {error.strerror}; check its permissions and its disk")


def exists(path: Path) -> bool:
    """Whether a file of a store or a link of that name exists. Raises StoreAccessError if its folder cannot be searched."""
    try:
        path.lstat()
    except OSError as error:
        if type(found := access_error(path, error)) is StoreAccessError:
            raise found from error
        return False
    return True


def names(folder: Path) -> set[str]:
    """Returns the names in a folder of a store; empty if it is missing. Raises StoreAccessError if it cannot be listed."""
    try:
        return set(os.listdir(folder))  # noqa: PTH208  (thousands of names)
    except OSError as error:
        if type(found := access_error(folder, error)) is StoreAccessError:
            raise found from error
        return set()


def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file; the caller closes the descriptor. Raises StoreError, or OSError if the file cannot be opened."""
    try:
        # without O_NONBLOCK, opening a pipe without a writer never returns
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # Linux and macOS; FreeBSD
            raise StoreError(
                f"{path}: a symbolic link, which is not followed inside a store; replace it with the file"
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(f"{path}: not a regular file; the store is damaged")
    return descriptor


def reject_symlink(path: Path) -> Path:
    """Returns `path`, which may be missing. Raises StoreError if it is a link, which may point out of the store."""
    if path.is_symlink():
        raise StoreError(f"{path}: a symbolic link, which is not followed inside a store; replace it with the folder")
    return path


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of a file. Raises StoreError as `open_regular` does, and if there are more than `max_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise StoreError(f"{path}: {size} bytes, and at most {max_bytes} are expected; the file is damaged")
        return file.read(size)


@contextmanager
def open_user_file(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a regular file outside a store for reading. Follows links. Raises RequestError if it cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not wait for a pipe's writer
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RequestError(f"{path}: not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_user_file(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of a file. Raises RequestError as `open_user_file` does, and if there are more than `max_bytes`."""
    with open_user_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise RequestError(f"{path}: {size:,} bytes, and at most {max_bytes:,} are expected; the file is damaged")
        return file.read(size)


def sha256_file(path: Path) -> str:
    """Returns the hex sha256 of a file, which is read in pieces. Raises StoreError as `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> bytes:
    """Encodes a JSON value in its canonical form: sorted keys, no spaces, ASCII, a final newline."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def with_checksum(value: dict[str, Any]) -> bytes:
    """Encodes `value` in canonical form, with its own sha256 under the key `sha256`."""
    return canonical({**value, "sha256": sha256(canonical(value))})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `with_checksum(value)` as a file; see `create`."""
    with create(path) as file:
        file.write(with_checksum(value))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file of `write_json`; returns its values without `sha256`.

    Raises:
        StoreError: The file is missing, is not a JSON object, or does not match its sha256.
    """
    data = read_regular(path, MAX_JSON)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: not JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path}: a JSON {type(value).__name__}, expected an object")
    said = value.pop("sha256", None)
    try:
        found = sha256(canonical(value))
        same = said == found and canonical({**value, "sha256": said}) == data
    except (ValueError, RecursionError):
        found, same = "undefined", False
    if not same:
        raise StoreError(f"{path}: altered: its sha256 is {found}, but it states {_short(said)}; restore the file or delete it")
    return value


def match_with_checksum(path: Path, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
    """Matches a file of `write_json` against a regular expression, which is faster than parsing thousands of files.

    Checks its sha256 as `read_json` does. The group `sha256` of `pattern` must match the value of that key.

    Returns:
        The match; None if the file does not match or its sha256 is wrong. `read_json` then raises the appropriate error.

    Raises:
        StoreError: The file cannot be read.
    """
    data = read_regular(path, MAX_JSON)
    match = pattern.fullmatch(data)
    if match is None:
        return None
    digest = hashlib.sha256(memoryview(data)[: match.start("sha256") - len('"sha256":"')])
    digest.update(memoryview(data)[match.end("sha256") + len('",') :])
    return match if digest.hexdigest().encode() == match["sha256"] else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 64 else f"{text[:61]}..."


@contextmanager
def annotate_oserror(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError that has none, such as that of a full or failing disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def check_folder_of(path: Path, option: str) -> None:
    """Raises RequestError if the folder of a file that will be written is missing."""
    if not path.parent.is_dir():
        raise RequestError(f"{path}: the folder {path.parent} was not found; make it, or choose another {option}")


@contextmanager
def _written(path: Path, finish: Callable[[Path], object]) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path`. If the block ends without an error, syncs it and calls `finish` with its path."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(6)}")
    try:
        with annotate_oserror(path), temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        finish(temporary)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def create(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears as `path`, complete and synced, if the block ends without an error.

    An existing file is kept; StoreError is raised if its bytes differ. Several processes can write the same bytes at once.
    """

    def finish(temporary: Path) -> None:
        try:
            os.link(temporary, path)
        except OSError:  # it exists, or the file system has no hard links
            if not path.exists() and not path.is_symlink():
                temporary.rename(path)
            elif not path.exists() or sha256_file(path) != sha256_file(temporary):
                raise StoreError(f"{path}: exists with other content; delete it or choose another place") from None
        sync_folder(path.parent)

    with _written(path, finish) as file:
        yield file


def replace(path: Path, data: bytes | memoryview) -> None:
    """Replaces a file in one step and syncs it, for files that only one process writes (progress, a report)."""
    with _written(path, lambda temporary: temporary.replace(path)) as file:
        file.write(data)


def cache_folder(given: str | Path | None = None) -> Path:
    """Returns the folder of downloads and digests: `given`, else $FKD_SSL_CACHE, else `fkd_ssl` in the user's cache folder."""
    chosen = given or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fkd_ssl"


def remove_leftovers(folder: Path, *, seconds: float = 3600) -> None:
    """Removes temporary files of killed processes from `folder` that are at least `seconds` old.

    Ages are measured by the file system's clock, since the machine's clock may differ from it by hours.
    """
    left = list(folder.glob(f"{TEMPORARY}*-{'[0-9a-f]' * 12}"))
    if not left:
        return
    clock = folder / f"{TEMPORARY}clock-{secrets.token_hex(6)}"
    with suppress(OSError):  # a folder without write permission is left unchanged
        try:
            clock.touch(exist_ok=False)
            now = clock.stat().st_mtime
        finally:
            clock.unlink(missing_ok=True)
        for path in left:
            with suppress(OSError):
                if now - path.lstat().st_mtime >= seconds:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def total_bytes(folder: Path) -> int:
    """Returns the total bytes of the files in a folder, without hidden files and files that are removed meanwhile."""
    total = 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            with suppress(OSError):
                if not name.startswith("."):
                    total += Path(place, name).stat().st_size
    return total


def sync_folder(folder: Path) -> None:
    """Syncs the names in `folder` to disk, if the system supports it, so that they survive a power failure."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Returns the header of a .npy file (version 1.0) for a C-ordered array."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def digest_array(digests: Sequence[str], path: Path) -> npt.NDArray[np.uint8]:
    """Converts hex sha256 digests to uint8 [n, 32], with zeros for empty strings. Raises StoreError if a digest is invalid."""
    try:
        if all(len(digest) in (0, 64) for digest in digests):
            values = bytes.fromhex("".join(digest or "0" * 64 for digest in digests))
            return np.frombuffer(values, dtype=np.uint8).reshape(len(digests), 32)
    except ValueError:
        pass
    raise StoreError(f"{path}: an image's checksum is not a sha256; the file is damaged")


def write_npy(path: Path, array: npt.NDArray[Any]) -> str:
    """Writes an array as a .npy file; returns the file's sha256."""
    data = npy_header(array.dtype, array.shape) + np.ascontiguousarray(array).tobytes()
    with create(path) as file:
        file.write(data)
    return sha256(data)


def write_npy_parts(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[npt.NDArray[Any]]) -> str:
    """Writes an array of this shape as a .npy file, given its parts along the first axis; returns the file's sha256."""
    header = npy_header(dtype, shape)
    digest, size = hashlib.sha256(header), len(header)
    with create(path) as file:
        file.write(header)
        for part in parts:
            data = np.ascontiguousarray(part, dtype=dtype).data.cast("B")
            digest.update(data)
            size += file.write(data)
        assert size == len(header) + math.prod(shape) * dtype.itemsize
    return digest.hexdigest()


def map_npy(path: Path, dtype: np.dtype[Any], shape: tuple[int | None, ...] | None) -> npt.NDArray[Any]:
    """Maps a .npy file into memory, read-only.

    Args:
        path: The file.
        dtype: The dtype that the array must have.
        shape: The shape that the array must have. None in it means any length; None for all of it means any shape.

    Raises:
        StoreError: The file is missing, or its header or size does not fit such an array. Nothing is unpickled.
    """
    with open_regular(path) as file:
        offset, found = npy_body(file, path, dtype, shape)
        if not math.prod(found):
            return np.zeros(found, dtype=dtype)
        return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=found)


def npy_body(
    file: BinaryIO, path: Path, dtype: np.dtype[Any], shape: tuple[int | None, ...] | None
) -> tuple[int, tuple[int, ...]]:
    """Returns the offset of the values in an open .npy file, and its shape; see `map_npy`. `path` is used in messages."""
    found, fortran, kind = _read_npy_header(file, path)
    offset = file.tell()
    lengths = (None,) * len(found) if shape is None else shape
    fits = len(found) == len(lengths) and all(want in (None, n) and n >= 0 for want, n in zip(lengths, found, strict=True))
    if kind != dtype or fortran or not fits:
        wanted = ["any" if n is None else n for n in lengths]
        raise StoreError(f"{path}: holds {_short(kind)} {_short(list(found))}, expected {dtype} {wanted}")
    size, expected = os.fstat(file.fileno()).st_size, offset + math.prod(found) * dtype.itemsize
    if size != expected:
        raise StoreError(f"{path}: {size} bytes, expected {expected}: truncated, or still being written")
    return offset, found


def map_user_npy(path: Path, *, kinds: str = "fiu") -> npt.NDArray[Any]:
    """Maps a user's .npy file of numbers into memory, read-only. It has one or two dimensions, in C or Fortran order.

    Args:
        path: The file, or a link to it.
        kinds: NumPy's letters for the kinds of dtype that are accepted: floats and integers by default.

    Raises:
        RequestError: The file is missing, is not a regular file, or is not a .npy file of numbers. Nothing is unpickled.
    """
    with open_user_file(path):
        try:
            with _HEADER_LOCK:
                array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r", max_header_size=MAX_HEADER)
        except Exception as error:  # NumPy's header reader raises many kinds of error on damaged text
            raise RequestError(f"{path}: not a .npy file of numbers ({_short(error)}); save it with numpy.save") from error
    if array.dtype.kind not in kinds or array.ndim > 2:
        found = f"{_short(array.dtype)} {_short(list(array.shape))}"
        raise RequestError(f"{path}: holds {found}, expected numbers in one or two dimensions")
    return array


def _read_npy_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads the header of an open .npy file: shape, whether in Fortran order, and dtype. Raises StoreError if it is damaged."""
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0 of the format")
        with _HEADER_LOCK:
            found: tuple[tuple[int, ...], bool, np.dtype[Any]] = np.lib.format.read_array_header_1_0(
                file, max_header_size=MAX_HEADER
            )
    except Exception as error:  # NumPy's header reader raises many kinds of error on damaged text
        raise StoreError(f"{path}: no .npy header ({_short(error)}); the file is damaged") from error
    return found
