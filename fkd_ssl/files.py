"""Files that are never half written: canonical JSON that carries its own sha256, and exclusive publication.

Everything is written under a temporary name in the same folder, synced, and then given its final name in one step.
What is read must be a regular file. Links are not followed, since those of an untrusted store may lead anywhere.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fkd_ssl.errors import RequestError, StoreAccessError, StoreError

TEMPORARY = ".tmp-"
CACHE_VARIABLE = "FKD_SSL_CACHE"
MAX_JSON = 8 * 2**20  # a shard's sidecar has 67 bytes an image; parsed, JSON takes up to 30 times its size
MAX_HEADER = 4096
# NumPy parses a header as Python text, and Python 3.11's parser fails now and then where two threads do that at once
_ONE_AT_A_TIME = threading.Lock()


def sha256(data: bytes | memoryview) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


@contextmanager
def open_regular(path: Path) -> Iterator[io.BufferedReader]:
    """A file to read.

    Raises:
        StoreError: The file is missing, or is a link, a pipe or a device.
        StoreAccessError: The system does not let us read it.
    """
    try:
        with os.fdopen(open_descriptor(path), "rb") as file:
            yield file
    except OSError as error:
        raise access_error(path, error) from error


def access_error(path: Path, error: OSError) -> StoreError:
    """The error for a file or folder of a store that cannot be opened: only a missing one is known to be lost."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return StoreError(f"{path}: cannot be read: {error.strerror}")
    return StoreAccessError(f"{path}: cannot be read: {error.strerror}; check its permissions and its disk")


def exists(path: Path) -> bool:
    """Whether a file of a store is there, links included; raises StoreAccessError if its folder does not let us know."""
    try:
        path.lstat()
    except OSError as error:
        if type(found := access_error(path, error)) is StoreAccessError:
            raise found from error
        return False
    return True


def names(folder: Path) -> set[str]:
    """What a folder of a store holds, nothing if it is missing; raises StoreAccessError if it cannot be listed."""
    try:
        return set(os.listdir(folder))  # noqa: PTH208  (names, by the thousand)
    except OSError as error:
        if type(found := access_error(folder, error)) is StoreAccessError:
            raise found from error
        return set()


