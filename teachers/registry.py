"""Teachers by name: families, published presets, libraries, and your own as module:function."""

from collections.abc import Callable
from pathlib import Path

from fkd_ssl.errors import CheckpointError, RequestError, did_you_mean
from fkd_ssl.targets import Precision
from fkd_ssl.teachers import fetch
from fkd_ssl.teachers.lightly_checkpoints import load_lightly
from fkd_ssl.teachers.moco import load_mocov2
from fkd_ssl.teachers.own import load_own
from fkd_ssl.teachers.presets import PRESETS
from fkd_ssl.teachers.swav import load_swav
from fkd_ssl.teachers.teacher import Teacher
from fkd_ssl.teachers.timm_models import load_timm
from fkd_ssl.teachers.tokens import as_tokens, set_grid, split_name
from fkd_ssl.teachers.torchvision_models import load_torchvision
from fkd_ssl.teachers.transformers_models import load_transformers

FAMILIES: dict[str, Callable[..., Teacher]] = {
    "mocov2": load_mocov2,
    "swav": load_swav,
    "lightly": load_lightly,
    "transformers": load_transformers,
}
"""Loaders (path, *, name, precision, ...) of checkpoints whose weights determine the network."""
LIBRARIES: dict[str, Callable[..., Teacher]] = {"torchvision": load_torchvision, "timm": load_timm}
"""Loaders (model, layer, checkpoint, *, precision) of LIBRARY/MODEL."""


def load_teacher(
    name: str, *, checkpoint: str | Path | None = None, precision: Precision = "fp32", grid: int | None = None
) -> Teacher:
    """Loads a frozen teacher.

    Args:
        name: A family (`mocov2`, `swav`, `lightly` or `transformers`; the checkpoint determines the architecture), a preset in
            `PRESETS` (both also as `NAME@backbone`, whose target is the backbone's features, without the head), a network of a
            library as `torchvision/NAME` or `timm/NAME`, or your own `module:function`. The target of a library's network is
            its pooled features; `@LAYER` selects those of a layer, `@probabilities` the class probabilities. Your function is
            called without arguments, or with `checkpoint=` if given; it returns a Teacher, or an nn.Module that maps
            ImageNet-normalised floats [B, 3, H, W] to [B, D]. To average classifiers, use Ensemble.
            Any of these names followed by `@tokens` gives the network's feature map, pooled to a grid of tokens.
        checkpoint: File of weights; a folder for `transformers`. By default a preset is searched for in the cache folder.
            `pretrained` downloads the weights of a library's network.
        precision: Precision of the forward pass.
        grid: Number of tokens along each side of the crop; by default 7.

    Raises:
        RequestError: The name is unknown or needs a checkpoint, or a grid is given and the teacher does not give tokens.
        CheckpointError: The checkpoint has another layout or is of another network.
        FkdError: Your function failed, or a library could not download its weights.
    """
    base, tokens = split_name(name)
    teacher = _load(base, checkpoint, precision)
    if tokens:
        teacher = as_tokens(teacher)
    set_grid([teacher], grid)
    return teacher


def _load(name: str, checkpoint: str | Path | None, precision: Precision) -> Teacher:
    library, colon, model = name.partition(":")
    if colon and library in LIBRARIES:
        raise RequestError(f"teacher {name}: write {library}/{model}")
    if colon:
        return load_own(name, checkpoint, precision)
    library, slash, model = name.partition("/")
    if slash and library in LIBRARIES:
        model, at, layer = model.partition("@")
        if not model or (at and not layer):
            raise RequestError(f"teacher {name!r}: expected {library}/NAME or {library}/NAME@LAYER")
        return LIBRARIES[library](model, layer or None, checkpoint, precision=precision)
    name, at, part = name.partition("@")
    if at and part != "backbone":
        raise RequestError(f"teacher {name}@{part}: expected {name}@backbone, or {name} for the output of its head")
    if name in PRESETS:
        teacher = _preset(name, checkpoint, precision)
        return teacher.without_head() if at else teacher
    if name not in FAMILIES:
        raise RequestError(
            f"teacher {name!r} is unknown{did_you_mean(name, [*FAMILIES, *PRESETS, *(f'{key}/{model}' for key in LIBRARIES)])} "
            f"(families {', '.join(FAMILIES)}; presets {', '.join(PRESETS)}; "
            f"{', '.join(f'{key}/NAME' for key in LIBRARIES)}; or module:function of your own)"
        )
    if checkpoint is None:
        raise RequestError(f"teacher {name}: --checkpoint is needed, a file in the layout of {name}")
    teacher = FAMILIES[name](checkpoint, precision=precision)
    return teacher.without_head() if at else teacher


def _preset(name: str, checkpoint: str | Path | None, precision: Precision) -> Teacher:
    preset = PRESETS[name]
    path = fetch.find(preset) if checkpoint is None else Path(checkpoint)
    if path is None:
        raise RequestError(
            f"teacher {name}: its weights are not in the cache folder: run fkd-ssl teachers fetch {name}; without a network "
            f"{fetch.manual_download(preset)}"
        )
    teacher = FAMILIES[preset.family](path, name=name, precision=precision, licence=preset.licence, source=preset.url)
    advice = f"pass --teacher {preset.family} for another checkpoint of this layout"
    norm = "with BatchNorm"
    fits = (
        teacher.info.network.startswith(f"{preset.network},")
        and teacher.info.spec.shape == (preset.dim,)
        and (norm in teacher.info.network) == (norm in preset.head)
        and len(teacher.info.arrays.get("prototypes", ())) == preset.prototypes
    )
    if not fits:
        raise CheckpointError(
            f"{path}: holds a {teacher.info.network}; {name} is a {preset.network}, {preset.head}, with {preset.dim}-d "
            f"targets; {advice}"
        )
    try:
        fetch.check_file(path, preset)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {advice}") from error
    return teacher
