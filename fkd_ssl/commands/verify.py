"""Checks a store: the sha256 of every file, and every record.

--images also checks every image; --teacher also replays a sample of crops and embeds them again. The exit status is 1 if a
problem is found; the output then says what to do. --repair makes damaged and missing parts again and changes nothing else:
some crop records need no options, others need --images; codes and codecs need --images and --teacher.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fkd_ssl.results import Verified
    from fkd_ssl.store import Store
    from fkd_ssl.targets import Precision

POSITIONALS = ("store",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of verify."""

    store: str
    """Folder or URL of the store."""
    images: str | None = None
    """Images of the store, as given to precompute; each is compared with the image that the teacher saw."""
    teacher: str | None = None
    """Teacher of --column, to embed a sample of crops again."""
    checkpoint: str | None = None
    """Checkpoint of the teacher."""
    column: str | None = None
    """Column of the teacher; needed only if the store has several."""
    sample: int = 64
    """Number of crops to embed again."""
    repair: bool = False
    """Make damaged and missing parts again, if their --images and --teacher are given, then check again."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Lists the problems; returns 1 if there are any."""
    from fkd_ssl.commands import results

    verified = work(config)
    results.show(verified, json=config.json)
    return 1 if verified.problems else 0


def work(config: Config) -> "Verified":
    """Checks the store."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.errors import NotFoundError, RequestError
    from fkd_ssl.results import Verified
    from fkd_ssl.store import open_store
    from fkd_ssl.store.maintain.repair import repair, repair_lists
    from fkd_ssl.store.maintain.verify import verify
    from fkd_ssl.text import is_url, plural

    if config.sample < 1:
        raise RequestError(f"--sample {config.sample}: must be at least 1")
    if config.teacher and not config.images:
        raise RequestError("--teacher needs --images: crops are replayed from them")
    if config.repair and is_url(config.store):
        raise RequestError("--repair cannot change a store at a URL: copy it with fkd-ssl pull, and publish the copy")
    images = images_of(config.images) if config.images else None
    repaired: list[str] = []

    def note(line: str) -> None:
        repaired.append(line)
        console.log(line)

    if config.repair and images is not None:
        repair_lists(Path(config.store), images, note)
    store = open_store(config.store)
    name = config.column
    if name is not None and name not in store.column_names:
        raise NotFoundError(f"{store.folder}: no column {name!r}; there are {store.column_names or 'none yet'}")
    # precompute's default name of a column; the column of a run has another name, so that several columns need --column
    default = "-and-".join(re.split("[:/]", one)[-1].strip().replace("@", "-") for one in (config.teacher or "").split("+"))
    if name is None and default in store.column_names:
        name = default
    teacher = None
    if config.teacher:
        name = store.column().name if name is None and len(store.column_names) != 1 else name or store.column_names[0]
        precision, grid = _settings(store, name)
        teacher = resolve.teacher_of(config.teacher, config.checkpoint, precision, grid)
    threads = min(16, resolve.cpu_threads())
    report = verify(store, images, teacher, column=name, sample=config.sample, threads=threads)
    if config.repair and report.damage:
        repair(store, report.damage, images, teacher, column=name, threads=threads, log=note)
        report = verify(open_store(config.store), images, teacher, column=name, sample=config.sample, threads=threads)
    checked = ", ".join(f"{count:,} {what}" for what, count in report.checked.items() if count)
    cosine = (
        ""
        if report.cosine is None
        else (f"; cosine to the teacher {report.cosine['mean']:.5f} mean, {report.cosine['min']:.5f} min")
    )
    return Verified(
        line="\n".join([*report.problems, f"checked {checked}{cosine}: {plural(len(report.problems), 'problem')}"]),
        values={"store": config.store, "ok": not report.problems, **asdict(report), "repaired": repaired},
        problems=report.problems,
        repaired=repaired,
    )


def _settings(store: "Store", name: str) -> "tuple[Precision, int | None]":
    """The precision and the grid of a column's targets, even if its codec is damaged; None unless they are tokens."""
    from fkd_ssl import files
    from fkd_ssl.errors import FkdError
    from fkd_ssl.targets import TeacherInfo

    try:
        info = TeacherInfo.from_json(files.read_json(store.folder / "targets" / name / "meta.json")["teacher"])
    except (FkdError, KeyError, TypeError):
        return "fp32", None
    return info.precision, info.spec.shape[0] if info.spec.kind == "tokens" else None
