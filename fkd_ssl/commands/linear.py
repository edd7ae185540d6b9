"""Trains a linear probe on a model's features.

Two protocols use features that are extracted once: logreg (L-BFGS, the default) and sweep (DINOv2's 13 learning rates at once).
They take seconds, choose their settings on a held-out part of --train, and accept FEATURES.npy,LABELS.npy. Four published
protocols train on random crops, with the backbone frozen in eval mode: moco (SGD, learning rate 30, 100 epochs), swav, simsiam
(LARS, batch 4096) and simclr (lightly's). Use them to compare with papers: their learning rates are for ImageNet. Several of
them, such as moco,swav, share the forward passes over the crops, which take most of the time. If a run with --out was killed,
repeat the command to continue after its last epoch.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fkd_ssl.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from fkd_ssl.commands.sources import Evaluation
    from fkd_ssl.results import Score

ON_CROPS = ("moco", "swav", "simsiam", "simclr")
ON_FEATURES = ("sweep", "logreg")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of linear."""

    EXECUTION: ClassVar[tuple[str, ...]] = ("features", "workers", "json", "on_unreadable")
    PATHS: ClassVar[tuple[str, ...]] = ("model", "checkpoint", "train", "val", "out")

    model: str | None = None
    """A run folder, a .ckpt file, teacher:NAME, torchvision/NAME, timm/NAME or module:function; any name for feature files."""
    train: str
    """Labelled images to train the probe on: a folder, another source (docs/sources.md), or FEATURES.npy,LABELS.npy."""
    val: str
    """Labelled images to score the probe on, in the same forms as --train."""
    protocol: str = "logreg"
    """logreg, sweep, moco, swav, simsiam or simclr; several separated by commas."""
    baseline: Literal["pixels", "chance"] | None = None
    """What to compare with: pixels (8 x 8 pixels, a colour histogram and chance, on the same images by the same protocol) or
    chance only. Default: pixels for logreg and sweep on images, else chance."""
    pixels: int | None = None
    """Side of the crops; by default the size that the model was trained at."""
    checkpoint: str | None = None
    """Checkpoint of the teacher; `pretrained` downloads its library's weights."""
    epochs: int | None = None
    """Epochs of moco, swav, simsiam and simclr; by default the published number."""
    batch_size: int | None = None
    """Batch size of these four; by default as published. The learning rate of simsiam and simclr is proportional to it."""
    lr: float | None = None
    """Learning rate of these four; by default the published rate."""
    seed: int = 0
    """Seed of the probe's weights, the order of images and the crops, and of the held-out part of sweep and logreg."""
    features: str | None = None
    """Cache folder of features (see fkd-ssl features), for sweep and logreg."""
    workers: int = 2
    """Processes that read images."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What to do if an image is damaged: stop and name it, or leave it out and count it."""
    out: str | None = None
    """Run folder for results.json and checkpoints; if there are several protocols, each gets a subfolder."""
    json: bool = False
    """Print one JSON object per protocol on standard output, one per line."""

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
            raise RequestError(f"--protocol {self.protocol}: names a protocol twice")
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) is not None and not set(self.protocols) & set(ON_CROPS):
                raise RequestError(f"--{name} needs --protocol moco, swav, simsiam or simclr; {self.protocol} chooses its own")
        if self.baseline == "pixels" and not set(self.protocols) & set(ON_FEATURES):
            raise RequestError(
                f"--baseline pixels needs --protocol sweep or logreg: the learning rates of {self.protocol} do not suit pixels"
            )
        if self.features is not None and not set(self.protocols) & set(ON_FEATURES):
            raise RequestError(f"--features needs --protocol sweep or logreg; {self.protocol} trains on random crops")


def run(config: Config) -> int:
    """Prints the score of each protocol as soon as it is known."""
    from fkd_ssl.commands import results

    for score in _scores(config):
        results.show(score, json=config.json)
    return 0


def work(config: Config) -> "Score | dict[str, Score]":
    """Scores the model; with several protocols, returns the scores by protocol."""
    scores = list(_scores(config))
    return scores[0] if len(scores) == 1 else {score.values["protocol"]: score for score in scores}


