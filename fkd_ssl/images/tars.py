"""Images in tar files in webdataset's layout, read by their positions."""

import io
import json
import os
import re
import tarfile
import time
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast
from zipfile import BadZipFile

import numpy as np
from tqdm.auto import tqdm

from fkd_ssl import files
from fkd_ssl.arrays import Int64Array
from fkd_ssl.errors import ImageAccessError, RequestError, StoreError
from fkd_ssl.images.decoding import check_bytes, inaccessible
from fkd_ssl.images.folder import SUFFIXES
from fkd_ssl.images.names import Names, is_line, refuse
from fkd_ssl.images.patterns import classes_of, folder_of
from fkd_ssl.images.shards import Shard, prefetcher_of
from fkd_ssl.images.source import ImageSource
from fkd_ssl.progress import bar_disabled

_LABELS = ("cls", "json", "txt")  # the members that may hold an image's class, in order of precedence
_KEYS = ("label", "cls", "class")  # the keys of a .json member that may hold it
_MAX_LABEL = 200  # bytes; longer text is a caption, not a class
_MAX_JSON = 2**20
_MAX_HEADER = 2**20  # bytes of a member's long name or pax header
_MAX_INDEX = 2**31  # bytes of an index in the cache folder
_NUMBER = re.compile(r"-?\d+")
_SETTLED = 10  # seconds; the index of a file that changed more recently is not kept


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """The images of a tar file, in the order of the file."""

    names: Names
    """Paths of the members."""
    spans: Int64Array
    """Offset and size in bytes of each image [n, 2]."""
    labels: Names
    """Name or number of each image's class; empty if the file does not state it."""


class _Headers:
    """A file of which `tarfile` reads the headers. A damaged or hostile header cannot make it ask for much memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._file = file

    def read(self, size: int) -> bytes:
        """Returns the next bytes. Raises tarfile.ReadError if these are too many for a header."""
        if size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)


class Tars(ImageSource):
    """Images in uncompressed tar files, in the order of their names.

    Members `KEY.jpg` are images, for all suffixes of a folder of images. A member `KEY.cls`, `KEY.json` (its "label", "cls" or
    "class") or `KEY.txt` gives the class, as a number or a name. If no image has such a member, or if these are the numbers of
    the first folders of the members' paths, these folders are the classes, so that tars of a folder of images give the same set
    as the folder.

    The positions of a tar's members are read once and kept in the cache folder until the file changes.

    Args:
        spec: As in ImageSource.
        shards: The tar files.

    Raises:
        RequestError: A file is not a tar, is compressed or truncated, or two members have the same name.
    """

    def __init__(self, spec: str, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        indexes = []
        for shard in tqdm(self.shards, desc="index", unit="tar", disable=bar_disabled(show=len(self.shards) > 1)):
            indexes.append(index_of(shard))
        labels, classes = classes_of(index.labels.lines.split(b"\n")[:-1] for index in indexes)
        if all(name.isdecimal() for name in classes):
            numbered = classes_of(folder_of(index.names.lines) for index in indexes)
            if not classes or np.array_equal(labels, numbered[0]):  # the numbers are those of the folders
                labels, classes = numbered
            del numbered
        names = Names(b"".join(index.names.lines for index in indexes))
        if not len(names):
            raise RequestError(f"{spec}: no images in {'this tar' if len(self.shards) == 1 else 'these tars'}")
        self._shard = np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index.names) for index in indexes])
        self._spans = np.empty((len(names), 2), dtype=np.int64)
        end = len(names)
        while indexes:  # releases each when it is copied
            part = indexes.pop().spans
            self._spans[end - len(part) : end] = part
            end -= len(part)
        order, repeated = names.order()
        refuse(
            spec, (f"{names[k]} in {self.shards[self._shard[k]].name}" for k in repeated.tolist()), "are used by several images"
        )
        if order is not None:
            names, labels, self._shard, self._spans = names.take(order), labels[order], self._shard[order], self._spans[order]
        super().__init__(spec, names, labels, classes)
        self._stamps = [shard.stamp() for shard in self.shards]
        self._prefetcher, mixed = prefetcher_of(self.shards)
        self.mix_groups = mixed

    def read(self, index: int) -> bytes:
        """Returns the bytes of a member.

        Raises:
            ImageAccessError: The tar cannot be read or fetched, or has changed.
            ImageError: The member is too large for an image.
        """
        number, (offset, size) = int(self._shard[index]), self._spans[index].tolist()
        shard = self.shards[number]
        check_bytes(size, self.where(index))
        if shard.stamp() != self._stamps[number]:
            raise ImageAccessError(f"{shard.name}: the tar changed while it was in use; run the command again")
        with shard.open() as file:
            try:
                data = os.pread(file.fileno(), size, offset)
            except OSError as error:
                raise inaccessible(shard.name, error) from error
        if len(data) != size:
            raise ImageAccessError(f"{shard.name}: ends within {self.names[index]}; restore the file")
        return data

    def byte_size(self, index: int) -> int:
        """Returns the size of a member in bytes. Reads nothing."""
        return int(self._spans[index, 1])

    def stamp(self, index: int) -> tuple[str, float]:
        """Returns the stamp of the tar file and the position in it."""
        stamp, changed = self._stamps[self._shard[index]]
        return f"{stamp} {self._spans[index, 0]}", changed

    def group(self, index: int) -> int:
        """Returns the position of the image's tar file among all of them."""
        return int(self._shard[index])

    def groups(self, indices: Int64Array) -> Int64Array:
        """Returns the position of each image's tar file: int64 [n]."""
        return self._shard[indices].astype(np.int64)

    def where(self, index: int) -> str:
        """Returns the tar file and the member's name."""
        return f"{self.shards[self._shard[index]].name}: {self.names[index]}"

    def expect(self, groups: Iterable[int]) -> None:
        """Begins to fetch these tars, if they are remote."""
        self._prefetcher.expect(groups)


