"""Makes the demo's image set in seconds: patterns of one glyph over photographs.

Ten classes, each a symbol of matplotlib's DejaVu fonts (Pillow's own font lacks them), repeated on a rotated lattice over a
patch of one of two photographs. Phase, rotation, size, spacing, polarity and tint vary between images, so that pixels and
colours hardly tell the classes apart, while any crop of an image shows its glyph: instance discrimination can learn that in a
minute or two.

Random numbers are numpy's Philox `random_raw`, with one key per image. Training backgrounds come from the left halves of the
photographs, validation backgrounds from the right halves. The same versions on the same kind of machine make the same bytes.
"""

import hashlib
import io
import math
import secrets
import shutil
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from fkd_ssl import files
from fkd_ssl.arrays import UInt8Array
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.progress import bar_disabled

CLASSES: dict[str, str] = {
    "circle": "●",
    "cross": "✚",
    "diamond": "◆",
    "flag": "⚑",
    "heart": "♥",
    "moon": "☾",
    "note": "♪",
    "square": "■",
    "star": "★",
    "triangle": "▲",
}
"""Folder name -> glyph."""

FONTS = ("DejaVuSans", "DejaVuSans-Bold")
PHOTOS = ("china.jpg", "flower.jpg")
SPLITS = ("train", "val")
MANIFEST = "glyphs.json"
VERSION = 1  # increased whenever the same parameters give other images

_QUALITY = 90
_CLUTTER = 0.2  # share of the photograph in the background
_TURN = 10.0  # degrees, of the whole pattern
_WOBBLE = 5.0  # degrees, of one glyph
_SHADES = 40.0  # grey levels that each channel of an ink may vary by
# in parts of the image's side
_SIZE = (24 / 64, 30 / 64)
_SHIFT = 2 / 64
_GAP = (0.95, 1.05)  # lattice step, in glyph sizes
_PATCH = (64, 194)  # side of a background patch in the photograph's pixels


