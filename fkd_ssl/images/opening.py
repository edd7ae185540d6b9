"""From what users write to an image source."""

from collections.abc import Callable
from pathlib import Path

from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.images import named
from fkd_ssl.images.folder import scan
from fkd_ssl.images.source import ImageSource

SOURCES: dict[str, Callable[[str], ImageSource]] = dict.fromkeys(named.SPLITS, named.load)
"""What opens a spec KIND:REST, by its KIND."""


def open_images(spec: str | Path | ImageSource) -> ImageSource:
    """A folder of images, or an image set KIND:REST whose KIND is in `SOURCES`; a source is returned as it is.

    A folder of that name comes first.

    Raises:
        RequestError: It does not exist, or its names cannot be those of images in a store.
    """
    if isinstance(spec, ImageSource):
        return spec
    kind, colon, _ = str(spec).partition(":")
    if not colon or Path(spec).exists():
        return scan(spec)
    if kind not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        raise RequestError(
            f"{spec}: no such folder of images, and no kind of image set {kind!r} (known: {known}){did_you_mean(kind, SOURCES)}"
        )
    return SOURCES[kind](str(spec))
