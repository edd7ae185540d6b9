"""Contact sheets: an image with its stored crops and their neighbours, or a query with the images found."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from fkd_ssl import files
from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops import Records
from fkd_ssl.crops.operations import FLIP, JITTER, OPERATIONS

_INK, _PAPER = "#1d1d1f", "#ffffff"
_CELL = 1.25  # inches


TILE, CAPTION, ACROSS = 128, 16, 5
_GAP = 6


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A crop and its caption."""

    pixels: UInt8Array
    """uint8 [P, P, 3]."""
    caption: str


def describe(record: Any) -> str:
    """Describes the operations of a crop record in up to three short lines."""
    flags = int(record["flags"])
    lines = [f"{record['width']} x {record['height']}" + (", flip" if flags & FLIP else "")]
    if flags & JITTER:
        factors = ", ".join(f"{float(record[name]):.2f}" for name in ("brightness", "contrast", "saturation"))
        lines.append(f"{factors}, {float(record['hue']):+.2f}")
    names = [name for operation in OPERATIONS for name, flag in operation.flags.items() if flags & flag.bit & ~(FLIP | JITTER)]
    rest = ", ".join(f"blur {float(record['sigma']):.1f}" if name == "blur" else name for name in names)
    return "\n".join([*lines, *([rest] if rest else [])])


def draw(image: UInt8Array, records: Records, crops: Sequence[Picture], near: Sequence[Sequence[Picture]], title: str) -> bytes:
    """Draws a contact sheet; returns it as PNG.

    Args:
        image: uint8 [H, W, 3].
        records: Crop records [m], with boxes in pixels of the image.
        crops: The crops [m].
        near: The neighbours of each crop; empty without a teacher.
        title: Title of the sheet.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    colours = [colormaps["tab10"](k % 10) for k in range(len(crops))]
    cells = [[crop, *neighbours] for crop, neighbours in zip(crops, near, strict=True)]
    # without neighbours, the crops themselves fill the rows
    wide = max(map(len, cells)) if any(near) else min(6, len(crops))
    rows = cells if any(near) else [list(crops[k : k + wide]) for k in range(0, len(crops), wide)]
    side = 3.2 * image.shape[1] / max(image.shape[:2])
    figure = Figure(
        figsize=(side + 0.4 + wide * _CELL, max(3.6, 0.5 + len(rows) * (_CELL + 0.35))), facecolor=_PAPER, layout="constrained"
    )
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2, width_ratios=[side + 0.4, wide * _CELL])
    left, right = halves
    figure.suptitle(title, color=_INK, fontsize=9)
    axes = left.subplots()
    axes.imshow(image)
    axes.axis("off")
    for colour, record in zip(colours, records, strict=True):
        place = float(record["left"]) - 0.5, float(record["top"]) - 0.5
        box = Rectangle(place, int(record["width"]), int(record["height"]), fill=False, edgecolor=colour, linewidth=1.4)
        axes.add_patch(box)
    grid = right.subplots(len(rows), wide, squeeze=False)
    number = 0
    for k, line in enumerate(grid):
        for j, cell in enumerate(line):
            cell.set_xticks([])
            cell.set_yticks([])
            if j >= len(rows[k]):
                cell.axis("off")
                continue
            picture = rows[k][j]
            cell.imshow(picture.pixels)
            cell.set_xlabel(picture.caption, fontsize=6, color=_INK)
            own = j == 0 or not any(near)
            for spine in cell.spines.values():
                spine.set(visible=own, edgecolor=colours[number] if own else _INK, linewidth=2)
            number += own
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def write_found(path: Path, query: UInt8Array, title: str, found: Sequence[tuple[UInt8Array, str]]) -> None:
    """Writes the query above the images found: best first, five per row, each with its caption.

    Args:
        path: The PNG to write; an existing file is replaced.
        query: uint8 [H, W, 3].
        title: Caption of the query.
        found: Pictures uint8 [H, W, 3] and their captions.
    """
    cell = (TILE + _GAP, TILE + CAPTION + _GAP)
    sheet = Image.new("RGB", (ACROSS * cell[0] + _GAP, (1 + math.ceil(len(found) / ACROSS)) * cell[1] + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = _font()
    for place, (pixels, caption) in enumerate([(query, title), *found]):
        across, down = (0, 0) if place == 0 else ((place - 1) % ACROSS, 1 + (place - 1) // ACROSS)
        left, top = _GAP + across * cell[0], _GAP + down * cell[1]
        tile = ImageOps.contain(Image.fromarray(pixels), (TILE, TILE))
        sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        room = TILE if place else sheet.width - 2 * _GAP
        while caption and draw.textlength(caption, font=font) > room:
            caption = caption[:-1]
        draw.text((left, top + TILE + 1), caption, fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    files.replace(path, buffer.getvalue())


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Matplotlib's DejaVu Sans, which has more characters than Pillow's own font."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 11)