def make_glyphs(
    out: str | Path,
    *,
    train_per_class: int = 150,
    val_per_class: int = 50,
    pixels: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Writes OUT/train/<class>/NNNNN.jpg and OUT/val/<class>/NNNNN.jpg, completely or not at all.

    An existing complete set of the same parameters is kept.

    Args:
        out: The folder; it must be missing or empty, or contain the same set.
        train_per_class: Training images of each of the ten classes.
        val_per_class: Validation images of each class.
        pixels: Side of the images, 16 to 1024.
        seed: Seed of all random numbers.
        progress: Show a progress bar on standard error.

    Returns:
        `out`.

    Raises:
        RequestError: A parameter is out of range, or `out` contains other files, another set, or a changed set.
    """
    out = Path(out)
    if min(train_per_class, val_per_class) < 1 or max(train_per_class, val_per_class) > 99999:
        raise RequestError(f"train_per_class {train_per_class}, val_per_class {val_per_class}: both must be 1 to 99999")
    if not 16 <= pixels <= 1024:
        raise RequestError(f"pixels {pixels}: the side must be 16 to 1024")
    if not 0 <= seed < 2**64:
        raise RequestError(f"seed {seed}: must be 0 to 2^64 - 1")
    counts = {"train": train_per_class, "val": val_per_class}
    asked = {"version": VERSION, "pixels": pixels, "seed": seed, **counts}
    if _is_made(out, asked):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{out.name}-{secrets.token_hex(6)}")
    try:
        temporary.mkdir()
        _write(temporary, counts, pixels, seed, progress)
        files.write_json(temporary / MANIFEST, {**asked, "content": _digest(temporary)})
        try:
            temporary.rename(out)  # replaces an empty folder, but fails if the folder contains something
        except OSError as error:
            if not _is_made(out, asked):  # else another process was faster
                raise RequestError(f"{out}: cannot be written: {error.strerror}") from error
        files.sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def glyph_image(name: str, split: str, index: int, *, pixels: int = 64, seed: int = 0) -> UInt8Array:
    """Returns the pixels of one image before JPEG, uint8 [pixels, pixels, 3]. They depend only on the arguments."""
    draws = _Draws(f"{seed}\n{split}\n{name}\n{index}")
    photo = _photos()[draws.below(len(PHOTOS))]
    height, width = photo.shape[:2]
    side = _PATCH[0] + draws.below(_PATCH[1] - _PATCH[0])
    left = draws.below(width // 2 - side) + (width // 2 if split == "val" else 0)
    top = draws.below(height - side)
    patch = Image.fromarray(photo[top : top + side, left : left + side]).convert("L")
    grey = np.asarray(patch.resize((pixels, pixels), Image.Resampling.BILINEAR), dtype=np.float32)[:, :, None]
    dark = np.array([low + draws.uniform(0, _SHADES) for low in (25, 25, 35)], dtype=np.float32)
    light = np.array([high - draws.uniform(0, _SHADES) for high in (230, 230, 220)], dtype=np.float32)
    ink, paper = (light, dark) if draws.uniform() < 0.5 else (dark, light)
    ground = (1 - _CLUTTER) * paper + _CLUTTER * grey
    mask = np.asarray(_pattern(CLASSES[name], draws, pixels), dtype=np.float32)[:, :, None] / 255
    image: UInt8Array = np.clip(np.rint(ground * (1 - mask) + ink * mask), 0, 255).astype(np.uint8)
    return image


def _pattern(glyph: str, draws: "_Draws", pixels: int) -> Image.Image:
    """Returns the coverage (mode L) of one glyph repeated on a lattice of random phase and direction."""
    size = round(pixels * draws.uniform(*_SIZE))
    stamp = _stamp(glyph, FONTS[draws.below(len(FONTS))], size)
    turn, step, direction = draws.uniform(-_TURN, _TURN), size * draws.uniform(*_GAP), draws.uniform(0, 2 * math.pi)
    along, across = step * math.cos(direction), step * math.sin(direction)
    x0, y0 = pixels / 2 + draws.uniform(0, step), pixels / 2 + draws.uniform(0, step)
    canvas = Image.new("L", (pixels, pixels))
    reach = int(pixels / step) + 2
    for i in range(-reach, reach + 1):
        for j in range(-reach, reach + 1):
            x, y = x0 + i * along - j * across, y0 + i * across + j * along
            if not (-size < x < pixels + size and -size < y < pixels + size):
                continue
            wobble = draws.uniform(-_WOBBLE, _WOBBLE)
            x += pixels * draws.uniform(-_SHIFT, _SHIFT)
            y += pixels * draws.uniform(-_SHIFT, _SHIFT)
            turned = stamp.rotate(turn + wobble, Image.Resampling.BILINEAR, expand=True)
            canvas.paste(255, (round(x - turned.width / 2), round(y - turned.height / 2)), turned)
    return canvas


class _Draws:
    """Uniform numbers from Philox's raw stream. NumPy never changes that stream, but may change its distributions."""

    def __init__(self, key: str) -> None:
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        self._philox = np.random.Philox(key=int.from_bytes(digest, "little"))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * (int(self._philox.random_raw()) >> 11) * 2.0**-53

    def below(self, end: int) -> int:
        return int(self.uniform() * end)


@cache
def _photos() -> tuple[UInt8Array, ...]:
    files_of_photos = resources.files("fkd_ssl.photos")
    return tuple(np.asarray(Image.open(io.BytesIO(files_of_photos.joinpath(name).read_bytes()))) for name in PHOTOS)


@cache
def _stamp(glyph: str, name: str, size: int) -> Image.Image:
    """Returns a glyph's coverage (mode L), cropped to its ink and a margin of two pixels."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    # not Raqm, which shapes text with the system's library and is missing from some builds of Pillow
    font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = (round(side) for side in font.getbbox(glyph))
    stamp = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(stamp).text((2 - left, 2 - top), glyph, fill=255, font=font)
    return stamp


def _write(folder: Path, counts: dict[str, int], pixels: int, seed: int, progress: bool) -> None:
    total = len(CLASSES) * sum(counts.values())
    with tqdm(total=total, unit="image", desc="glyphs", disable=bar_disabled(show=progress)) as bar:
        for split, count in counts.items():
            for name in CLASSES:
                (folder / split / name).mkdir(parents=True)
                for index in range(count):
                    buffer = io.BytesIO()
                    image = glyph_image(name, split, index, pixels=pixels, seed=seed)
                    Image.fromarray(image).save(buffer, "JPEG", quality=_QUALITY)
                    (folder / split / name / f"{index:05d}.jpg").write_bytes(buffer.getvalue())
                    bar.update(1)


def _digest(folder: Path) -> str:
    """Returns the sha256 of the names and bytes of all files below `train` and `val`."""
    digest = hashlib.sha256()
    paths = sorted(path for split in SPLITS for path in (folder / split).rglob("*") if not path.is_dir())
    for path in paths:
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _is_made(out: Path, asked: dict[str, Any]) -> bool:
    """Returns True if `out` is the complete requested set, and False if it is free. Raises RequestError otherwise."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST).is_file():
        raise RequestError(f"{out}: exists and has no {MANIFEST}, so it is not a set of glyphs; choose another folder")
    try:
        found = files.read_json(out / MANIFEST)
    except StoreError as error:
        raise RequestError(f"{error}; delete {out} or choose another folder") from error
    content = found.pop("content", None)
    if found != asked:
        raise RequestError(f"{out}: has glyphs of {found}, expected {asked}; choose another folder")
    if content != _digest(out):
        raise RequestError(f"{out}: its images were changed, added or deleted; delete it or choose another folder")
    return True
