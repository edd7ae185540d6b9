"""A student's backbone as one file of safetensors, in the layout of torchvision or timm.

The projection head stays behind; a classifier's last layer comes along. The file is what --model and --init take too.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of export."""

    model: str
    """A run folder, a .ckpt of one, or an exported file."""
    out: str
    """The file, called .safetensors; one that is there is not overwritten."""
    layout: Literal["torchvision", "timm"] | None = None
    """Whose names the weights have; the student's own library's by default."""


def run(config: Config) -> int:
    """Writes it and says how it is loaded."""
    from pathlib import Path

    from fkd_ssl.commands import console, resolve
    from fkd_ssl.students.export import export

    student, pixels = resolve.student_of(config.model)
    line = export(student, Path(config.out), layout=config.layout, pixels=pixels)
    console.say(f"{config.out}: loads, for normalised floats [B, 3, {pixels}, {pixels}], with")
    console.show(line)
    return 0
