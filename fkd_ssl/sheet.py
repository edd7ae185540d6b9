"""Contact sheets as PNG: an image with its stored crops and their neighbours, or a query with the images found."""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fkd_ssl import files
from fkd_ssl.arrays import Float32Array, UInt8Array
from fkd_ssl.crops import Records
from fkd_ssl.crops.operations import BLUR, FLIP, GREY, JITTER, OPERATIONS
from fkd_ssl.errors import RequestError

TILE, ACROSS = 168, 6
"""Side of a small picture in pixels, and the number of them in a row."""
_LARGE = 448  # side of the picture at the top
_GAP, _MARGIN, _LINE = 16, 24, 21
_PNG_HEADER, _MAX_BYTES = 33, 2**28  # bytes of a PNG's signature and IHDR chunk; maximum bytes of a sheet
_INK, _QUIET, _PAPER, _HIT = "#16181a", "#5c666c", "#ffffff", "#00795a"
# colours of the boxes of crops, which also have numbers
_COLOURS = ("#0072b2", "#d55e00", "#b0457f", "#8a6d00", "#5b4fc4", "#5f6b73")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A small picture of a sheet.

    Attributes:
        pixels: uint8 [H, W, 3].
        lines: Lines of text below it.
        same_class: Whether it has the class of the sheet's main image; None if a class is unknown.
    """

    pixels: UInt8Array
    lines: Sequence[str] = ()
    same_class: bool | None = None


def describe(record: Any) -> list[str]:
    """Describes a crop record in up to three lines: its box, its colours, and what else was done to it."""
    flags = int(record["flags"])
    lines = [f"box {record['width']} x {record['height']} px at left {record['left']}, top {record['top']}"]
    if flags & JITTER:
        factors = ", ".join(f"{name} ×{float(record[name]):.2f}" for name in ("brightness", "contrast", "saturation"))
        lines.append(f"{factors}, hue {360 * float(record['hue']):+.0f}°")
    words = {FLIP: "flipped", GREY: "greyscale", BLUR: f"blur sigma {float(record['sigma']):.1f} px (in a crop of 224 px)"}
    set_flags = [(name, flag.bit) for operation in OPERATIONS for name, flag in operation.flags.items() if flags & flag.bit]
    if rest := [words.get(bit, name) for name, bit in set_flags if bit != JITTER]:
        lines.append(", ".join(rest))
    return lines


def draw_crops(
    image: UInt8Array, records: Records, crops: Sequence[UInt8Array], near: Sequence[Sequence[Picture]], title: str, note: str
) -> bytes:
    """Draws an image with the boxes of its crops, and each crop followed by its neighbours; returns PNG.

    Args:
        image: uint8 [H, W, 3].
        records: Crop records [m], with boxes in pixels of the image.
        crops: The crops [m], uint8 [P, P, 3].
        near: The neighbours of each crop; empty without a teacher.
        title: Title of the sheet.
        note: Line below the title.
    """
    large = _contain(image, _LARGE)
    draw, scale = ImageDraw.Draw(large), large.width / image.shape[1]
    colours = [_COLOURS[k % len(_COLOURS)] for k in range(len(crops))]
    corners = []
    for colour, record in zip(colours, records, strict=True):
        left, top, width, height = (int(record[name]) * scale for name in ("left", "top", "width", "height"))
        box = (left, top, max(left, left + width - 1), max(top, top + height - 1))
        draw.rectangle(box, outline=_PAPER, width=5)
        draw.rectangle(box, outline=colour, width=3)
        corners.append((left, top))
    for number, (corner, colour) in enumerate(zip(corners, colours, strict=True), 1):  # above all boxes
        _badge(draw, corner, colour, number)
    notes = [(colour, describe(record)) for colour, record in zip(colours, records, strict=True)]
    cells = [[(Picture(pixels=crop), number)] for number, crop in enumerate(crops, 1)]
    if any(near):
        rows = [[*own, *((picture, 0) for picture in others)] for own, others in zip(cells, near, strict=True)]
    else:
        rows = [[own[0] for own in cells[k : k + ACROSS]] for k in range(0, len(cells), ACROSS)]
    return _draw(title, note, large, notes, rows)


def draw_found(query: UInt8Array, title: str, note: str, found: Sequence[Picture]) -> bytes:
    """Draws a query, uint8 [H, W, 3], and beside it the pictures found, the nearest first; returns PNG."""
    rows: list[list[tuple[Picture | None, int]]] = []
    for k in range(0, len(found), ACROSS - 1):
        first = None if rows else Picture(pixels=query, lines=("query",))
        rows.append([(first, 0), *((picture, 0) for picture in found[k : k + ACROSS - 1])])
    return _draw(title, note, None, [], rows)


def _draw(
    title: str,
    note: str,
    large: Image.Image | None,
    notes: Sequence[tuple[str, Sequence[str]]],
    rows: Sequence[Sequence[tuple[Picture | None, int]]],
) -> bytes:
    """Draws a title, a large picture with numbered notes beside it, and rows of small pictures.

    Each small picture has the number of its note, 0 for no note. None leaves its place empty.
    """
    body, bold = _font("DejaVuSans", 16), _font("DejaVuSans-Bold", 22)
    lines = max((len(picture.lines) for row in rows for picture, _ in row if picture), default=0)
    step = TILE + _GAP, TILE + _GAP + 6 + lines * _LINE
    width = 2 * _MARGIN + max(ACROSS, *map(len, rows)) * step[0] - _GAP
    head = _MARGIN + 64
    noted = sum(len(words) * _LINE + _GAP for _, words in notes)
    body_top = head + (max(large.height, noted) + _MARGIN if large else 0)
    sheet = Image.new("RGB", (width, body_top + len(rows) * step[1] + _MARGIN - _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    room = width - 2 * _MARGIN
    draw.text((_MARGIN, _MARGIN - 4), _shorten(title, bold, room), fill=_INK, font=bold)
    draw.text((_MARGIN, _MARGIN + 30), _shorten(note, body, room), fill=_QUIET, font=body)
    left, top = _MARGIN, head
    if large:
        sheet.paste(large, (left, top))
        left += large.width + _MARGIN
    for number, (colour, words) in enumerate(notes, 1):
        _badge(draw, (left, top), colour, number)
        for line in words:
            draw.text((left + 36, top), _shorten(line, body, width - left - 36 - _MARGIN), fill=_INK, font=body)
            top += _LINE
        top += _GAP
    for k, row in enumerate(rows):
        for j, (picture, number) in enumerate(row):
            place = (_MARGIN + j * step[0], body_top + k * step[1])
            if picture:
                _tile(sheet, place, picture, notes[number - 1][0] if number else "", number)
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    return png.getvalue()


def _tile(sheet: Image.Image, place: tuple[int, int], picture: Picture, colour: str, number: int) -> None:
    """Draws a small picture with its frame and its lines. A mark shows the same class to readers without colour vision."""
    draw, font, (left, top) = ImageDraw.Draw(sheet), _font("DejaVuSans", 15), place
    tile = _contain(picture.pixels, TILE)
    x, y = left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2
    sheet.paste(tile, (x, y))
    colour = _HIT if picture.same_class else colour
    if colour:
        draw.rectangle((x - 5, y - 5, x + tile.width + 4, y + tile.height + 4), outline=colour, width=4)
    if number:
        _badge(draw, (x - 5, y - 5), colour, number)
    for k, line in enumerate(picture.lines):
        mark = "" if k or picture.same_class is None else "✓ " if picture.same_class else "✗ "
        fill = _HIT if mark and picture.same_class else _QUIET if k else _INK
        draw.text((left, top + TILE + 8 + k * _LINE), _shorten(mark + line, font, TILE), fill=fill, font=font)


def _badge(draw: ImageDraw.ImageDraw, place: tuple[float, float], colour: str, number: int) -> None:
    """Draws a number on a rectangle of its crop's colour."""
    font = _font("DejaVuSans-Bold", 15)
    x, y = place
    draw.rectangle((x, y, x + (22 if number < 10 else 30), y + 21), fill=colour)
    draw.text((x + (11 if number < 10 else 15), y + 11), str(number), fill=_PAPER, font=font, anchor="mm")


