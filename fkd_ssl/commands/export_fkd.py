"""Writes FKD's label files of a store's class probabilities, one an image, for its authors' training code.

The crops must be boxes and flips alone (recipe fkd, or imported). A killed run continues; files of other labels that are there
are not overwritten.
"""

from dataclasses import dataclass

POSITIONALS = ("store",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of export-fkd."""

    store: str
    """Folder of the store."""
    out: str
    """Folder of the files, for instance labels/imagenet/train."""
    name: str | None = None
    """The column, if there are several."""
    fp16: bool = False
    """Boxes and labels in half precision, as the authors' --use_fp16; boxes of large images then move by a pixel."""


def run(config: Config) -> int:
    """Exports."""
    from fkd_ssl.commands import console
    from fkd_ssl.store import open_store
    from fkd_ssl.store.exchange.fkd_store import export_fkd

    written = export_fkd(open_store(config.store).column(config.name), config.out, fp16=config.fp16)
    console.show(f"{config.out}: {written:,} label files written")
    return 0
