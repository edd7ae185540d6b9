"""Converts a column of targets to another codec: into another column of the store, or with --out into a new store.

The teacher is not needed, and the source column is not changed. The new column appears when it is complete. To continue a
killed run, repeat the command. Information that the source codec discarded is lost: the recorded fidelity is measured against
the targets of the source column.
"""

from dataclasses import dataclass

POSITIONALS = ("store",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of recode."""

    store: str
    """Folder of the store; or its URL, with --out."""
    codec: str
    """Codec of the new column: SQ4, OPQ16,PQ16x8, ...; for class probabilities hard, marginal_smoothing_k5, ..."""
    column: str | None = None
    """Column to recode; needed only if the store has several. A,B averages the class probabilities of two teachers."""
    to: str | None = None
    """Name of the new column; by default the old name with the codec appended."""
    out: str | None = None
    """Folder of a new store with the same crops; the column keeps its name there."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Recodes the column and reports the loss of fidelity."""
    from fkd_ssl.commands import console
    from fkd_ssl.store import open_store
    from fkd_ssl.store.maintain.recode import recode
    from fkd_ssl.store.write.columns import describe_fidelity
    from fkd_ssl.training.groups import split

    store = open_store(config.store)
    sources = [store.column(name) for name in (split(config.column) or (None,))]
    names = [source.name for source in sources]
    column = recode(store, config.codec, column=names, to=config.to, out=config.out, log=console.log)
    f = column.meta.fidelity
    if config.json:
        sizes = {"source_code_size": sum(source.meta.code_size for source in sources), "code_size": column.meta.code_size}
        console.print_json({"store": str(column.store.folder), "column": column.name, **sizes, "fidelity": f})
        return 0
    codecs = " and ".join(f"{source.meta.codec} ({source.meta.code_size} bytes)" for source in sources)
    if any(source.meta.codec not in ("Flat", "full") for source in sources):
        console.log(f"note: information that {f['source_codec']} discarded cannot be recovered")
    console.print_result(
        f"{column.folder}: {' and '.join(names)} from {codecs} to {column.meta.codec} "
        f"({column.meta.code_size} bytes); {describe_fidelity(f)}, of {f['sample']}"
    )
    return 0
