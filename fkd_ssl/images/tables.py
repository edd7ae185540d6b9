"""Images in Parquet files, and in data sets that Hugging Face's `datasets` saved to disk. Needs pyarrow."""

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

import numpy as np

from fkd_ssl.arrays import Int64Array
from fkd_ssl.errors import ImageAccessError, ImageError, RequestError, did_you_mean
from fkd_ssl.images.decoding import inaccessible
from fkd_ssl.images.names import Names, is_line, refuse
from fkd_ssl.images.patterns import classes_of, folder_of
from fkd_ssl.images.shards import LocalShard, Shard, prefetcher_of
from fkd_ssl.images.source import ImageSource
from fkd_ssl.text import first_line

OPTIONS = ("image", "label", "name")
"""Columns that can be chosen in a spec."""
_LABELS = ("label", "labels", "cls", "class")  # columns that hold the class, in order of precedence
_KEPT_BYTES = 2**28  # row groups that a process keeps in memory
_NUMBERED = re.compile(r"-?\d{5}-of-\d{5}$")  # how Hugging Face numbers the files of a split


class Table(ImageSource):
    """Images in Parquet or Arrow files, in the order of their names.

    The image column holds encoded images: binary, or `struct<bytes: binary, path: string>` as Hugging Face writes them. The
    name of an image is its value in the column `name`, by default its `path`; if that is null, it is `FILE/ROW`. Its class is
    its value in the label column: a class of a Hugging Face ClassLabel, a number, or text. Without a label column, the first
    folder of the name is the class.

    A Parquet file is read by row group, and an Arrow file by row. Reading a Parquet file in random order therefore reads a
    whole row group for each image.

    Args:
        spec: As in ImageSource.
        shards: The files (`.parquet` or `.arrow`), all with the same columns.
        columns: Names of the columns `image`, `label` and `name`, where they differ from the defaults.

    Raises:
        RequestError: pyarrow is missing, a file is damaged, a column is missing or ambiguous, or two images have the same name.
    """

    def __init__(self, spec: str, shards: Sequence[Shard], columns: dict[str, str] | None = None) -> None:
        columns = columns or {}
        for key in sorted(columns.keys() - set(OPTIONS)):
            raise RequestError(
                f"{spec}: unknown column option {key!r}{did_you_mean(key, OPTIONS)}; known: {', '.join(OPTIONS)}"
            )
        try:
            import pyarrow
        except ImportError as error:
            raise RequestError(f"{spec}: install pyarrow to read it (pip install pyarrow)") from error
        self.shards = list(shards)
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._readers: dict[int, _Reader] = {}
        self._process, self._lock = os.getpid(), threading.Lock()
        self._image = ""  # the column of images
        notes: list[str] = []
        parts = []
        for k, shard in enumerate(self.shards):
            try:
                parts.append(self._list(k, columns, notes))
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise RequestError(f"{shard.name}: not a readable table ({first_line(error)}); restore the file") from error
        refuse(
            spec,
            (name for part in parts for name in part[0] if not is_line(name)),
            "have control characters or line separators",
        )
        names = Names(name for part in parts for name in part[0])
        if not len(names):
            raise RequestError(f"{spec}: has no rows")
        order, repeated = names.order()
        refuse(
            spec,
            {names[k] for k in repeated.tolist()},
            "are used by several rows; choose another column of names with #name=COLUMN",
        )
        labels, classes = classes_of(([text.encode() for text in part[1]] for part in parts), parts[0][2])
        if not any(any(part[1]) for part in parts):
            labels, classes = classes_of([folder_of(names.lines)], parts[0][2])
        at = np.concatenate([part[3] for part in parts])
        if order is not None:
            names, labels, at = names.take(order), labels[order], at[order]
        super().__init__(spec, names, labels, classes)
        self.notes = sorted(set(notes))
        self._at = at
        self._stamps = [shard.stamp() for shard in self.shards]
        self._prefetcher, mixed = prefetcher_of(self.shards)
        self.mix_groups = self._groups_in_memory() or mixed

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image.

        Raises:
            ImageAccessError: The file cannot be read or has changed.
            ImageError: The row has no image, or its row group is damaged.
        """
        import pyarrow

        file, group, row = self._at[index].tolist()
        shard = self.shards[file]
        if shard.stamp() != self._stamps[file]:
            raise ImageAccessError(f"{shard.name}: the file changed while it was in use; run the command again")
        try:
            value = self._group(file, group)[row].as_py()
        except MemoryError:  # also an ArrowException
            raise
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise inaccessible(shard.name, error) from error
            raise ImageError(f"{self.where(index)}: its row group is damaged ({first_line(error)})") from error
        if isinstance(value, dict):
            value = value["bytes"]
        if value is None:
            raise ImageError(f"{self.where(index)}: the row has no image bytes (only a path, which is not opened)")
        return bytes(value)

    def stamp(self, index: int) -> tuple[str, float]:
        """Returns the stamp of the file, and the position in it."""
        file, group, row = self._at[index].tolist()
        stamp, changed = self._stamps[file]
        return f"{stamp} {group} {row}", changed

    def group(self, index: int) -> int:
        """Returns a number that identifies the image's row group."""
        file, group, _ = self._at[index].tolist()
        return int(file << 32 | group)

    def groups(self, indices: Int64Array) -> Int64Array:
        """Returns the numbers of the images' row groups: int64 [n]."""
        at = self._at[indices]
        found: Int64Array = at[:, 0] << 32 | at[:, 1]
        return found

    def expect(self, groups: Iterable[int]) -> None:
        """Begins to fetch the files of these groups, if they are remote."""
        self._prefetcher.expect(group >> 32 for group in groups)

    def where(self, index: int) -> str:
        """Returns the file and the image's name."""
        return f"{self.shards[self._at[index, 0]].name}: {self.names[index]}"

    def _groups_in_memory(self) -> int:
        """Returns the number of row groups that fit in memory, at least 1; 0 if the files are read by row."""
        sizes = [size for reader in self._readers.values() for size in reader.group_bytes()]
        return max(1, int(_KEPT_BYTES / np.mean(sizes))) if sizes else 0

    def _reader(self, file: int) -> "_Reader":
        """Opens a file; again in a forked process, since pyarrow's files cannot be shared. The caller holds the lock."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._readers.clear()
            self._groups.clear()
        if file not in self._readers:
            self._readers[file] = _open(self.shards[file])
        return self._readers[file]

    def _list(
        self, file: int, columns: dict[str, str], notes: list[str]
    ) -> "tuple[list[str], list[str], list[str] | None, Int64Array]":
        """Lists a file: names and classes of its images, all class names if it has them, and file, row group and row [n, 3]."""
        reader, path = self._reader(file), PurePosixPath(self.shards[file].name)
        image = _choose_image(reader.schema, columns.get("image"), path)
        if self._image not in ("", image):
            raise RequestError(f"{path}: its image column is {image!r}, and {self._image!r} in {self.shards[0].name}")
        self._image = image
        label = _choose_label(reader.schema, columns.get("label"), path, notes)
        if "name" in columns:
            names = reader.values(_text_column(reader.schema, columns["name"], path))
        else:
            names = reader.values(image, "path") if _is_nested(reader.schema, image) else [None] * sum(reader.sizes)
        reader.validate(image)
        classes = None if label is None else _class_names(reader.schema, label)
        texts = [""] * len(names) if label is None else [_text(value, classes, path) for value in reader.values(label)]
        at = [(file, group, row) for group, size in enumerate(reader.sizes) for row in range(size)]
        spelled = [f"{path.stem}/{row:08d}" if name is None else normalize("NFC", str(name)) for row, name in enumerate(names)]
        return spelled, texts, classes, np.array(at, dtype=np.int64).reshape(-1, 3)

    def _group(self, file: int, group: int) -> Any:
        """Returns the image column of a row group."""
        with self._lock:
            reader = self._reader(file)
            if (file, group) not in self._groups:
                self._groups[file, group] = reader.group(group, self._image)
            self._groups.move_to_end((file, group))
            while len(self._groups) > 1 and sum(array.nbytes for array in self._groups.values()) > _KEPT_BYTES:
                self._groups.popitem(last=False)
            return self._groups[file, group]


class _Parquet:
    """A Parquet file: `sizes` has the number of rows of each row group."""

    def __init__(self, path: str) -> None:
        import pyarrow.parquet

        self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        self.schema = self._file.schema_arrow
        self.sizes = [self._file.metadata.row_group(k).num_rows for k in range(self._file.metadata.num_row_groups)]

    def validate(self, column: str) -> None:
        """Does nothing, since pyarrow checks each value that it decodes."""

    def values(self, column: str, field: str | None = None) -> list[Any]:
        """Returns a column, or a field of a column of structs, as Python values."""
        array = self._file.read(columns=[f"{column}.{field}" if field else column], use_threads=False).column(0)
        return _values(array, field)

    def group_bytes(self) -> list[int]:
        """Returns the size of each row group in bytes."""
        return [self._file.metadata.row_group(k).total_byte_size for k in range(len(self.sizes))]

    def group(self, group: int, column: str) -> Any:
        """Returns a column of a row group."""
        return self._file.read_row_group(group, columns=[column], use_threads=False).column(0)


class _Arrow:
    """An Arrow file, mapped into memory: `sizes` has the number of rows of each record batch."""

    def __init__(self, path: str) -> None:
        import pyarrow.ipc

        source = pyarrow.memory_map(path)
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            source.seek(0)
            table = pyarrow.ipc.open_file(source).read_all()
        self._table, self._batches, self.schema = table, table.to_batches(), table.schema
        self.sizes = [batch.num_rows for batch in self._batches]

    def validate(self, column: str) -> None:
        """Checks the positions of a column's values. In a damaged file, pyarrow would otherwise read outside of it."""
        self._table.column(column).validate(full=True)

    def values(self, column: str, field: str | None = None) -> list[Any]:
        """Returns a column, or a field of a column of structs, as Python values."""
        self.validate(column)
        return _values(self._table.column(column), field)

    def group_bytes(self) -> list[int]:
        """Returns nothing, since rows are read by position."""
        return []

    def group(self, group: int, column: str) -> Any:
        """Returns a column of a record batch."""
        return self._batches[group].column(column)


