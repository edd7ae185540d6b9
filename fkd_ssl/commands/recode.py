"""Writes a teacher's targets in another codec, from their codes: as another column of the store, or with --out as a store.

The teacher is not needed and the source is only read. The new column appears when it is whole; a killed run continues.
Information that the source codec discarded cannot be recovered: the fidelity that is recorded is measured against the source
column's targets.
"""

from dataclasses import dataclass

POSITIONALS = ("store",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of recode."""

    store: str
    """Folder of the store."""
    codec: str
    """Codec of the new column: SQ4, OPQ16,PQ16x8, ...; of class probabilities hard, marginal_smoothing_k5, ..."""
    name: str | None = None
    """The column to recode, if there are several; A,B is the mean of two teachers' class probabilities."""
    to: str | None = None
    """Name of the new column; the old one's with the codec's behind it by default."""
    out: str | None = None
    """A new store for it, with the same crops; the column keeps its name there."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Recodes and says what that costs."""
    from fkd_ssl.commands import console
    from fkd_ssl.store import open_store
    from fkd_ssl.store.maintain.recode import recode
    from fkd_ssl.store.write.columns import describe_fidelity
    from fkd_ssl.training.groups import split

    store = open_store(config.store)
    sources = [store.column(name) for name in (split(config.name) or (None,))]
    column = recode(store, config.codec, name=[source.name for source in sources], to=config.to, out=config.out)
    f = column.meta.fidelity
    if config.json:
        sizes = {"source_code_size": sum(source.meta.code_size for source in sources), "code_size": column.meta.code_size}
        console.show_json({"store": str(column.store.folder), "column": column.name, **sizes, "fidelity": f})
        return 0
    codecs = " and ".join(f"{source.meta.codec} ({source.meta.code_size} bytes)" for source in sources)
    if any(source.meta.codec not in ("Flat", "full") for source in sources):
        console.say(f"note: information that {f['source_codec']} discarded cannot be recovered")
    console.show(
        f"{column.folder}: {' and '.join(source.name for source in sources)} from {codecs} to {column.meta.codec} "
        f"({column.meta.code_size} bytes); {describe_fidelity(f)}, of {f['sample']}"
    )
    return 0
