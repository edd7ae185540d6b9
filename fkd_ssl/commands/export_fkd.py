"""Writes a store's class probabilities as FKD label files, one per image, for the training code of FKD's authors.

The crops must consist of boxes and flips only (recipe fkd, or imported). To continue a killed run, repeat the command. Existing
files with other labels are not overwritten.
"""

from dataclasses import dataclass

POSITIONALS = ("store",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of export-fkd."""

    store: str
    """Folder or URL of the store."""
    out: str
    """Folder for the files, for instance labels/imagenet/train."""
    column: str | None = None
    """Column to export; needed only if the store has several."""
    fp16: bool = False
    """Write boxes and labels in half precision, like the authors' --use_fp16; boxes of large images shift by a pixel. The
    authors' training fails on such files, also on their own; import-fkd reads them."""


def run(config: Config) -> int:
    """Writes the files and reports the result."""
    from fkd_ssl.commands import console
    from fkd_ssl.store import open_store
    from fkd_ssl.store.exchange.fkd_store import export_fkd

    written = export_fkd(open_store(config.store).column(config.column), config.out, fp16=config.fp16)
    console.print_result(f"{config.out}: {written:,} label files written")
    return 0