def index_of(shard: Shard) -> TarIndex:
    """Returns the positions of a tar's images, from the cache folder if the file has not changed.

    Raises:
        RequestError: As in `Tars`.
        ImageAccessError: The file cannot be read.
    """
    stamp, changed = shard.stamp()
    kept = index_file(stamp)
    if (found := _kept_index(kept)) is not None:
        return found
    index = _read_index(shard)
    if changed < time.time() - _SETTLED:
        with suppress(OSError):  # without a writable cache folder, the index is made again
            keep_index(kept, index)
    return index


def index_file(stamp: str) -> Path:
    """Returns the file in the cache folder that keeps the index of the tar with this stamp."""
    return files.cache_folder() / "tars" / f"{files.sha256(f'2 {stamp}'.encode())}.npz"


def keep_index(kept: Path, index: TarIndex) -> None:
    """Writes an index to the cache folder."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    text = {key: np.frombuffer(getattr(index, key).lines, dtype=np.uint8) for key in ("names", "labels")}
    np.savez(buffer, spans=index.spans, **text)  # type: ignore[arg-type]
    files.replace(kept, buffer.getbuffer())


def _kept_index(kept: Path) -> TarIndex | None:
    """Returns an index from the cache folder; None if it is missing or damaged."""
    with suppress(StoreError, OSError, ValueError, KeyError, EOFError, TypeError, NotImplementedError, BadZipFile):
        with np.load(io.BytesIO(files.read_regular(kept, _MAX_INDEX)), allow_pickle=False) as arrays:
            names, labels, spans = arrays["names"].tobytes(), arrays["labels"].tobytes(), arrays["spans"]
        names.decode(), labels.decode()
        index = TarIndex(names=Names(names), spans=spans, labels=Names(labels))
        if spans.shape == (len(index.names), 2) and spans.dtype == np.int64 and len(index.labels) == len(index.names):
            return index
    return None


def _read_index(shard: Shard) -> TarIndex:
    """Reads the headers of a tar, and the members that hold classes."""
    names, keys, spans, classes = [], [], [], {}
    path = shard.name
    with shard.open() as file:
        length = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all members in memory
                    if not member.isreg() or member.issparse():
                        continue
                    if member.offset_data + member.size > length:
                        raise RequestError(f"{path}: the tar ends within its member {member.name!r}; restore the file")
                    name = _normalised(member.name)
                    key, suffix = key_of(name)
                    if PurePosixPath(name).suffix.lower() in SUFFIXES and not PurePosixPath(name).name.startswith("."):
                        names.append(name)
                        keys.append(key)
                        spans.append((member.offset_data, member.size))
                    elif suffix in _LABELS and member.size <= _MAX_JSON:
                        data = os.pread(file.fileno(), member.size, member.offset_data)
                        classes[key, suffix] = _class_in(data, suffix, f"{path}: {member.name}")
                # tarfile treats a damaged or missing header after the first one as the end of the archive
                if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise RequestError(f"{path}: the tar is truncated or damaged at byte {tar.offset:,}; restore the file")
                file.seek(tar.offset)
                while piece := file.read(_MAX_HEADER):
                    if piece.strip(b"\0"):
                        raise RequestError(
                            f"{path}: data follow the end of the tar at byte {tar.offset:,}; if tars were joined with cat, "
                            "join them with tar --concatenate"
                        )
        except tarfile.ReadError as error:
            raise RequestError(f"{path}: {_problem(shard, str(error))}") from error
        except OSError as error:
            raise inaccessible(path, error) from error
    labels = [next((text for suffix in _LABELS if (text := classes.get((key, suffix)))), "") for key in keys]
    refuse(path, (name for name in names if not is_line(name)), "have control characters, line separators or invalid UTF-8")
    return TarIndex(names=Names(names), spans=np.array(spans, dtype=np.int64).reshape(-1, 2), labels=Names(labels))


def _problem(shard: Shard, message: str) -> str:
    """Describes why a tar cannot be read by position."""
    with shard.open() as file:
        start = file.read(6)
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "a compressed tar cannot be read by position; decompress it (JPEGs hardly get smaller by compression)"
    if "unexpected end" in message:
        return "the tar is truncated; restore the file"
    return f"not a readable tar ({message}); restore the file"


def _normalised(name: str) -> str:
    """Returns the name of a member in NFC, without a leading `./`."""
    while name.startswith("./"):
        name = name[2:]
    return unicodedata.normalize("NFC", name)


def key_of(name: str) -> tuple[str, str]:
    """Splits a name into the key of its sample and the suffix, at the first dot of the last part, as webdataset does."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return f"{folder}{slash}{key}", suffix


def _class_in(data: bytes, suffix: str, where: str) -> str:
    """Returns the class that a member states; empty if it states none."""
    try:
        text = data.decode().strip()
        if suffix == "json":
            values = json.loads(text)
            found = next((values[key] for key in _KEYS if key in values), None) if isinstance(values, dict) else values
            text = str(found) if isinstance(found, (str, int)) and not isinstance(found, bool) else ""
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not readable as the class of an image ({error})") from error
    if len(text) > _MAX_LABEL or not is_line(text):
        return ""
    if _NUMBER.fullmatch(text):
        return str(int(text)) if int(text) >= 0 else ""
    return text
