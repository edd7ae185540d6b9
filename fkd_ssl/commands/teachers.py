"""Lists the teachers that are known by name: network, target, published accuracy, licence, where the weights are."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of teachers."""

    json: bool = False
    """Print one JSON object on standard output."""


def run(config: Config) -> int:
    """Lists them."""
    from dataclasses import asdict

    from fkd_ssl.commands import console
    from fkd_ssl.teachers.presets import PRESETS

    if config.json:
        console.show_json({name: asdict(preset) for name, preset in PRESETS.items()})
        return 0
    rows = [["preset", "network", "target", "linear top-1", "licence of the weights"]]
    rows += [[name, p.network, f"{p.dim}-d", f"{p.top1:.1f} %", p.licence] for name, p in PRESETS.items()]
    urls = [[name, p.url] for name, p in PRESETS.items()]
    console.show(
        f"{console.table(rows)}\n\nDownload one and pass it as --checkpoint:\n{console.table(urls)}\n\n"
        "Families: --teacher mocov2 or swav takes any checkpoint in that layout (fkd-ssl pretrain makes one).\n"
        "Your own: --teacher module:function, a function that returns a network of ImageNet-normalised floats to [B, D]."
    )
    return 0
