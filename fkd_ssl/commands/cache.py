"""Makes a smaller copy of images, so that training on small crops does not read full-size images.

The copy keeps the names and formats, so precompute, train, knn and any other tool read it like the originals. It has a file for
each image, or tars (--tars). The config and results.json are in the folder OUT.cache next to it. To continue a killed run,
repeat the command.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from fkd_ssl.text import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from fkd_ssl.images import ImageSource


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of cache."""

    images: str
    """Images: a folder, tars, Parquet files, a list of files, or another source (docs/sources.md)."""
    out: str
    """Folder of the copy; nothing in it is overwritten."""
    short_side: int = 128
    """Short side of the copies in pixels; twice the side of the crops keeps most detail. Smaller images are not resized; 0
    copies every image unchanged."""
    tars: int | None = None
    """Number of tars (webdataset's layout) that the copies are written to, instead of a file for each."""
    quality: int = 95
    """Quality of JPEG and WebP files; colours are kept at full resolution."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do if an image is damaged: stop and name it, or leave it out and continue."""
    threads: int | None = None
    """Threads that read, shrink and write; by default one per processor, at most 16."""
    json: bool = False
    """Print one JSON object on standard output."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("threads", "json", "on_unreadable")
    PATHS: ClassVar[tuple[str, ...]] = ("images", "out")


def run(config: Config) -> int:
    """Makes the copy and reports its size."""
    from pathlib import Path

    from fkd_ssl import files, runs
    from fkd_ssl.commands import console
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.errors import RequestError
    from fkd_ssl.images.shrinking import check_apart

    images = images_of(config.images)
    check_apart(images.spec, Path(config.out))
    folder = Path(config.out) if Path(config.out).name not in ("", "..") else Path(config.out).resolve()
    run_folder = folder.with_name(f"{folder.name}.cache")  # next to the copy, which holds nothing but images
    with runs.open_run(run_folder, config, images.identity(sizes=False)) as (_, state):
        if state == "new" and folder.exists() and any(folder.iterdir()):
            raise RequestError(f"{folder}: exists and is not a copy made by fkd-ssl cache; choose another --out")
        if state == "done" and not folder.is_dir():
            raise RequestError(f"{folder}: was made and has been removed; delete {run_folder} to make it again")
        if state == "done":
            console.log(f"{folder}: this copy is done; {run_folder / runs.RESULTS} describes it")
        else:
            files.replace(run_folder / "begun", b"")  # from now on, open_run refuses other images
            _shrink(config, images, folder, run_folder)
    return 0


def _shrink(config: Config, images: "ImageSource", folder: "Path", run_folder: "Path") -> None:
    """Copies the images and reports the result."""
    from fkd_ssl import runs
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.images.shrinking import shrink_set

    copied = shrink_set(
        images,
        folder,
        short_side=config.short_side,
        quality=config.quality,
        tars=config.tars,
        skip_unreadable=config.on_unreadable == "skip",
        threads=min(16, resolve.cpu_threads()) if config.threads is None else config.threads,
        log=console.log,
    )
    results = {"images": len(images) - len(copied.unreadable), "config": config.__dict__, **copied.__dict__}
    runs.finish(run_folder, results)
    for path in copied.unreadable:
        console.log(f"warning: {path} cannot be read and is left out")
    if config.json:
        console.print_json(results)
    else:
        console.print_result(
            f"{folder}: {results['images']:,} images, {format_bytes(copied.bytes)} of {format_bytes(copied.source_bytes)}; use "
            f"it as --images"
        )
