"""Makes ReLabel's label maps: what a classifier says at each place of every image, the k largest logits.

The teacher sees every image once, whole and squashed to a square. A crop's targets are then read off its image's map, without
the teacher: k x h x w x 4 bytes an image, for any number of crops. The network must end in global average pooling and one
linear layer, as ResNet does, which is checked. A killed run continues with the same command.
"""

from dataclasses import dataclass
from typing import Literal

from fkd_ssl.text import format_bytes, format_duration


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of label-maps."""

    images: str
    """Folder of images, NAME:SPLIT:ROOT (cifar10:train:/data), or module:function."""
    out: str
    """Folder of the maps; nothing in it is overwritten."""
    teacher: str
    """A classifier: torchvision/NAME@probabilities, timm/NAME@probabilities, or module:function of your own."""
    checkpoint: str | None = None
    """The teacher's weights; a library's teacher takes the word pretrained and downloads its own."""
    pixels: int | None = None
    """Side of the square that the teacher sees; its native size by default. A larger one gives more places."""
    k: int = 5
    """Logits kept at each place; the others count as 0."""
    batch_size: int = 64
    """Images in one forward of the teacher; fixed for a folder, since another gives other last bits."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the teacher's forward."""
    threads: int | None = None
    """Threads that read and resize while the teacher runs; the number of processors, at most 16, by default."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do about a damaged image: stop and name it, or make no map of it and count it."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Makes the maps and says what they hold."""
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
            images, config.out, dense, k=config.k, batch_size=config.batch_size,
            threads=min(16, resolve.cpu_threads()) if config.threads is None else config.threads,
            skip_unreadable=skipped is not None, log=console.say,
        )  # fmt: skip
        if skipped is not None:
            skipped.update(made.unreadable)
    classes = teacher.info.spec.size
    if made.busy:
        console.say(f"{len(made.busy)} shards are being written by another process; if that is stopped, run this again")
    else:
        LabelMaps(config.out).verify()
    if config.json:
        values = asdict(made)
        values["unreadable_images"] = len(values.pop("unreadable"))
        console.show_json({**values, "classes": classes, "k": config.k, "height": dense.height, "width": dense.width})
    elif not made.made and not made.busy:
        console.show(f"{config.out}: complete, and every file has its checksum; {format_bytes(made.bytes)}")
    else:
        console.show(
            f"{config.out}: {made.made:,} images in {format_duration(made.seconds)}, {config.k} of {classes:,} classes at "
            f"each of {dense.height} x {dense.width} places; {format_bytes(made.bytes)} on disk"
        )
    return 0
