"""Teachers of tokens, `NAME@tokens`: the feature map of any teacher's network, pooled to a grid."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import nn

from fkd_ssl.errors import FkdError, RequestError
from fkd_ssl.targets import TargetSpec
from fkd_ssl.targets.tokens import TOKENS
from fkd_ssl.teachers.ensemble import Ensemble
from fkd_ssl.teachers.teacher import Teacher

GRID = 7
"""Default number of tokens along each side of the crop."""
_SUFFIX = f"@{TOKENS}"
_PROBE = 224  # side of the noise that D is measured on, where the network supports it: 518 px would take long


def split_name(name: str) -> tuple[str, bool]:
    """Splits NAME@tokens into NAME and whether it asks for tokens; raises RequestError if it asks twice."""
    if name.endswith(2 * _SUFFIX):
        raise RequestError(f"teacher {name}: give {_SUFFIX} once")
    return name.removesuffix(_SUFFIX), name.endswith(_SUFFIX)


def as_tokens(teacher: Teacher, *, name: str | None = None) -> Teacher:
    """Returns a teacher of tokens with the same network, so that both need one forward pass (`embed_with`).

    Args:
        teacher: Any teacher with a feature map. Its head is not used.
        name: Name of the column; by default the teacher's, with `-tokens`.

    Raises:
        RequestError: The network has no feature map.
        FkdError: The network fails.
    """
    info = teacher.info
    if isinstance(teacher, Ensemble):
        raise RequestError(f"teacher {info.name}: an ensemble has no feature map; name one network, NAME{_SUFFIX}")
    noise = torch.randint(
        0, 256, (1, 3, info.pixels, info.pixels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    try:
        dim = teacher.map(noise[:, :, :_PROBE, :_PROBE]).shape[3]
    except FkdError:
        if info.pixels <= _PROBE:
            raise
        dim = teacher.map(noise).shape[3]
    kept = {field.name: getattr(info, field.name) for field in fields(info) if field.name not in ("spec", "arrays")}
    changed = {"name": name or f"{info.name}-{TOKENS}", "network": f"feature map of {info.network}"}
    return Teacher(
        teacher.backbone,
        nn.Identity(),
        shape=(GRID, GRID, dim),
        kind=TOKENS,
        feature_dim=teacher.feature_dim,
        **{**kept, **changed},
    ).to(teacher.device)


def set_grid(teachers: Sequence[Teacher], grid: int | None) -> None:
    """Sets the grid of the teachers of tokens; None leaves it unchanged.

    Raises:
        RequestError: The grid is invalid, or no teacher gives tokens.
    """
    if grid is None:
        return
    if grid < 1:
        raise RequestError(f"--grid {grid}: must be at least 1")
    chosen = [teacher for teacher in teachers if teacher.info.spec.kind == TOKENS]
    if not chosen:
        names = ", ".join(teacher.info.name for teacher in teachers)
        raise RequestError(f"--grid {grid}: no teacher gives tokens ({names}): name one NAME{_SUFFIX}, or leave out --grid")
    for teacher in chosen:
        spec = TargetSpec(TOKENS, (grid, grid, teacher.info.spec.shape[2]))
        teacher.info = replace(teacher.info, spec=spec)
