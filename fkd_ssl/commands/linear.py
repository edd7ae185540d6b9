"""Linear probe of a model's features.

On random crops, with the backbone frozen in eval mode, as published: moco (SGD, learning rate 30, 100 epochs), swav, simsiam
(LARS, batch 4096), simclr (lightly's). Several, such as moco,swav, share one pass over the crops, which is nearly all of the
work. On features extracted once, in seconds: sweep (DINOv2's 13 learning rates at once) and logreg (L-BFGS), which choose
their settings on a held-out part of train and also take FEATURES.npy,LABELS.npy. With --out a killed run continues after its
last epoch.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fkd_ssl.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from fkd_ssl.commands.sources import Evaluation

ON_CROPS = ("moco", "swav", "simsiam", "simclr")
ON_FEATURES = ("sweep", "logreg")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of linear."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("features", "workers", "json", "on_unreadable")
    PATHS: ClassVar[tuple[str, ...]] = ("model", "checkpoint", "train", "val", "out")

    model: str | None = None
    """A run folder, one of its .ckpt files, teacher:NAME, torchvision/NAME, timm/NAME or module:function; for files a name."""
    train: str
    """Labelled images to train the probe on: a folder, NAME:SPLIT:ROOT, or FEATURES.npy,LABELS.npy."""
    val: str
    """Labelled images to score it on, likewise."""
    protocol: str = "moco"
    """moco, swav, simsiam, simclr, sweep or logreg, or several separated by commas."""
    pixels: int | None = None
    """Side of the crops; the size that the model was trained at by default."""
    checkpoint: str | None = None
    """Weights of the teacher; `pretrained` downloads those of its library."""
    epochs: int | None = None
    """Epochs of moco, swav, simsiam and simclr; as published by default."""
    batch_size: int | None = None
    """Their batch size; as published by default. The learning rate of simsiam and simclr is proportional to it."""
    lr: float | None = None
    """Their learning rate; as published by default."""
    seed: int = 0
    """Seed of the probe's weights, order and crops, and of the held-out part of sweep and logreg."""
    features: str | None = None
    """Cache folder of features (see fkd-ssl features), for sweep and logreg."""
    workers: int = 2
    """Processes that read images."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do about a damaged image: stop and name it, or leave it out and count it."""
    out: str | None = None
    """Run folder for results.json and checkpoints; several protocols get a folder each in it."""
    json: bool = False
    """Print one JSON object per protocol on standard output, a line each."""

    @property
    def protocols(self) -> list[str]:
        """The names in `protocol`."""
        return [name.strip() for name in self.protocol.split(",")]

    def __post_init__(self) -> None:
        known = (*ON_CROPS, *ON_FEATURES)
        for name in self.protocols:
            if name not in known:
                raise RequestError(
                    f"--protocol {self.protocol}: no protocol {name!r} (known: {', '.join(known)}){did_you_mean(name, known)}"
                )
        if len(set(self.protocols)) < len(self.protocols):
            raise RequestError(f"--protocol {self.protocol}: has a protocol twice")
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) is not None and not set(self.protocols) & set(ON_CROPS):
                raise RequestError(f"--{name} needs --protocol moco, swav, simsiam or simclr; {self.protocol} chooses its own")
        if self.features is not None and not set(self.protocols) & set(ON_FEATURES):
            raise RequestError(f"--features needs --protocol sweep or logreg; {self.protocol} trains on random crops")


def run(config: Config) -> int:
    """Scores the model."""
    from fkd_ssl import runs
    from fkd_ssl.commands import results, sources
    from fkd_ssl.eval import linear

    on_crops = [name for name in config.protocols if name in ON_CROPS]
    if on_crops and any(map(sources.is_files, (config.train, config.val))):
        raise RequestError(
            f"--protocol {config.protocol} trains on random crops of images; choose --protocol sweep or logreg for files of "
            "features"
        )
    if len(config.protocols) > 1 and config.out is not None and (Path(config.out) / runs.CONFIG).exists():
        raise RequestError(
            f"{config.out}: holds one evaluation, and several protocols need a folder each in it; choose another --out"
        )
    linear.check(on_crops, epochs=config.epochs, batch_size=config.batch_size, lr=config.lr)
    parts = {name: _part(config, name) for name in config.protocols}
    evaluation = sources.open_evaluation(config, config.train, config.val)
    for part in parts.values():
        if part.out is not None:
            runs.peek(part.out, part, evaluation.inputs)  # all of them before the first is begun
    asked = {name: part for name, part in parts.items() if not results.show_finished(part, evaluation.inputs)}
    _on_crops({name: asked[name] for name in on_crops if name in asked}, evaluation)
    _on_features({name: part for name, part in asked.items() if name in ON_FEATURES}, evaluation)
    return 0


def _part(config: Config, name: str) -> Config:
    """The config of one of the protocols of `config` alone."""
    if config.protocol == name:
        return config
    out = None if config.out is None else str(Path(config.out) / name)
    if name in ON_CROPS:
        return replace(config, protocol=name, out=out, features=None)
    return replace(config, protocol=name, out=out, epochs=None, batch_size=None, lr=None)


def _on_crops(parts: dict[str, Config], evaluation: "Evaluation") -> None:
    if not parts:
        return
    from fkd_ssl.commands import console, results, sources
    from fkd_ssl.eval import linear

    config = next(iter(parts.values()))
    (train, val), model, pixels = evaluation.sets, evaluation.model, evaluation.pixels
    assert model is not None  # crops are of images
    assert pixels is not None
    with ExitStack() as opened:
        for part in parts.values():
            opened.enter_context(results.opened(part, evaluation.inputs))
        skipped = opened.enter_context(console.skipping(config.on_unreadable))
        found = linear.evaluate_together(
            list(parts),
            model=model.features,
            train=train,
            val=val,
            pixels=pixels,
            epochs=config.epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            seed=config.seed,
            workers=config.workers,
            kept=None if config.out is None else {name: Path(str(part.out)) / "probe.pt" for name, part in parts.items()},
            identity=model.identity,
            skipped=skipped,
        )
        data = {"train": sources.about_images(config.train, train), "val": sources.about_images(config.val, val)}
        about = {**sources.about_model(model, pixels), "data": data}
        for name, part in parts.items():
            unreadable = len(train) + len(val) - found[name]["n_train"] - found[name]["n_val"]
            _show(part, pixels, {**about, "unreadable_images": unreadable}, found[name])


def _on_features(parts: dict[str, Config], evaluation: "Evaluation") -> None:
    if not parts:
        return
    from fkd_ssl.commands import results, sources
    from fkd_ssl.eval import logreg, sweep

    config = next(iter(parts.values()))
    split, about = sources.split_of(evaluation, config)
    pixels = (about["transform"] or {}).get("centre_crop")
    common = {**split.common, "names": split.classes, "seed": config.seed}
    for name, part in parts.items():
        with results.opened(part, evaluation.inputs):
            if name == "sweep":
                _show(part, pixels, about, sweep.evaluate(**common, device=sources.search_device()))
            else:
                _show(part, pixels, about, logreg.evaluate(**common))


def _show(config: Config, pixels: int | None, about: dict[str, Any], result: dict[str, Any]) -> None:
    from fkd_ssl.commands import results

    where = "" if pixels is None else f" at {pixels} px"
    title = f"{config.model or config.train}: linear probe ({config.protocol}){where}"
    results.show("linear", title, replace(config, pixels=pixels), config.protocol, about, result)
