"""Exports a student's backbone to one safetensors file, in the layout of torchvision or timm.

The projection head is dropped; the last layer of a classifier is kept. --model and --init also accept the file.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fkd_ssl.results import Exported


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
    """Prints how to load the file."""
    from fkd_ssl.commands import console

    exported = work(config)
    console.log(f"{config.out}: load it, for normalised floats [B, 3, {exported.pixels}, {exported.pixels}], with")
    console.print_result(exported.load)
    return 0


def work(config: Config) -> "Exported":
    """Writes the file."""
    from pathlib import Path

    from fkd_ssl.commands import resolve
    from fkd_ssl.results import Exported
    from fkd_ssl.students.export import export

    student, pixels = resolve.student_of(config.model)
    out = Path(config.out)
    load = export(student, out, layout=config.layout, pixels=pixels)
    line = f"{out}: load it, for normalised floats [B, 3, {pixels}, {pixels}], with\n{load}"
    return Exported(line=line, out=out, load=load, pixels=pixels)
