"""Checks a store: every file against its sha256, every record.

With --images every image; with --teacher a sample of
its targets, replayed and embedded again. Ends with status 1 where anything is wrong, and says what to do.
"""

import re
from dataclasses import dataclass

POSITIONALS = ("store",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of verify."""

    store: str
    """Folder of the store."""
    images: str | None = None
    """Folder of its images: each is compared with what the teacher saw."""
    teacher: str | None = None
    """The teacher of --name, to embed a sample of crops again."""
    checkpoint: str | None = None
    """Its weights."""
    name: str | None = None
    """The teacher's column, if there are several."""
    sample: int = 64
    """Crops to embed again."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Verifies and lists the problems."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.errors import RequestError
    from fkd_ssl.images import scan
    from fkd_ssl.store import open_store
    from fkd_ssl.store.verify import verify

    if config.sample < 1:
        raise RequestError(f"--sample {config.sample}: must be at least 1")
    if config.teacher and not config.images:
        raise RequestError("--teacher needs --images: crops are replayed from them")
    store = open_store(config.store)
    images = scan(config.images) if config.images else None
    teacher = None
    name = config.name
    usual = re.split("[:/]", config.teacher or "")[-1].replace("@", "-")  # what precompute names a column by default
    if name is None and usual in store.teachers:
        name = usual
    if config.teacher:
        teacher = resolve.teacher_of(config.teacher, config.checkpoint, store.column(name).meta.precision)
    report = verify(store, images, teacher, name=name, sample=config.sample)
    if config.json:
        console.show_json({"store": config.store, "ok": not report.problems, **report.__dict__})
    else:
        checked = ", ".join(f"{count:,} {what}" for what, count in report.checked.items() if count)
        cosine = "" if report.cosine is None else (
            f"; cosine to the teacher {report.cosine['mean']:.5f} mean, {report.cosine['min']:.5f} least"
        )  # fmt: skip
        console.show("\n".join([*report.problems, f"checked {checked}{cosine}: {len(report.problems)} problems"]))
    return 1 if report.problems else 0