def open_descriptor(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file, which the caller closes. Raises StoreError, or OSError if the file cannot be opened."""
    try:
        # without O_NONBLOCK, opening a pipe without a writer never returns
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):  # Linux and macOS; FreeBSD
            raise StoreError(f"{path}: a symbolic link; links inside a store are not followed: put the file there") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(f"{path}: not a regular file; the store is damaged")
    return descriptor


def reject_symlink(path: Path) -> Path:
    """Returns `path`, which may be missing; raises StoreError if it is a link, which may lead out of the store."""
    if path.is_symlink():
        raise StoreError(f"{path}: a symbolic link; links inside a store are not followed: put the folder there")
    return path


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file; raises StoreError as `open_regular` does, or if there are more than `max_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise StoreError(f"{path}: {size} bytes, and at most {max_bytes} are expected; the file is damaged")
        return file.read(size)


@contextmanager
def open_user_file(path: Path) -> Iterator[io.BufferedReader]:
    """A regular file of the user's to read, outside a store: links are followed. Raises RequestError if it cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not wait for a writer
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RequestError(f"{path}: not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_user_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file; raises RequestError as `open_user_file` does, or if there are more than `max_bytes`."""
    with open_user_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise RequestError(f"{path}: {size:,} bytes, and at most {max_bytes:,} are expected; the file is damaged")
        return file.read(size)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces; raises StoreError as `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no spaces, ASCII, a final newline."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def with_checksum(value: dict[str, Any]) -> bytes:
    """`value` with its own sha256 under the key `sha256`, as it is spelled in a file."""
    return canonical({**value, "sha256": sha256(canonical(value))})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Publishes what `with_checksum` makes of `value`; see `publish`."""
    with publish(path) as file:
        file.write(with_checksum(value))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, without its `sha256`.

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
        raise StoreError(f"{path}: altered: its sha256 is {found}, it says {_short(said)}; restore the file or delete it")
    return value


def match_with_checksum(path: Path, pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
    """Matches a file of `write_json` against a regular expression, which is faster than parsing thousands of files.

    Its sha256 is checked as in `read_json`. The group `sha256` of `pattern` is the value of that key.

    Returns:
        The match; None if the file does not match or its sha256 is wrong: `read_json` says which.

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
    """Adds the name of the file to the OSError of a full or failing disk, which has none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def publish(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears as `path`, complete and synced, if the block ends without an error.

    An existing file is kept: if its bytes differ, a StoreError is raised. Two processes can publish the same bytes at once.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(6)}")
    try:
        with annotate_oserror(path), temporary.open("xb") as file:
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


def cache_folder(given: str | Path | None = None) -> Path:
    """The folder of downloads and digests: `given`, else FKD_SSL_CACHE of the environment, else `fkd_ssl` in the user's cache."""
    chosen = given or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fkd_ssl"


def replace(path: Path, data: bytes | memoryview) -> None:
    """Replaces a file that only one process writes (progress, a report) in one step, synced."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(6)}")
    try:
        with annotate_oserror(path), temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def remove_leftovers(folder: Path, *, seconds: float = 3600) -> None:
    """Removes temporary files that killed processes left in `folder` at least `seconds` ago.

    Ages are measured by the file system's own clock: a machine's clock may be hours off.
    """
    left = list(folder.glob(f"{TEMPORARY}*-{'[0-9a-f]' * 12}"))
    if not left:
        return
    clock = folder / f"{TEMPORARY}clock-{secrets.token_hex(6)}"
    with suppress(OSError):  # a folder that cannot be written to is left as it is
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
    """Bytes of the files in a folder, without hidden ones and those that another process removes at the same time."""
    total = 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            with suppress(OSError):
                if not name.startswith("."):
                    total += Path(place, name).stat().st_size
    return total


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


def digest_array(digests: Sequence[str], path: Path) -> npt.NDArray[np.uint8]:
    """Hex sha256 as uint8 [n, 32], zeros for empty ones; raises StoreError, naming the file `path`, if one is not a sha256."""
    try:
        if all(len(digest) in (0, 64) for digest in digests):
            values = bytes.fromhex("".join(digest or "0" * 64 for digest in digests))
            return np.frombuffer(values, dtype=np.uint8).reshape(len(digests), 32)
    except ValueError:
        pass
    raise StoreError(f"{path}: an image's checksum is not a sha256; the file is damaged")


def write_npy(path: Path, array: npt.NDArray[Any]) -> str:
    """Publishes an array as .npy; returns the file's sha256."""
    data = npy_header(array.dtype, array.shape) + np.ascontiguousarray(array).tobytes()
    with publish(path) as file:
        file.write(data)
    return sha256(data)


def map_npy(path: Path, dtype: np.dtype[Any], shape: tuple[int | None, ...] | None) -> npt.NDArray[Any]:
    """A read-only memory map of a .npy file.

    Args:
        path: The file.
        dtype: The dtype that it must have.
        shape: The shape that it must have; None means any length, or any shape.

    Raises:
        StoreError: The file is missing, or its header or size is not that of such an array. Nothing is unpickled.
    """
    with open_regular(path) as file:
        offset, found = npy_body(file, path, dtype, shape)
        if not math.prod(found):
            return np.zeros(found, dtype=dtype)
        return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=found)


def npy_body(
    file: BinaryIO, path: Path, dtype: np.dtype[Any], shape: tuple[int | None, ...] | None
) -> tuple[int, tuple[int, ...]]:
    """Where the values of an open .npy file begin, and its shape; see `map_npy`. `path` is for messages."""
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
    """A read-only memory map of a .npy file of numbers from elsewhere, of one or two dimensions, in any order.

    Args:
        path: The file.
        kinds: NumPy's letters for the kinds of dtype that are accepted: floats and integers by default.

    The path is the user's own, so links are followed.

    Raises:
        RequestError: It is missing, is not a regular file, or is not a .npy file of numbers. Nothing is unpickled.
    """
    with open_user_file(path) as file:
        try:
            shape, fortran, dtype = _read_npy_header(file, path, ((1, 0), (2, 0)))
        except StoreError as error:
            raise RequestError(f"{path}: not a .npy file of numbers; save it with numpy.save") from error
        if dtype.kind not in kinds:
            raise RequestError(f"{path}: holds {_short(dtype)}, expected numbers")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise RequestError(f"{path}: not a .npy file of numbers: its shape is {_short(list(shape))}")
        if len(shape) > 2:
            raise RequestError(f"{path}: has {len(shape)} dimensions, expected one or two")
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
        if size < offset + math.prod(shape) * dtype.itemsize:
            raise RequestError(f"{path}: {size} bytes, too short for {_short(dtype)} {_short(list(shape))}")
        if not math.prod(shape):
            return np.zeros(shape, dtype=dtype)
        return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")


def _read_npy_header(
    file: BinaryIO, path: Path, versions: Sequence[tuple[int, int]] = ((1, 0),)
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype, as the header of an open .npy file says; `path` is for messages.

    Raises:
        StoreError: The header is missing, or of another version of the format.
    """
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(file)
        if version not in versions:
            raise ValueError(f"not version {' or '.join(f'{major}.{minor}' for major, minor in versions)} of the format")
        with _ONE_AT_A_TIME:
            found: tuple[tuple[int, ...], bool, np.dtype[Any]] = read[version](file, max_header_size=MAX_HEADER)
    except Exception as error:  # NumPy's header reader raises many kinds of error on damaged text
        raise StoreError(f"{path}: no .npy header ({_short(error)}); the file is damaged") from error
    return found
