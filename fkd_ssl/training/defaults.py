"""Defaults of the options that depend on the training data.

| images | `batch_size` | `lr` of adam and adamw | `warmup_epochs` |
|---|---|---|---|
| up to 50,000 | 128 | 3e-3; 1e-3 with relational | a thirtieth of the epochs |
| more | 256 | 3e-4 | 0 |

S2-BNN's values (256, 3e-4, no warm-up) are for ImageNet, where 100 epochs are 500,000 steps. A few thousand images give a few
thousand steps. They need smaller batches, so that there are more steps, and a higher learning rate (docs/results/defaults.md,
students.md). A batch has each image at most once, so tiny sets have even smaller batches. `pixels` is the side of the teacher's
crops.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fkd_ssl.errors import RequestError
from fkd_ssl.objectives import complete
from fkd_ssl.objectives.expression import parse
from fkd_ssl.text import plural

SMALL = 50_000
"""Number of images up to which a set is small."""
PIXELS = 224
"""Side of the crops of a training without a teacher."""
RATE = 3e-3
"""Learning rate of Adam on small sets."""
RATES = {"relational": 1e-3}
"""Objective -> its learning rate, if it needs another one; a sum of objectives uses the smallest rate of its terms."""
FEW_STEPS = 500
"""Number of steps below which a training is reported as too short."""
FEW_IMAGES = 32
"""Number of different images in a batch below which several crops of an image cost accuracy (docs/results/students.md)."""
_NAMES = ("pixels", "batch_size", "lr", "warmup_epochs")
Config = TypeVar("Config", bound=Any)


def resolve(config: Config, *, images: int, pixels: int, kinds: Sequence[str] = ("embedding",), mix_groups: int = 0) -> Config:
    """Fills in the options that were not given. Options that were given stay as they are.

    `objective` gets the default of every kind of targets that it has no term for.

    Args:
        config: A TrainConfig or CompareConfig.
        images: Number of images that the training uses.
        pixels: Side of the teacher's crops, or `PIXELS` without one.
        kinds: Kind of each teacher's targets.
        mix_groups: `ImageSource.mix_groups`.

    Raises:
        RequestError: `lr` is missing and there is no default for the optimizer.
    """
    config = replace(config, objective=complete(config.objective, kinds))
    small = images <= SMALL
    chosen = {
        "pixels": pixels,
        "batch_size": _batch_size(config, images, 128 if small else 256),
        "lr": _rate(config) if small else 3e-4,
        "warmup_epochs": config.epochs / 30 if small else 0.0,
    }
    if hasattr(config, "mix_groups"):
        chosen["mix_groups"] = mix_groups
    missing = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    if "lr" in missing and config.optimizer not in ("adam", "adamw"):
        raise RequestError(f"optimizer {config.optimizer}: has no default learning rate; give --lr, for instance 0.03 for sgd")
    return replace(config, **missing) if missing else config


def describe(given: Any, used: Any, images: int) -> str | None:
    """The line for the user about the options that `resolve` filled in; None if all were given."""
    names = [name for name in _NAMES if getattr(given, name) is None]
    if not names:
        return None
    values = ", ".join(f"{name} {getattr(used, name):g}" for name in names)
    return f"defaults for {images:,} images and {used.objective}: {values}"


def warn_of_few(steps: int) -> str | None:
    """The warning about a training of few steps; None if there are enough."""
    if steps >= FEW_STEPS:
        return None
    return (
        f"warning: a training of {plural(steps, 'step')} is short (fewer than {FEW_STEPS}), and the student may learn little: "
        "give more --epochs or a smaller --batch_size"
    )


def warn_of_few_images(config: Any, images: int) -> str | None:
    """The warning about batches of several crops of a few images; None if there are enough images in a batch."""
    m, in_batch = config.crops_per_image, config.batch_size // config.crops_per_image
    if m == 1 or in_batch >= min(FEW_IMAGES, images):
        return None
    return (
        f"warning: a batch of {config.batch_size} crops has only {plural(in_batch, 'different image')}, which costs accuracy: "
        "give --crops_per_image 1, or a larger --batch_size"
    )


def _batch_size(config: Any, images: int, crops: int) -> int:
    """The largest number of crops up to `crops` that a batch can have."""
    m, parts = config.crops_per_image, getattr(config, "accumulate", 1)
    max_images = images // m if getattr(config, "single_crop_epochs", 0) else images
    return int(m * parts * max(1, min(crops // m, max_images) // parts))


def _rate(config: Any) -> float:
    return min(RATES.get(term.name, RATE) for term in parse(config.objective))