_Reader = _Parquet | _Arrow


def _open(shard: Shard) -> _Reader:
    return (_Arrow if PurePosixPath(shard.name).suffix == ".arrow" else _Parquet)(str(shard.path()))


def _values(array: Any, field: str | None) -> list[Any]:
    import pyarrow.compute

    values: list[Any] = (pyarrow.compute.struct_field(array, field) if field else array).to_pylist()
    return values


def _choose_image(schema: Any, chosen: str | None, path: PurePosixPath) -> str:
    """Returns the name of the column of encoded images."""
    import pyarrow.types as kinds

    binary = [f.name for f in schema if kinds.is_binary(f.type) or kinds.is_large_binary(f.type) or _has_bytes(f.type)]
    if chosen is not None:
        if _existing(schema, chosen, path) not in binary:
            raise RequestError(f"{path}: column {chosen!r} is {schema.field(chosen).type}; expected encoded images as binary")
        return chosen
    if len(binary) != 1 or schema.names.count(binary[0]) > 1:
        found = f"several columns can hold images ({', '.join(binary)})" if binary else f"no column has images ({schema.names})"
        raise RequestError(f"{path}: {found}; choose one with #image=COLUMN")
    return str(binary[0])


def _choose_label(schema: Any, chosen: str | None, path: PurePosixPath, notes: list[str]) -> str | None:
    """Returns the name of the column of classes, or None if the table has no such column."""
    if chosen is not None:
        return _text_column(schema, chosen, path)
    for name in _LABELS:
        if name in schema.names:
            if _is_text(schema.field(_existing(schema, name, path)).type):
                return name
            notes.append(f"column {name!r} is {schema.field(name).type}, and classes are integers or text; it is ignored")
    return None


