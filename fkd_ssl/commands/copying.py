"""What subset and pull share."""

from collections.abc import Sequence
from pathlib import Path

from fkd_ssl.results import Copied
from fkd_ssl.store import open_store
from fkd_ssl.store.maintain.subset import subset
from fkd_ssl.text import format_bytes


def copy(store: str, out: str, *, crops: int | None, column: str | None, paths: Sequence[str] | None) -> Copied:
    """Copies a part of a store; arguments and errors are those of `subset`, with `column` separated by commas."""
    columns = None if column is None else column.split(",")
    made = subset(open_store(store), out, crops=crops, column=columns, paths=paths)
    return Copied(
        line=f"{out}: {made.manifest.count:,} images x {made.crops_per_image} crops, targets of "
        f"{', '.join(made.column_names) or 'no column'}; {format_bytes(made.total_bytes)} on disk",
        values={
            "store": out,
            "images": made.manifest.count,
            "crops_per_image": made.crops_per_image,
            "columns": made.column_names,
            "store_bytes": made.total_bytes,
        },
        out=Path(out),
    )
