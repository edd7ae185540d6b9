"""Linear probe of a model's features.

Trained on random crops, as published, with the backbone frozen in eval mode: moco (SGD, learning rate 30, 100 epochs), swav,
simsiam (LARS, batch 4096), simclr (lightly's). On features extracted once, in seconds: sweep (DINOv2's 13 learning rates at
once) and logreg (L-BFGS), what they choose being chosen on a held-out part of train. These two also take
FEATURES.npy,LABELS.npy that came from elsewhere.
"""

from dataclasses import dataclass, replace
from typing import Literal

from fkd_ssl.errors import RequestError

ON_FEATURES = ("sweep", "logreg")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of linear."""

    model: str | None = None
    """A run folder, a .ckpt of one, teacher:NAME, torchvision/NAME, timm/NAME, or module:function; of files only a name."""
    train: str
    """Labelled images to train the probe on: a folder, NAME:SPLIT:ROOT, or FEATURES.npy,LABELS.npy."""
    val: str
    """Labelled images to test it on, likewise."""
    protocol: Literal["moco", "swav", "simsiam", "simclr", "sweep", "logreg"] = "moco"
    """Whose probe."""
    pixels: int | None = None
    """Side of the crops; the model's own training size by default."""
    checkpoint: str | None = None
    """Weights of the teacher, or `pretrained` for those of its library."""
    epochs: int | None = None
    """Epochs of moco, swav, simsiam and simclr, if not the published ones."""
    batch_size: int | None = None
    """Their images a step, if not as published; the rate of simsiam and simclr follows it."""
    lr: float | None = None
    """Their learning rate, if not the published one."""
    seed: int = 0
    """Of the probe's weights, order and crops; of the held-out part of sweep and logreg."""
    features: str | None = None
    """Folder where features are kept and looked for (fkd-ssl features); for sweep and logreg."""
    workers: int = 2
    """Processes that read images."""
    out: str | None = None
    """Folder for results.json."""
    json: bool = False
    """Print one JSON object on standard output."""

    def __post_init__(self) -> None:
        crops = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr}
        for name, value in crops.items():
            if self.protocol in ON_FEATURES and value is not None:
                raise RequestError(f"--{name} goes with --protocol moco or swav, simsiam, simclr; {self.protocol} sets its own")
        if self.protocol not in ON_FEATURES and self.features is not None:
            raise RequestError(f"--features goes with --protocol sweep or logreg; {self.protocol} trains on random crops")


def run(config: Config) -> int:
    """Scores the model."""
    from fkd_ssl.commands import results, sources
    from fkd_ssl.eval import linear, logreg, sweep

    if config.protocol not in ON_FEATURES and any(map(sources.is_files, (config.train, config.val))):
        raise RequestError(
            f"--protocol {config.protocol} trains on random crops of images; features that are there already go with "
            "--protocol sweep or logreg"
        )
    if results.show_finished(config):
        return 0
    if config.protocol in ON_FEATURES:
        split, about = sources.split_of(config, config.train, config.val)
        common = {**split.common, "names": split.classes, "seed": config.seed}
        if config.protocol == "sweep":
            result = sweep.evaluate(**common, device=sources.search_device())
        else:
            result = logreg.evaluate(**common)
        pixels = (about["transform"] or {}).get("centre_crop")
    else:
        train, val = sources.images_of(config.train), sources.images_of(config.val)
        model, pixels = sources.load_model(config)
        result = linear.evaluate(
            model=model.features,
            train=train,
            val=val,
            pixels=pixels,
            protocol=config.protocol,
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            seed=config.seed,
            workers=config.workers,
        )
        data = {"train": sources.about_images(config.train, train), "val": sources.about_images(config.val, val)}
        about = {**sources.about_model(model, pixels), "data": data}
    where = "" if pixels is None else f" at {pixels} px"
    title = f"{config.model or config.train}: linear probe ({config.protocol}){where}"
    results.show("linear", title, replace(config, pixels=pixels), config.protocol, about, result)
    return 0
