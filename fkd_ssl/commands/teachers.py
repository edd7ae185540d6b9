"""Lists the teachers known by name and which of them are downloaded; `fkd-ssl teachers fetch NAME` downloads one.

Downloads go to the cache folder (--cache, the environment variable FKD_SSL_CACHE, or ~/.cache/fkd_ssl), where --teacher NAME
finds them without --checkpoint. To continue a broken download, repeat the command.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fkd_ssl.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

POSITIONALS = ("action", "name")
_ACTIONS = ("list", "fetch")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of teachers."""

    action: str = "list"
    """list (the default) or fetch."""
    name: str | None = None
    """Preset to fetch."""
    cache: str | None = None
    """Folder of downloaded checkpoints; by default FKD_SSL_CACHE, or ~/.cache/fkd_ssl."""
    json: bool = False
    """Print one JSON object on standard output."""

    def __post_init__(self) -> None:
        if self.action not in _ACTIONS:
            raise RequestError(f"no action {self.action!r}{did_you_mean(self.action, _ACTIONS)}: expected list or fetch NAME")
        if (self.action == "fetch") != (self.name is not None):
            raise RequestError("expected fkd-ssl teachers fetch NAME, or fkd-ssl teachers")


def run(config: Config) -> int:
    """Lists the teachers or fetches one."""
    return _list(config) if config.name is None else _fetch(config, config.name)


def _list(config: Config) -> int:
    from dataclasses import asdict

    from fkd_ssl import files
    from fkd_ssl.commands import console
    from fkd_ssl.teachers import fetch
    from fkd_ssl.teachers.presets import PRESETS

    here = {name: fetch.find(preset, config.cache) for name, preset in PRESETS.items()}
    if config.json:
        paths = {name: None if path is None else str(path) for name, path in here.items()}
        console.print_json({name: {**asdict(preset), "here": paths[name]} for name, preset in PRESETS.items()})
        return 0
    rows = [["preset", "downloaded", "network", "head", "target", "linear top-1", "licence of the weights"]]
    for name, p in PRESETS.items():
        downloaded = "yes" if here[name] else "partly" if fetch.parts(p, config.cache) else "no"
        rows.append([name, downloaded, p.network, p.head, f"{p.dim}-d", f"{p.top1:.1f} %", p.licence])
    seen = [["preset", "crops", "mean", "std", "from"]]
    seen += [[name, f"{p.pixels} px", _rgb(p.mean), _rgb(p.std), f"{p.source}: {p.url}"] for name, p in PRESETS.items()]
    console.print_result(
        f"{console.table(rows)}\n\n{console.table(seen)}\n\n"
        f"Cache folder: {files.cache_folder(config.cache)} (--cache or {files.CACHE_VARIABLE} sets another)\n"
        "Download: fkd-ssl teachers fetch NAME; --teacher NAME then finds it. A file from elsewhere: --checkpoint FILE.\n\n"
        "Families: --teacher mocov2 or swav accepts any checkpoint in that layout (fkd-ssl pretrain makes one), lightly the\n"
        "  checkpoint of a LightningModule with a ResNet as backbone.*, transformers a folder made by save_pretrained.\n"
        "  NAME@backbone, also of a preset, gives the features before the head.\n"
        "Libraries: --teacher torchvision/NAME or timm/NAME, optionally with @LAYER or @probabilities: a network of the\n"
        "  library, with its preprocessing. --checkpoint FILE reads the weights; --checkpoint pretrained downloads them.\n"
        "Runs: --teacher run --checkpoint RUN is a student of fkd-ssl train, with its head.\n"
        "Ensembles: --teacher A+B --checkpoint F+G is the mean of two classifiers' probabilities.\n"
        "Your own: --teacher module:function, a function that returns a network of ImageNet-normalised floats to [B, D].\n"
        "Tokens: NAME@tokens, of any network above, is a grid (--grid) of its feature map, for students of dense tasks.\n"
        "docs/teachers.md explains all of them."
    )
    return 0


def _fetch(config: Config, name: str) -> int:
    from tqdm.auto import tqdm

    from fkd_ssl import files
    from fkd_ssl.commands import console
    from fkd_ssl.progress import bar_disabled
    from fkd_ssl.teachers import fetch, load_teacher
    from fkd_ssl.teachers.presets import PRESETS

    if name not in PRESETS:
        raise RequestError(f"no preset {name!r}{did_you_mean(name, PRESETS)} (known: {', '.join(PRESETS)})")
    preset = PRESETS[name]
    console.log(f"{name}: {preset.network}, {preset.head}; {preset.source}")
    console.log(f"licence of the weights: {preset.licence}")
    present = fetch.find(preset, config.cache)
    if present is None:
        console.log(f"{preset.url} -> {files.cache_folder(config.cache) / preset.file}")
    network = ""

    def check(path: "Path") -> None:
        nonlocal network
        network = load_teacher(name, checkpoint=path).info.network

    with tqdm(unit="B", unit_scale=True, desc=preset.file, disable=bar_disabled(show=present is None)) as bar:

        def progress(here: int, total: int | None) -> None:
            bar.total = total
            bar.update(here - bar.n)

        path = fetch.fetch(preset, cache=config.cache, progress=progress, check=check)
    values: dict[str, Any] = {"name": name, "path": str(path), "bytes": path.stat().st_size, "licence": preset.licence}
    if config.json:
        console.print_json({**values, "network": network, "downloaded": present is None})
    else:
        how = "already downloaded" if present else "downloaded"
        console.print_result(f"{path}: {how}, {values['bytes']:,} bytes, loads as {network}; use it as --teacher {name}")
    if config.cache is not None and fetch.find(preset) is None:
        console.log(f"set {files.CACHE_VARIABLE}={config.cache} in the environment, so that --teacher {name} finds it")
    return 0


def _rgb(values: tuple[float, float, float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
