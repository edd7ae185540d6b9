"""Makes ReLabel's label maps: the k largest logits of a classifier at each position of every image.

The teacher sees every image once, resized to a square. Training then reads the targets of any number of crops from the maps,
without the teacher; a map takes k x h x w x 4 bytes per image. The network must end in global average pooling and one linear
layer, like ResNet; this is checked. To continue a killed run, repeat the command.
"""

from dataclasses import dataclass
from typing import Literal

from fkd_ssl.text import format_bytes, format_duration, plural


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of label-maps."""

    images: str
    """Images: a folder, tars, Parquet files, a list of files, or another source (docs/sources.md)."""
    out: str
    """Folder for the maps; nothing in it is overwritten."""
    teacher: str
    """A classifier: torchvision/NAME@probabilities, timm/NAME@probabilities, or module:function of your own."""
    checkpoint: str | None = None
    """Checkpoint of the teacher; `pretrained` downloads its library's weights."""
    pixels: int | None = None
    """Side of the square that the teacher sees; by default its native size. A larger side gives more positions."""
    k: int = 5
    """Number of logits kept at each position; the others count as 0."""
    batch_size: int = 64
    """Images per forward pass of the teacher. Fixed for a folder, since another size changes the last bits of the logits."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the teacher's forward pass."""
    threads: int | None = None
    """Threads that read and resize while the teacher runs; by default one per processor, at most 16."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do if an image is damaged: stop and name it, or leave it out and count it."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Makes the maps and reports their size and contents."""
    from dataclasses import asdict

    from fkd_ssl.commands import console, resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.relabel import LabelMaps, generate
    from fkd_ssl.teachers.dense import DenseTeacher

    images = images_of(config.images)
    teacher = resolve.teacher_of(config.teacher, config.checkpoint, config.precision)
    dense = DenseTeacher(teacher, pixels=resolve.pixels_of(config.pixels, teacher.info.pixels))
    with console.skipping(config.on_unreadable) as skipped:
        made = generate(
            images,
            config.out,
            dense,
            k=config.k,
            batch_size=config.batch_size,
            threads=min(16, resolve.cpu_threads()) if config.threads is None else config.threads,
            skip_unreadable=skipped is not None,
            log=console.log,
        )
        if skipped is not None:
            skipped.update(made.unreadable)
    classes = teacher.info.spec.size
    if made.busy:
        console.log(f"{plural(len(made.busy), 'shard')} left to another process; if it stops early, repeat the command")
    else:
        LabelMaps(config.out).verify()
    if config.json:
        values = asdict(made)
        values["unreadable_images"] = len(values.pop("unreadable"))
        console.print_json({**values, "classes": classes, "k": config.k, "height": dense.height, "width": dense.width})
    elif not made.made and not made.busy:
        console.print_result(f"{config.out}: complete, all checksums match; {format_bytes(made.bytes)}")
    else:
        console.print_result(
            f"{config.out}: {made.made:,} images in {format_duration(made.seconds)}, {config.k} of {classes:,} classes at "
            f"each of {dense.height} x {dense.width} positions; {format_bytes(made.bytes)} on disk"
        )
    return 0
