"""Contact sheets: a query and the images that were found for it, in one PNG."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from fkd_ssl import files
from fkd_ssl.images import UInt8Array

TILE, CAPTION, ACROSS = 128, 16, 5
_GAP = 6


def write(path: Path, query: UInt8Array, title: str, found: Sequence[tuple[UInt8Array, str]]) -> None:
    """Writes the query above the images found, each with its caption, best first, five in a row.

    Args:
        path: A PNG; it is replaced where it exists.
        query: uint8 [H, W, 3].
        title: Its caption.
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
    """Matplotlib's DejaVu Sans, which has more letters than Pillow's own."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 11)
