"""Exports a student's backbone to one safetensors file, in the layout of torchvision or timm.

The projection head is dropped; the last layer of a classifier is kept. --model and --init also accept the file.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of export."""

    model: str
    """A run folder, one of its .ckpt files, or an exported file."""
    out: str
    """The .safetensors file to write; an existing file is not overwritten."""
    layout: Literal["torchvision", "timm"] | None = None
    """Library whose names the weights get; by default the library of the student's backbone."""


def run(config: Config) -> int:
    """Writes the file and prints how to load it."""
    from pathlib import Path

    from fkd_ssl.commands import console, resolve
    from fkd_ssl.students.export import export

    student, pixels = resolve.student_of(config.model)
    line = export(student, Path(config.out), layout=config.layout, pixels=pixels)
    console.log(f"{config.out}: loads, for normalised floats [B, 3, {pixels}, {pixels}], with")
    console.print_result(line)
    return 0
