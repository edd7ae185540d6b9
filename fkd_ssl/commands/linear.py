"""Linear probe of a model's features.

moco: MoCo's protocol (SGD, learning rate 30, 100 epochs, random resized crops), the backbone frozen in eval mode.
swav: SwAV's. logreg: L-BFGS on features extracted once, its L2 strength chosen on a held-out part of train.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of linear."""

    model: str
    """A run folder, a .ckpt of one, or teacher:NAME (see fkd-ssl teachers)."""
    train: str
    """Folder of labelled images to train the probe on."""
    val: str
    """Folder of labelled images to test it on."""
    protocol: Literal["moco", "swav", "logreg"] = "moco"
    """Whose probe."""
    pixels: int | None = None
    """Side of the crops; the model's own training size by default."""
    checkpoint: str | None = None
    """Weights of teacher:NAME."""
    epochs: int | None = None
    """Epochs of moco and swav, if not the published ones."""
    seed: int = 0
    """Of the probe's weights, order and crops; of logreg's held-out part."""
    workers: int = 2
    """Processes that read images."""
    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Scores the model."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.errors import RequestError
    from fkd_ssl.eval import linear, logreg
    from fkd_ssl.eval.features import extract_split
    from fkd_ssl.images import scan

    if config.protocol == "logreg" and config.epochs is not None:
        raise RequestError("--epochs goes with --protocol moco or swav; logreg runs until it converges")
    train, val = scan(config.train), scan(config.val)
    model = resolve.model_of(config.model, config.checkpoint)
    pixels = resolve.pixels_of(config.pixels, model.pixels)
    if config.protocol == "logreg":
        split = extract_split(model.features, train, val, pixels=pixels, workers=config.workers)
        result = logreg.evaluate(
            train_features=split.train_features,
            train_labels=split.train_labels,
            features=split.features,
            labels=split.labels,
            num_classes=len(split.classes),
            seed=config.seed,
        )
    else:
        result = linear.evaluate(
            model=model.features,
            train=train,
            val=val,
            pixels=pixels,
            protocol=config.protocol,
            epochs=config.epochs,
            seed=config.seed,
            workers=config.workers,
        )
    about = {**config.__dict__, "pixels": pixels}
    console.show_score("linear", f"{config.model}: linear probe ({config.protocol}) at {pixels} px", about, result)
    return 0
