"""Copies part of a store into a new store: the first k crops, some columns or some images.

The teacher is not needed, and the source is not changed. The copy appears when it is complete. To continue a killed run, repeat
the command. The crop records are identical to those of precompute --crops k; the codes are copied from the source.
"""

import unicodedata
from dataclasses import dataclass

POSITIONALS = ("store",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of subset."""

    store: str
    """Folder or URL of the store."""
    out: str
    """Folder of the new store."""
    crops: int | None = None
    """Number of crops of each image to copy, starting with the first. Default: all."""
    column: str | None = None
    """Copy only these columns, separated by commas. Default: all."""
    list: str | None = None
    """Copy only these images: a text file with one path per line, as in images.txt of the store."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Copies the part and reports its contents."""
    from fkd_ssl.commands import copying, results
    from fkd_ssl.errors import RequestError

    paths = None
    if config.list is not None:
        try:
            with open(config.list, encoding="utf-8") as file:  # noqa: PTH123
                # macOS may list names in another Unicode normal form than the store's
                paths = [unicodedata.normalize("NFC", line.rstrip("\n")) for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--list {config.list}: cannot be read: {error}") from error
    copied = copying.copy(config.store, config.out, crops=config.crops, column=config.column, paths=paths)
    results.show(copied, json=config.json)
    return 0
