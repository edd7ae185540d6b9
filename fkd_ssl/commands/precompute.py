"""Runs a teacher once over C random crops of every image and stores its targets with the crops.

The store can then train any number of students. Started again with the same options, a killed run continues; several
processes can write one store at a time.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of precompute."""

    images: str
    """Folder of images; class folders are not needed."""
    store: str
    """Folder of the store; a store that is there gets another column, or is continued."""
    teacher: str
    """A family (mocov2, swav, lightly, transformers), a preset (fkd-ssl teachers lists them), torchvision/NAME or timm/NAME
    (with @LAYER for a layer's features), or module:function of your own."""
    checkpoint: str | None = None
    """The teacher's weights; a library's teacher takes the word pretrained and downloads its own, a preset needs none once
    it was fetched."""
    crops: int = 400
    """C, crops stored per image; more than the epochs that you train for are never read."""
    recipe: str = "mocov2"
    """What crops are drawn from: mocov2, s2bnn, swav or fkd."""
    min_scale: float | None = None
    """Least share of the image that a crop covers, if not the recipe's."""
    codec: str = "SQ8"
    """faiss codec of the targets: SQ8 (D bytes), SQ4 (D/2), OPQ16,PQ16x8 (16), SQfp16, Flat (exact), ..."""
    pixels: int | None = None
    """Side of the crops that the teacher sees; its native size by default."""
    seed: int = 0
    """Of the crops' draw."""
    limit: int | None = None
    """Only so many images, spread over all folders."""
    chunk_size: int = 128
    """Crops in one forward of the teacher; fixed for a column, since another gives other last bits."""
    name: str | None = None
    """Name of the column; the teacher's by default."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do about an image that cannot be read: stop and name it, or note it in the store and go on."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the teacher's forward."""
    threads: int | None = None
    """Threads that read and replay beside the teacher; the number of processors, at most 16, by default."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Precomputes and says what was written."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.images import scan
    from fkd_ssl.store.precompute import gigabytes, precompute

    images = scan(config.images)
    teacher = resolve.teacher_of(config.teacher, config.checkpoint, config.precision)
    summary = precompute(
        images,
        config.store,
        teacher,
        crops=config.crops,
        recipe=resolve.recipe_of(config.recipe, config.min_scale),
        codec=config.codec,
        pixels=resolve.pixels_of(config.pixels, teacher.pixels),
        seed=config.seed,
        limit=config.limit,
        chunk_size=config.chunk_size,
        name=config.name,
        skip_unreadable=config.on_unreadable == "skip",
        threads=min(16, resolve.cpu_threads()) if config.threads is None else config.threads,
        log=console.say,
    )
    if config.json:
        console.show_json(summary.__dict__)
    else:
        rate = summary.crops / summary.seconds
        done = (
            f"{summary.crops:,} crops in {summary.seconds:.0f} s ({rate:,.0f} a second)" if summary.crops else "nothing to do"
        )
        console.show(f"{config.store}: {done}; {gigabytes(summary.store_bytes)} on disk")
    if summary.busy:
        console.say(f"{len(summary.busy)} shards are being written by other processes; run it again when they end")
    return 0
