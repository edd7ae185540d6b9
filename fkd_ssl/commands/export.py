"""Exports a student's backbone: to safetensors in the layout of torchvision or timm, or to ONNX.

The projection head is dropped; the last layer of a classifier is kept. --model and --init also accept the safetensors file. An
.onnx file (opset 18; install 'fkd_ssl[onnx]') takes uint8 images of one size, in batches of any size, and normalises them; it
gives the features, and the feature map if there is one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fkd_ssl.errors import RequestError

if TYPE_CHECKING:
    from fkd_ssl.results import Exported


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of export."""

    model: str
    """A run folder, one of its .ckpt files, or an exported file."""
    out: str
    """The .safetensors or .onnx file to write; an existing file is not overwritten."""
    layout: Literal["torchvision", "timm"] | None = None
    """Library whose names the weights get; by default the library of the student's backbone. Not for .onnx."""
    pixels: int | None = None
    """Side of the images of an .onnx file; by default the size that the student was trained at."""

    def __post_init__(self) -> None:
        if self.out.endswith(".onnx") and self.layout is not None:
            raise RequestError("--layout is for .safetensors; leave it out for .onnx")
        if not self.out.endswith(".onnx") and self.pixels is not None:
            raise RequestError("--pixels is for .onnx; a .safetensors file accepts the sizes that its network does")


def run(config: Config) -> int:
    """Prints how to load the file."""
    from fkd_ssl.commands import console

    exported = work(config)
    console.log(exported.line.removesuffix(f"\n{exported.load}"))
    console.print_result(exported.load)
    return 0


def work(config: Config) -> "Exported":
    """Writes the file."""
    from pathlib import Path

    from fkd_ssl import files
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.results import Exported
    from fkd_ssl.students.export import export
    from fkd_ssl.students.onnx_export import ONNX, OPSET, export_onnx

    out = Path(config.out)
    files.check_folder_of(out, "--out")
    student, pixels = resolve.student_of(config.model)
    if out.suffix == ONNX:
        pixels = resolve.pixels_of(config.pixels, pixels)
        load, compared = export_onnx(student, out, pixels=pixels)
        if not compared:
            console.log("note: the file was not compared with the student: onnxruntime is not installed")
        takes = f"ONNX opset {OPSET}; run it, for uint8 RGB [B, 3, {pixels}, {pixels}], with"
    else:
        load = export(student, out, layout=config.layout, pixels=pixels)
        takes = f"load it, for normalised floats [B, 3, {pixels}, {pixels}], with"
    return Exported(line=f"{out}: {takes}\n{load}", out=out, load=load, pixels=pixels)
