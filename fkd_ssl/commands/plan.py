"""Estimates the size of a store for each codec and checks the free disk space; writes nothing.

The time depends on the teacher and the machine. To measure it, run precompute with --limit 500 into a separate store, which
prints crops per second, and pass them as --crops_per_second.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fkd_ssl.text import format_bytes

if TYPE_CHECKING:
    from fkd_ssl.targets import TargetSpec
    from fkd_ssl.teachers import Teacher

_NAME_BYTES = 20  # of a name, if the names are unknown
CODECS = ("Flat", "SQfp16", "SQ8", "SQ6", "SQ4", "OPQ32,PQ32x8", "OPQ16,PQ16x8")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of plan."""

    images: str | None = None
    """Images: a folder, tars, Parquet files, a list of files, or another source (docs/sources.md)."""
    count: int | None = None
    """Number of images, instead of --images, for instance if they are not on this machine."""
    teacher: str
    """A teacher of precompute: a family (mocov2, swav, lightly, transformers), a preset (fkd-ssl teachers lists them),
    torchvision/NAME, timm/NAME, run, or module:function of your own; NAME@tokens for a grid of its feature map."""
    checkpoint: str | None = None
    """Checkpoint of the teacher."""
    crops: int = 400
    """C, crops stored per image."""
    codec: str | None = None
    """Codec that the disk is checked for; by default the default of precompute. The table also shows other codecs."""
    grid: int | None = None
    """Number of tokens along each side of the crop, for a teacher NAME@tokens; by default 7."""
    limit: int | None = None
    """Maximum number of images."""
    crops_per_second: float | None = None
    """Crops per second of one precompute process, as it prints them, to estimate the hours."""
    price: float | None = None
    """Price of an hour of that process, in any currency, to estimate the cost."""
    store: str = "."
    """Planned folder of the store, to check the free space on its disk."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Prints the plan."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.crops import CROP_DTYPE
    from fkd_ssl.errors import RequestError
    from fkd_ssl.store.manifest import limit_images

    if config.crops <= 0:
        raise RequestError(f"--crops {config.crops}: must be positive")
    for name in ("count", "crops_per_second", "price"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise RequestError(f"--{name} {value}: must be positive")
    if (config.images is None) == (config.count is None):
        raise RequestError("expected --images, or --count instead")
    if config.limit is not None and config.limit < 1:
        raise RequestError(f"--limit {config.limit}: at least one image is needed")
    if config.price is not None and config.crops_per_second is None:
        raise RequestError("--price needs --crops_per_second")
    if config.images is None:
        images = min(config.count or 0, config.limit or sys.maxsize)
        per_image = images * (_NAME_BYTES + 80)
    else:
        source = limit_images(images_of(config.images), config.limit)
        images, per_image = len(source), len(source.names.lines) + 79 * len(source)  # name, size and checksum
    if "," in config.teacher:
        raise RequestError(f"--teacher {config.teacher}: plan takes one teacher; run it once for each of them")
    teacher = resolve.teacher_of(config.teacher, config.checkpoint, grid=config.grid)
    targets = images * config.crops
    target = teacher.info.spec
    chosen = config.codec or target.definition.default_codec(target.shape)
    sizes = {chosen: target.check_codec(chosen, teacher.info.name)}
    for codec in target.definition.example_codecs if target.kind == "distribution" else CODECS:
        try:
            sizes[codec] = target.definition.code_size(codec, target.shape)
        except RequestError:
            continue  # the codec's parts do not divide D, or it keeps all classes
    codecs: dict[str, dict[str, Any]] = {
        codec: {
            "bytes_per_crop": size + CROP_DTYPE.itemsize,
            "bytes": per_image + targets * (size + CROP_DTYPE.itemsize),
            "refused": _refused(codec, target, targets),
        }
        for codec, size in sorted(sizes.items(), key=lambda item: -item[1])
    }
    store = Path(config.store)
    disk = next(place for place in (store, *store.absolute().parents) if place.exists())
    free = shutil.disk_usage(disk).free
    plan: dict[str, Any] = {
        "images": images,
        "crops": config.crops,
        "targets": targets,
        "dim": target.size,
        "shape": str(target),
        "teacher": teacher.info.network,
        "codec": chosen,
        "codecs": codecs,
        "free_bytes": free,
        "fits": codecs[chosen]["bytes"] < free,
    }
    try:
        teacher.check_size(teacher.info.pixels)
    except RequestError as error:
        plan["refused"] = f"{error}{_enough_pixels(teacher)}"
    if config.crops_per_second is not None:
        plan["hours"] = targets / config.crops_per_second / 3600
        if config.price is not None:
            plan["cost"] = plan["hours"] * config.price
    if config.json:
        console.print_json(plan)
    else:
        console.print_result(describe(config, plan))
    return 0


def describe(config: Config, plan: dict[str, Any]) -> str:
    """Formats the plan as text."""
    from fkd_ssl.commands import console

    rows = [["codec", "bytes per crop", "store", ""]]
    for codec, size in plan["codecs"].items():
        note = "too few targets" if size["refused"] else "" if size["bytes"] < plan["free_bytes"] else "does not fit"
        chosen = "  <- --codec" if codec == plan["codec"] else ""
        rows.append([codec, str(size["bytes_per_crop"]), format_bytes(size["bytes"]), f"{note}{chosen}"])
    lines = [
        f"{plan['images']:,} images x {plan['crops']} crops = {plan['targets']:,} targets, {plan['shape']}; "
        f"{format_bytes(plan['free_bytes'])} free on the disk of {config.store}",
        console.table(rows),
        f"to estimate the time, run precompute with --limit 500 and another --store: it prints crops per second; this plan is "
        f"for {plan['targets']:,} crops"
        if "hours" not in plan
        else f"{plan['hours']:,.1f} hours of one process at {config.crops_per_second:,.0f} crops per second"
        + (f", which cost {plan['cost']:,.0f}" if "cost" in plan else ""),
    ]
    for refused in filter(None, (plan["codecs"][plan["codec"]]["refused"], plan.get("refused"))):
        lines.append(f"precompute will refuse this: {refused}")
    return "\n".join(lines)


def _enough_pixels(teacher: "Teacher") -> str:
    """Names the smallest multiple of the stride, at most 4 times the native size, whose feature map is fine enough, if any."""
    from fkd_ssl.errors import FkdError, RequestError
    from fkd_ssl.eval.maps import multiple_of

    side, step = teacher.info.pixels, multiple_of(teacher.backbone)
    for pixels in range(side - side % step + step, 4 * side + 1, step):
        try:
            teacher.check_size(pixels)
        except RequestError:
            continue
        except FkdError:  # the network accepts no other size
            break
        return f"; --pixels {pixels} is large enough"
    return ""


def _refused(codec: str, target: "TargetSpec", targets: int) -> str | None:
    """Explains why `targets` are too few to train the codec; None if they are enough."""
    from fkd_ssl.errors import RequestError
    from fkd_ssl.store.write.columns import check_sample, sample_targets

    try:
        check_sample(codec, target, sample_targets(codec, target, targets))
    except RequestError as error:
        return str(error)
    return None
