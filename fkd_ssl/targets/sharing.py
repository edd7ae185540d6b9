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
    """Returns a value that is equal for teachers that share a forward pass. A callable object may have no hash."""
    teacher = getattr(embed, "__self__", None)
    return id(embed) if teacher is None else getattr(teacher, "network_key", embed)


def embed_all(embeds: Sequence[Embed], images: "Tensor") -> list["Tensor"]:
    """Returns the targets of each teacher for the same crops. Each network, and each function, runs once."""
    groups: dict[Any, list[int]] = {}
    for place, embed in enumerate(embeds):
        groups.setdefault(network_key(embed), []).append(place)
    found: dict[int, Tensor] = {}
    for places in groups.values():
        teachers: list[Any] = [getattr(embeds[place], "__self__", None) for place in places]
        if len(places) > 1 and hasattr(teachers[0], "embed_with"):
            outputs = teachers[0].embed_with(teachers[1:], images)
        else:  # one network, or the same function several times
            outputs = [embeds[places[0]](images)] * len(places)
        found |= dict(zip(places, outputs, strict=True))
    return [found[place] for place in range(len(embeds))]
