"""Measures how well a model's frozen feature maps segment images: by a linear layer, and by nearest neighbours.

--train and --val are IMAGES,MASKS: two sources of images (docs/sources.md), paired by their names without extensions. A
mask is a PNG with one byte per pixel, the pixel's label, and has the size of its image. Images are resized to a short side of
--pixels, with both sides rounded to a multiple of 32 (28 for patches of 14 px); masks are not resized. The headline is the mean
IoU of the linear layer (BatchNorm and a 1 x 1 convolution, as in DINOv2). A killed run starts from the beginning.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fkd_ssl.errors import RequestError

if TYPE_CHECKING:
    from fkd_ssl.eval.masks import Masked
    from fkd_ssl.results import Segmentation


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of segment."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("workers", "json", "max_memory", "on_unreadable")
    PATHS: ClassVar[tuple[str, ...]] = ("model", "checkpoint", "train", "val", "out")

    model: str
    """A run folder, one of its .ckpt files, an exported .safetensors file, teacher:NAME, torchvision/NAME, timm/NAME or
    module:function. It needs a feature map."""
    train: str
    """Images and masks to learn from: IMAGES,MASKS."""
    val: str
    """Images and masks to score, in the same form."""
    classes: int | str | None = None
    """Number of labels, or their names in order: sky,road,car. By default one more than the largest label of --train."""
    ignore: int = 255
    """Label of pixels that are neither learned from nor scored, besides 255."""
    pixels: int | None = None
    """Short side of the images; by default the size that the model was trained at. A larger one gives finer maps."""
    checkpoint: str | None = None
    """Checkpoint of the teacher; `pretrained` downloads its library's weights."""
    steps: int | None = None
    """Steps of the linear layer's training; by default 10 epochs, at least 500 steps."""
    batch_size: int = 16
    """Images per step."""
    lr: float = 1e-2
    """Learning rate of the linear layer."""
    k: int = 30
    """Number of nearest neighbours that vote."""
    temperature: float = 0.02
    """Temperature T of the neighbours' weights exp(cosine / T)."""
    seed: int = 0
    """Seed of the layer's weights, the order of images, and the drawn pixels and positions."""
    max_memory: float = 8.0
    """Gigabytes that the maps of the training images may take."""
    workers: int = 2
    """Processes that read images."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do if an image or a mask is damaged: stop and name it, or leave both out and count them."""
    out: str | None = None
    """Folder for results.json."""
    json: bool = False
    """Print one JSON object on standard output."""

    def __post_init__(self) -> None:
        if not 0 <= self.ignore <= 255:
            raise RequestError(f"--ignore {self.ignore}: must be between 0 and 255")
        if isinstance(self.classes, int) and not 2 <= self.classes <= 255:
            raise RequestError(f"--classes {self.classes}: must be between 2 and 255")


def run(config: Config) -> int:
    """Prints the score, after a table of the classes."""
    from fkd_ssl.commands import console, results

    result = work(config)
    if not config.json:
        rows = [[name, *map(_cell, row.values())] for name, row in result.values["per_class"].items()]
        console.print_result(console.table([["class", "IoU", "kNN IoU", "share of pixels"], *rows]))
    results.show(result, json=config.json)
    return 0


def work(config: Config) -> "Segmentation":
    """Scores the model."""
    from fkd_ssl.commands import console

    with console.skipping(config.on_unreadable) as skipped:
        return _score(config, skipped)