def _text_column(schema: Any, column: str, path: PurePosixPath) -> str:
    kind = schema.field(_existing(schema, column, path)).type
    if not _is_text(kind):
        raise RequestError(f"{path}: column {column!r} is {kind}; expected integers or text")
    return column


def _is_text(kind: Any) -> bool:
    """Whether values of this type are names, or numbers of classes."""
    import pyarrow.types as kinds

    kind = kind.value_type if kinds.is_dictionary(kind) else kind
    known = (kinds.is_integer, kinds.is_boolean, kinds.is_null, kinds.is_string, kinds.is_large_string, kinds.is_string_view)
    return any(is_kind(kind) for is_kind in known)


def _existing(schema: Any, column: str, path: PurePosixPath) -> str:
    if column not in schema.names:
        raise RequestError(
            f"{path}: no column {column!r}{did_you_mean(column, schema.names)}; it has {', '.join(schema.names)}"
        )
    if schema.names.count(column) > 1:
        raise RequestError(f"{path}: several columns are named {column!r}; rename them")
    return column


def _has_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds

    if not kinds.is_struct(kind):
        return False
    return any(f.name == "bytes" and (kinds.is_binary(f.type) or kinds.is_large_binary(f.type)) for f in kind.fields)


def _is_nested(schema: Any, image: str) -> bool:
    """Whether the image column is a struct with a path."""
    kind = schema.field(image).type
    return _has_bytes(kind) and any(f.name == "path" and _is_text(f.type) for f in kind.fields)


def _class_names(schema: Any, label: str) -> list[str] | None:
    """Returns the names of a Hugging Face ClassLabel column; None if the schema has none."""
    try:
        declared = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = declared["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _text(value: Any, classes: list[str] | None, path: PurePosixPath) -> str:
    """Returns the name or number of a class; empty for null and for negative numbers."""
    if value is None or (isinstance(value, int) and value < 0):
        return ""
    if classes is None or not isinstance(value, int):
        return str(value)
    if value >= len(classes):
        raise RequestError(f"{path}: class {value}, but only {len(classes)} classes have names")
    return classes[value]


def files_of(folder: Path) -> list[Shard]:
    """Returns the Parquet or Arrow files of a data set's folder, in the layout of a download or of `save_to_disk`.

    Raises:
        RequestError: The folder holds several splits; the message names them.
    """
    if (folder / "dataset_dict.json").exists():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise RequestError(
            f"{folder}: holds the splits {', '.join(splits)}; give one, such as {folder}/{(splits or ['train'])[0]}"
        )
    found = sorted(folder.glob("data-*.arrow")) if (folder / "state.json").exists() else []
    found = found or sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    splits = sorted({_NUMBERED.sub("", path.stem) for path in found})
    if len(splits) > 1:
        raise RequestError(f"{folder}: holds files of several splits; give one, such as {found[0].parent}/{splits[0]}*.parquet")
    return [LocalShard(path) for path in found]
