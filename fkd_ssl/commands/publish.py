"""Writes a store to S3, the Hugging Face Hub or any other URL, from which others train without the teacher.

All files are checked first. If it is interrupted, repeat the command: files that are already at the URL are not sent again.
The last file completes the store. A README.md in the form of a Hugging Face data set card describes the store and its use.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fkd_ssl.results import Published

POSITIONALS = ("store", "url")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of publish."""

    store: str
    """Folder of the store."""
    url: str
    """Destination: s3://BUCKET/NAME, gs://BUCKET/NAME, hf://datasets/USER/NAME, or a folder, such as that of a web server."""
    overwrite: bool = False
    """Replace another store at the URL, and a README.md that was not written by publish."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Publishes the store and reports what was sent."""
    from fkd_ssl.commands import results

    results.show(work(config), json=config.json)
    return 0


def work(config: Config) -> "Published":
    """Publishes the store."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.results import Published
    from fkd_ssl.store import open_store
    from fkd_ssl.store.exchange.upload import publish
    from fkd_ssl.text import format_bytes, plural

    store, threads = open_store(config.store), min(16, resolve.cpu_threads())
    done = publish(store, config.url, overwrite=config.overwrite, log=console.log, threads=threads)
    count, size = len(done.files.files), done.files.total
    return Published(
        line=f"{config.url}: {plural(count, 'file')}, {format_bytes(size)}; sent {done.sent}, {format_bytes(done.sent_bytes)}",
        values={"url": config.url, "files": count, "bytes": size, "sent_files": done.sent, "sent_bytes": done.sent_bytes},
        url=config.url,
        sent_bytes=done.sent_bytes,
    )