def _score(config: Config, skipped: set[str] | None) -> "Segmentation":
    """Scores the model; `skipped` collects the error messages of damaged images and masks."""
    from fkd_ssl.commands import console, resolve, results
    from fkd_ssl.eval import maps, masks, segmentation
    from fkd_ssl.images import CONTENTS
    from fkd_ssl.results import Segmentation
    from fkd_ssl.text import format_bytes

    asked: int | list[str] | None = None
    if config.classes is not None:
        text = str(config.classes)
        asked = int(text) if text.isdecimal() else [name.strip() for name in text.split(",")]
    train, val = _open(config.train, "--train", skipped), _open(config.val, "--val", skipped)
    classes = masks.classes_of(train, val, asked, config.ignore)
    model = resolve.model_of(config.model, config.checkpoint)
    config = replace(config, pixels=resolve.pixels_of(config.pixels, model.pixels))
    assert config.pixels is not None
    inputs = {"model": f"{model.details['network']}, sha256 {model.identity}"}
    for name, part in (("train", train), ("val", val)):
        for what, source in ((f"{name} images", part.images), (f"{name} masks", part.masks)):
            inputs |= source.identity(what, sizes=False) | {f"{CONTENTS}{what}": f"sha256 {source.digest()}"}
    if done := results.finished(config, inputs, results.COUNTS):
        if skipped:
            skipped.clear()  # these are not all; `finished` has logged how many were skipped
        return Segmentation.of(*done)
    settings: dict[str, Any] = {"pixels": config.pixels, "multiple": maps.multiple_of(model.network)}
    size, (h, w, dim) = segmentation.map_bytes(model.map, train, **settings)
    console.log(
        f"maps of {h} x {w} positions and {dim} channels; those of {len(train)} images take {format_bytes(size)} of memory"
    )
    if size > 1e9 * config.max_memory:
        raise RequestError(
            f"the maps of the training images need {format_bytes(size)} of memory, over --max_memory {config.max_memory:g} GB: "
            "choose smaller --pixels or fewer images, or a larger --max_memory"
        )
    with results.opened(config, inputs):
        found = segmentation.evaluate(
            model=model.map,
            train=train,
            val=val,
            classes=classes,
            **settings,
            steps=config.steps,
            lr=config.lr,
            batch_size=config.batch_size,
            k=config.k,
            temperature=config.temperature,
            seed=config.seed,
            device=resolve.device(),
            workers=config.workers,
            skipped=skipped,
        )
        data = {name: _about(spec, part) for name, spec, part in (("train", config.train, train), ("val", config.val, val))}
        details = {
            "model": model.details,
            "transform": {"short_side": config.pixels, "multiple": settings["multiple"]},
            "data": data,
            "unreadable_images": len(skipped or ()),
        }
        return _result(config, details, found)


def _open(spec: str, option: str, skipped: set[str] | None) -> "Masked":
    """Opens IMAGES,MASKS, or two image sets in a list."""
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.eval import masks
    from fkd_ssl.options import Named

    parts = spec.value if isinstance(spec, Named) else spec.split(",")
    if not isinstance(parts, list) or len(parts) != 2:
        raise RequestError(f"{option} {spec}: expected IMAGES,MASKS: two folders, or other sources, separated by a comma")
    return masks.open_masked(*map(images_of, parts), skipped=skipped)


def _about(spec: str, data: "Masked") -> dict[str, Any]:
    """The entry of a set in results.json."""
    return {"source": spec, "images": len(data), "sha256": data.images.digest(), "masks_sha256": data.masks.digest()}


def _result(config: Config, details: dict[str, Any], found: dict[str, Any]) -> "Segmentation":
    from fkd_ssl.commands import results
    from fkd_ssl.eval import segmentation
    from fkd_ssl.results import Segmentation

    others = found["baselines"]
    low, high = found["interval95"]
    line = (
        f"{config.model}: segmentation at {config.pixels} px: mIoU {found['miou']:.2f} % (95 % interval {low:.2f} to "
        f"{high:.2f}), pixel accuracy {found['pixel_accuracy']:.2f} %; kNN-{found['k']} mIoU {found['knn_miou']:.2f} %; "
        + ", ".join(f"{segmentation.NAMES[name]} {value:.2f} %" for name, value in others.items())
    )
    for score, baseline in (("miou", "colours"), ("knn_miou", "colours_knn")):
        if found[score] <= others[baseline]:
            found["notes"].append(
                f"the model ({score.replace('_', ' ')} {found[score]:.2f} %) is no better than {segmentation.NAMES[baseline]} "
                f"({others[baseline]:.2f} %)"
            )
    protocol = f"linear, kNN k {config.k}, T {config.temperature:g}"
    value = {key: part for key, part in found.items() if key != "counts"}
    value = {"kind": "segment", "protocol": protocol, **details, **value}
    return Segmentation.of(*results.finish(value, line, config, results.COUNTS, found["counts"]))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
