"""Targets of several teachers for the same crops: teachers that share a network run it once."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Embed = Callable[["Tensor"], "Tensor"]
"""Maps crops uint8 [B, 3, H, W] to targets float32 [B, *shape]: a function, or the method `embed` of a teacher.

A teacher may have `network_key`, equal for teachers that share a network and its input, and `embed_with(others, images)`, which
returns its own targets and those of other teachers with the same key from one forward pass.
"""


def network_key(embed: Embed) -> Any:
    """Returns a value that is equal for teachers that share a forward pass."""
    return getattr(getattr(embed, "__self__", embed), "network_key", embed)


def embed_all(embeds: Sequence[Embed], images: "Tensor") -> list["Tensor"]:
    """Returns the targets of each teacher for the same crops. Each network, and each function, runs once."""
    groups: dict[Any, list[Embed]] = {}
    for embed in dict.fromkeys(embeds):
        groups.setdefault(network_key(embed), []).append(embed)
    found: dict[Embed, Tensor] = {}
    for group in groups.values():
        if len(group) == 1:
            found[group[0]] = group[0](images)
            continue
        first, *others = (embed.__self__ for embed in group)  # type: ignore[attr-defined]
        found |= dict(zip(group, first.embed_with(others, images), strict=True))
    return [found[embed] for embed in embeds]