def _contain(pixels: UInt8Array, side: int) -> Image.Image:
    return ImageOps.contain(Image.fromarray(np.ascontiguousarray(pixels)), (side, side), Image.Resampling.LANCZOS)


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Shortens a text in its middle until it fits: names often differ at both ends."""
    kept = text
    for length in range(len(text) - 1, 0, -1):
        if font.getlength(kept) <= room:
            break
        kept = f"{text[: (length + 1) // 2]}…{text[len(text) - length // 2 :]}"
    return kept


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's DejaVu Sans, which has more characters than Pillow's own font."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{name}.ttf"), size)


def check_replaceable(path: Path, option: str) -> None:
    """Raises RequestError if `path` exists and is not an unchanged PNG of `write`, or its folder is missing."""
    files.check_folder_of(path, option)
    if path.exists() or path.is_symlink():
        found = files.read_user_file(path, _MAX_BYTES) if path.is_file() else b""
        if found != _marked(found[:_PNG_HEADER] + found[_PNG_HEADER + len(_mark(b"")) :]):
            raise RequestError(f"{path}: exists and is not an unchanged sheet of fkd-ssl; choose another {option}")


def write(path: Path, png: bytes, option: str) -> None:
    """Writes a sheet, with a chunk that identifies it. Raises RequestError as `check_replaceable` does."""
    check_replaceable(path, option)
    files.replace(path, _marked(png))


def _marked(png: bytes) -> bytes:
    return png[:_PNG_HEADER] + _mark(png) + png[_PNG_HEADER:]


def _mark(png: bytes) -> bytes:
    """A tEXt chunk with the sha256 of the rest of the file."""
    body = b"tEXtfkd_ssl\0" + files.sha256(png).encode()
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


class Colours:
    """Colours for tokens: their first three principal components as red, green and blue.

    Args:
        tokens: float32 [n, D], from which the components and their ranges are computed.
    """

    def __init__(self, tokens: Float32Array) -> None:
        values = tokens.astype(np.float64)
        self._mean = values.mean(axis=0)
        _, _, axes = np.linalg.svd(values - self._mean, full_matrices=False)
        axes = axes[:3]
        axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:, None]  # the sign is arbitrary
        self._axes = axes
        self._low, self._high = np.percentile((values - self._mean) @ axes.T, (2, 98), axis=0)

    def over(self, crop: UInt8Array, grid: Float32Array) -> UInt8Array:
        """Draws a grid [h, w, D] over the crop uint8 [P, P, 3] that it belongs to, which shows through in grey."""
        found = (grid.astype(np.float64) - self._mean) @ self._axes.T
        shares = ((found - self._low) / np.maximum(self._high - self._low, 1e-12)).clip(0, 1)
        rgb = np.zeros((*grid.shape[:2], 3), dtype=np.uint8)
        rgb[..., : shares.shape[2]] = np.rint(255 * shares)
        cells = Image.fromarray(rgb).resize(crop.shape[1::-1], Image.Resampling.NEAREST)
        grey = Image.fromarray(np.ascontiguousarray(crop)).convert("L").convert("RGB")
        return np.asarray(Image.blend(grey, cells, 0.65))