def _scores(config: Config) -> Iterator["Score"]:
    """Scores the model by each protocol: finished ones first, then those on crops, then those on features."""
    from fkd_ssl import runs
    from fkd_ssl.commands import results, sources
    from fkd_ssl.eval import linear
    from fkd_ssl.results import Score

    on_crops = [name for name in config.protocols if name in ON_CROPS]
    if on_crops and any(map(sources.is_files, (config.train, config.val))):
        raise RequestError(
            f"--protocol {config.protocol} trains on random crops of images; choose --protocol sweep or logreg for files of "
            "features"
        )
    if len(config.protocols) > 1 and config.out is not None and (Path(config.out) / runs.CONFIG).exists():
        raise RequestError(f"{config.out}: holds the evaluation of one protocol; choose another --out for several")
    sources.check_baseline(config.baseline, config.train)
    linear.check(on_crops, epochs=config.epochs, batch_size=config.batch_size, lr=config.lr)
    parts = {name: _part(config, name) for name in config.protocols}
    evaluation = sources.open_evaluation(config, config.train, config.val)
    for part in parts.values():
        if part.out is not None:
            runs.peek(part.out, part, evaluation.inputs)  # check all of them before starting the first
    asked = {}
    for name, part in parts.items():
        if found := results.finished(part, evaluation.inputs):
            yield Score.of(*found)
        else:
            asked[name] = part
    yield from _on_crops({name: asked[name] for name in on_crops if name in asked}, evaluation)
    yield from _on_features({name: part for name, part in asked.items() if name in ON_FEATURES}, evaluation)


def _part(config: Config, name: str) -> Config:
    """The config of a single protocol of `config`."""
    if config.protocol == name:
        return config
    out = None if config.out is None else str(Path(config.out) / name)
    if name in ON_CROPS:
        return replace(config, protocol=name, out=out, features=None, baseline=None)
    return replace(config, protocol=name, out=out, epochs=None, batch_size=None, lr=None)


def _on_crops(parts: dict[str, Config], evaluation: "Evaluation") -> Iterator["Score"]:
    if not parts:
        return
    from fkd_ssl.commands import console, results, sources
    from fkd_ssl.eval import baselines, linear
    from fkd_ssl.eval.features import match_classes

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
        details = {**sources.about_model(model, pixels), "data": data}
        chance = baselines.chance(train.labels, match_classes(train, val))
        for name, part in parts.items():
            unreadable = len(train) + len(val) - found[name]["n_train"] - found[name]["n_val"]
            found[name]["baselines"] = {"chance": chance}
            yield _score(part, pixels, {**details, "unreadable_images": unreadable}, found[name])


def _on_features(parts: dict[str, Config], evaluation: "Evaluation") -> Iterator["Score"]:
    if not parts:
        return
    from fkd_ssl.commands import resolve, results, sources
    from fkd_ssl.eval import baselines, logreg, sweep

    config = next(iter(parts.values()))
    split, details = sources.split_of(evaluation, config)
    pixels = (details["transform"] or {}).get("centre_crop")
    common = {**split.common, "names": split.classes, "seed": config.seed, "device": resolve.device()}
    found = {} if config.baseline == "chance" else split.baselines
    for name, part in parts.items():
        probe: Callable[..., dict[str, Any]] = partial({"sweep": sweep, "logreg": logreg}[name].evaluate, **common)
        with results.opened(part, evaluation.inputs):
            result = probe()
            result["baselines"] = baselines.scores(partial(probe, progress=False), found, split.train_labels, split.labels)
            yield _score(part, pixels, details, result)


def _score(config: Config, pixels: int | None, details: dict[str, Any], result: dict[str, Any]) -> "Score":
    from fkd_ssl.commands import results

    where = "" if pixels is None else f" at {pixels} px"
    title = f"{config.model or config.train}: linear probe ({config.protocol}){where}"
    return results.score("linear", title, replace(config, pixels=pixels), config.protocol, details, result)
