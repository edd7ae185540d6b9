"""Copies a published store, or a part of it, into a folder: the first k crops, some columns or some images.

Every file is checked. To continue after an interruption, repeat the command. Only shards that contain a part of the copy are
fetched, each as a whole: fewer crops per image make a smaller copy, not fewer bytes on the network.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fkd_ssl.results import Copied

POSITIONALS = ("url",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of pull."""

    url: str
    """URL of the store, as given to publish, or its https:// address on a web server."""
    out: str
    """Folder of the new store."""
    crops: int | None = None
    """Number of crops of each image to copy, starting with the first. Default: all."""
    column: str | None = None
    """Copy only these columns, separated by commas. Default: all."""
    images: str | None = None
    """Copy only these images: a list (.txt) with one path per line as in images.txt, or a folder or other image set."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Copies the part and reports its contents."""
    from fkd_ssl.commands import results

    results.show(work(config), json=config.json)
    return 0


def work(config: Config) -> "Copied":
    """Copies the part."""
    from fkd_ssl.commands import copying
    from fkd_ssl.commands.images import images_of

    paths = None if config.images is None else list(images_of(config.images).names)
    return copying.copy(config.url, config.out, crops=config.crops, column=config.column, paths=paths)
