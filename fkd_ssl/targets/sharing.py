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
    owner = getattr(embed, "__self__", embed)
    return getattr(owner, "network_key", id(owner))


def embed_all(embeds: Sequence[Embed], images: "Tensor") -> list["Tensor"]:
    """Returns the targets of each teacher for the same crops. Each network runs once."""
    groups: dict[Any, list[int]] = {}
    for k, embed in enumerate(embeds):
        groups.setdefault(network_key(embed), []).append(k)
    found: dict[int, Tensor] = {}
    for group in groups.values():
        if len(group) == 1:
            found[group[0]] = embeds[group[0]](images)
            continue
        first, *others = (embeds[k].__self__ for k in group)  # type: ignore[attr-defined]
        found |= dict(zip(group, first.embed_with(others, images), strict=True))
    return [found[k] for k in range(len(embeds))]
