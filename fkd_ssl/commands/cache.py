"""Makes a smaller copy of a folder of images, so that training on small crops reads no full-size picture.

The copy has the same paths and formats, only smaller: precompute, train, knn and any other tool take it as they take the
originals. The same options continue a killed run.
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
    """Folder of images, NAME:SPLIT:ROOT (cifar10:train:/data), or module:function."""
    out: str
    """Folder of the copy; nothing in it is overwritten."""
    short_side: int = 128
    """Of the copies, in pixels; twice the side of the crops keeps most detail. Smaller images are copied as they are."""
    quality: int = 95
    """Of JPEG and WebP files; colours are kept at full resolution."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do about a damaged image: stop and name it, or leave it out and go on."""
    threads: int | None = None
    """Threads that read, shrink and write; the number of processors, at most 16, by default."""
    json: bool = False
    """Print one JSON object on standard output."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("threads", "json", "on_unreadable")
    PATHS: ClassVar[tuple[str, ...]] = ("images", "out")


def run(config: Config) -> int:
    """Copies and says how large the copy is."""
    from pathlib import Path

    from fkd_ssl import runs
    from fkd_ssl.commands import console
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.images.shrinking import check_apart

    images = images_of(config.images)
    check_apart(images.spec, Path(config.out))
    with runs.open_run(config.out, config, images.identity(sizes=False)) as (folder, state):
        if state == "done":
            console.say(f"{folder}: this copy is done; results.json says what it holds")
        else:
            _shrink(config, images, folder)
    return 0


def _shrink(config: Config, images: "ImageSource", folder: "Path") -> None:
    """Copies the images and shows what was copied."""
    from fkd_ssl import runs
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.images.shrinking import shrink_set

    copied = shrink_set(
        images,
        folder,
        short_side=config.short_side,
        quality=config.quality,
        skip_unreadable=config.on_unreadable == "skip",
        threads=min(16, resolve.cpu_threads()) if config.threads is None else config.threads,
        log=console.say,
    )
    results = {"images": len(images) - len(copied.unreadable), "config": config.__dict__, **copied.__dict__}
    runs.finish(folder, results)
    for path in copied.unreadable:
        console.say(f"warning: {path} cannot be read and is left out")
    if config.json:
        console.show_json(results)
    else:
        console.show(
            f"{folder}: {results['images']:,} images, {format_bytes(copied.bytes)} of {format_bytes(copied.source_bytes)}; use "
            f"it as --images"
        )
