"""Opens the image source that a user names."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

from fkd_ssl.errors import FkdError, RequestError, did_you_mean
from fkd_ssl.images import named
from fkd_ssl.images.folder import Folder, scan
from fkd_ssl.images.names import is_line, refuse
from fkd_ssl.images.source import ImageSource
from fkd_ssl.own_code import call, load_function

SOURCES: dict[str, Callable[[str], ImageSource]] = dict.fromkeys(named.SPLITS, named.load)
"""Functions that open KIND:REST, by KIND."""


def open_images(spec: str | Path | ImageSource) -> ImageSource:
    """Opens a folder of images, a set KIND:REST with a KIND in `SOURCES`, or the source that the user's function returns.

    A folder of that name takes precedence. The function is written as `module:function` and called without arguments. An
    ImageSource is returned unchanged.

    Raises:
        RequestError: The source does not exist, or has names that a store cannot keep.
        FkdError: The function failed, or returned something else than an ImageSource.
    """
    if isinstance(spec, ImageSource):
        return spec
    spec = str(spec)
    kind, colon, rest = spec.partition(":")
    if not colon or Path(spec).exists():
        return scan(spec)
    if kind in SOURCES:
        source = SOURCES[kind](spec)
    elif rest.isidentifier() and kind.replace(".", "").isidentifier():
        source = call(load_function(spec, "images"), spec, "images")
        if not isinstance(source, ImageSource):
            raise FkdError(f"images {spec}: returned a {type(source).__name__}, expected a fkd_ssl.images.ImageSource")
    else:
        known = f"known: {', '.join(sorted(SOURCES))}"
        near = did_you_mean(kind, SOURCES)
        raise RequestError(f"{spec}: no such folder of images, and no kind of image set {kind!r} ({known}){near}")
    if not isinstance(source, Folder):  # the names of a folder are already checked
        _check_names(source)
    return source


def _check_names(source: ImageSource) -> None:
    """Raises RequestError if a store cannot keep the names and find them again."""
    names = list(source.names)
    refuse(source.spec, (name for name in names if not is_line(name)), "have control characters or line separators")
    refuse(source.spec, (n for n in names if n != unicodedata.normalize("NFC", n)), "are not in Unicode's NFC form")
    if twice := len(names) - len(set(names)):
        raise RequestError(f"{source.spec}: {twice:,} names are those of several images; give each its own")
