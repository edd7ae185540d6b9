"""Opens the image source that a user names."""

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from fkd_ssl import fetching
from fkd_ssl.errors import FkdError, RequestError, did_you_mean
from fkd_ssl.images import named
from fkd_ssl.images.folder import Folder, NoImagesError, scan
from fkd_ssl.images.listed import Listed
from fkd_ssl.images.names import has_bad_parts, is_line, is_plain, refuse
from fkd_ssl.images.shards import LocalShard, open_shards
from fkd_ssl.images.source import ImageSource
from fkd_ssl.images.tables import Table, files_of
from fkd_ssl.images.tars import Tars
from fkd_ssl.own_code import call, load_function
from fkd_ssl.text import is_url

SOURCES: dict[str, Callable[[str], ImageSource]] = dict.fromkeys(named.SPLITS, named.load)
"""Functions that open KIND:REST, by KIND."""
_LISTS = (".txt", ".tsv")
_TARS = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")  # `Tars` rejects the compressed ones, with advice
_TABLES = (".parquet", ".arrow")


def open_images(spec: str | Path | ImageSource) -> ImageSource:
    """Opens a set of images.

    Args:
        spec: One of

            - a folder of images, of tars, of Parquet files, or that Hugging Face's `datasets` saved to disk,
            - tars, Parquet or Arrow files: a path or a pattern such as `train-{0000..0146}.tar` or `data/train-*.parquet`; the
              columns of a table can follow as `#image=COLUMN,label=COLUMN,name=COLUMN`,
            - a text file (`.txt` or `.tsv`) with one path per line, see `Listed`,
            - KIND:REST with a KIND in `SOURCES`,
            - `module:function`, the user's function that returns an ImageSource, called without arguments,
            - an ImageSource, which is returned unchanged.

    Raises:
        RequestError: The source does not exist, is damaged, or has names that a store cannot keep.
        ImageAccessError: A file cannot be read.
        FkdError: The function failed, or did not return an ImageSource.
    """
    if isinstance(spec, ImageSource):
        return spec
    source = _open(str(spec))
    check_names(source)
    return source


def _open(spec: str) -> ImageSource:
    if not spec:
        raise RequestError("images: the name of the folder is empty; give . for the current folder")
    path, (kind, colon, rest) = Path(spec), spec.partition(":")
    if os.path.isdir(path):  # noqa: PTH112  (unlike Path, False for a name that is too long)
        return _open_folder(path)
    exists = os.path.exists(path)  # noqa: PTH110
    pattern, hash_, options = (spec, "", "") if exists else spec.partition("#")
    if is_url(pattern):
        fetching.check_url(pattern)
    suffix = Path(urlsplit(pattern).path if is_url(pattern) else pattern).suffix.lower()
    if is_url(pattern) and suffix not in (*_TARS, *_TABLES):
        raise RequestError(f"{spec}: a URL must name tars or Parquet files, such as {kind}://.../train-{{000..146}}.tar")
    if suffix in _LISTS:
        return Listed(path)
    if suffix in (*_TARS, *_TABLES) and (not colon or kind not in SOURCES):
        files = open_shards(pattern)
        if suffix in _TABLES:
            return Table(spec, files, _columns(spec, options))
        if hash_:
            raise RequestError(f"{spec}: tars have no columns; leave out #{options}")
        return Tars(spec, files)
    if not colon or exists:
        return scan(spec)
    if kind in SOURCES:
        return SOURCES[kind](spec)
    if rest.isidentifier() and kind.replace(".", "").isidentifier():
        source = call(load_function(spec, "images"), spec, "images")
        if not isinstance(source, ImageSource):
            raise FkdError(f"images {spec}: returned a {type(source).__name__}, expected a fkd_ssl.images.ImageSource")
        return source
    known = f"known: {', '.join(sorted(SOURCES))}"
    raise RequestError(
        f"{spec}: no such folder of images, and no kind of image set {kind!r} ({known}){did_you_mean(kind, SOURCES)}"
    )


def absolute(spec: str) -> str:
    """Returns a spec of `open_images` with an absolute path, for a process with another working folder."""
    is_path = os.path.exists(spec) or Path(spec.partition("#")[0]).suffix.lower() in (*_LISTS, *_TARS, *_TABLES)  # noqa: PTH110
    return str(Path(spec).absolute()) if is_path and not is_url(spec) and spec.partition(":")[0] not in SOURCES else spec


def _open_folder(folder: Path) -> ImageSource:
    """Opens a folder of images; if it has none, its tables or tars."""
    try:
        return scan(folder)
    except NoImagesError:
        if tables := files_of(folder):
            return Table(str(folder), tables)
        if tars := sorted(folder.glob("*.tar")):
            return Tars(str(folder), [LocalShard(tar) for tar in tars])
        raise


def _columns(spec: str, options: str) -> dict[str, str]:
    """Parses `image=A,label=B`, the part of a spec after #."""
    pairs = [part.partition("=") for part in options.split(",")] if options else []
    for key, _, column in pairs:
        if not (key and column):
            raise RequestError(f"{spec}: expected columns as #image=COLUMN,label=COLUMN, found {options!r}")
    return {key.strip(): column for key, _, column in pairs}


def check_names(source: ImageSource) -> None:
    """Raises RequestError if a store cannot hold the names, or find the images by them again, or a text file the classes."""
    if type(source) is Folder:  # checked while it was listed
        return
    names = source.names
    refuse(source.spec, (name for name in source.classes if not is_line(name)), "of classes have control characters")
    if not is_plain(names.lines):
        refuse(source.spec, (name for name in names if not is_line(name)), "have control characters or line separators")
        refuse(source.spec, (n for n in names if n != unicodedata.normalize("NFC", n)), "are not in Unicode's NFC form")
    if has_bad_parts(names.lines):
        wrong = (name for name in names if has_bad_parts(f"{name}\n".encode()))
        refuse(source.spec, wrong, "are absolute, or have an empty part or one that is '.' or '..'")
    if not isinstance(source, (Tars, Table)) and len(twice := names.order()[1]):  # these two have checked it
        raise RequestError(f"{source.spec}: {len(twice):,} names are used by several images; give each image its own name")
