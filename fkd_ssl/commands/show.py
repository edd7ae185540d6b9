"""Draws the stored crops of an image: their boxes, their pixels, and the nearest crops of other images.

The sheet is a PNG. Neighbours are the crops of other images with the highest cosine similarity of stored targets, so they show
what the teacher considers similar. For a column of tokens, the sheet also has the grid of each crop, with its first three
principal components as colours, and beside it that of a student (--model).
"""

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fkd_ssl.arrays import UInt8Array
from fkd_ssl.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fkd_ssl.images import ImageSource
    from fkd_ssl.results import Sheet
    from fkd_ssl.sheet import Picture
    from fkd_ssl.store import Store
    from fkd_ssl.store.maintain.nearest import Neighbour

POSITIONALS = ("store",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of show."""

    store: str
    """Folder or URL of the store."""
    images: str
    """The images of the store, as given to precompute."""
    image: str
    """Path of the image in that folder."""
    out: str = "sheet.png"
    """The PNG to write. It replaces an earlier sheet, but no other file."""
    column: str | None = None
    """Column to find neighbours with; needed only if the store has several."""
    model: str | None = None
    """For a column of tokens: a run folder of train, one of its checkpoints, or an export, drawn beside the stored tokens."""
    crops: int | None = None
    """Number of crops to show, starting with the first; by default 6, or all if fewer are stored."""
    neighbours: int = 5
    """Number of neighbours of each crop; 0 for none."""
    among: int = 1
    """Number of crops of each other image to search, starting with the first."""
    pixels: int = 168
    """Side of the drawn crops in pixels; with the side of a training, they are what the student sees."""

    def __post_init__(self) -> None:
        for name, low, high in (("crops", 1, 24), ("neighbours", 0, 12), ("among", 1, 10**6), ("pixels", 8, 512)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise RequestError(f"{name} {value}: must be between {low} and {high}")


def run(config: Config) -> int:
    """Prints where the sheet is and what it shows."""
    from fkd_ssl.commands import console

    console.print_result(work(config).line)
    return 0


def work(config: Config) -> "Sheet":
    """Draws the sheet."""
    from pathlib import Path

    from fkd_ssl import sheet
    from fkd_ssl.results import Sheet
    from fkd_ssl.store import open_store

    out = Path(config.out)
    sheet.check_replaceable(out, "--out")
    picture, title = sheet_of(config, open_store(config.store))
    sheet.write(out, picture, "--out")
    return Sheet(line=f"{out}: {title}", out=out)


def sheet_of(config: Config, store: "Store") -> tuple[bytes, str]:
    """Draws the sheet as PNG; also returns a description of it."""
    from tqdm.auto import tqdm

    from fkd_ssl import sheet
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.crops import replay
    from fkd_ssl.progress import bar_disabled
    from fkd_ssl.store.maintain.nearest import nearest

    count = min(6, store.crops_per_image) if config.crops is None else config.crops
    if count > store.crops_per_image:
        raise RequestError(f"crops {count}: {store.folder} holds {store.crops_per_image} crops of each image")
    row = _row(store, config.image)
    images = images_of(config.images)
    image, name_of_class = _image(store, images, row)
    records = store.crops(row, slice(0, count))
    crops = [view.transpose(1, 2, 0) for view in replay(image, records, config.pixels)]
    near: list[list[Picture]] = [[] for _ in crops]
    said = f"the first {len(crops)} of {store.crops_per_image} stored crops"
    if config.model is not None or (config.column is not None and store.column(config.column).meta.target.kind == "tokens"):
        near = _tokens(config, store, row, image, crops)
        said += ", their tokens in colours"
    if config.neighbours:
        column = store.column(config.column)
        with tqdm(total=len(column.rows) - 1, unit="img", desc="neighbours", disable=bar_disabled(show=True)) as bar:
            found = nearest(
                column,
                store.targets(column.name, row, slice(0, count)),
                count=config.neighbours,
                crops=config.among,
                without=row,
                done=bar.update,
            )
        for line, neighbours in zip(near, found, strict=True):
            line += [_picture(store, images, config.pixels, neighbour, name_of_class) for neighbour in neighbours]
        said += f", each with its nearest crops of {len(column.rows) - 1:,} other images by the targets of {column.name}"
    name = config.image.rpartition("/")[2]
    title = f"{name_of_class} / {name}" if name_of_class else name
    note = f"{said}; ✓ and a frame: the same class" if name_of_class and config.neighbours else said
    return sheet.draw_crops(image, records, crops, near, title, note), f"{config.image}: {said}"


def _tokens(
    config: Config, store: "Store", row: int, image: "UInt8Array", crops: "Sequence[UInt8Array]"
) -> "list[list[Picture]]":
    """Draws the stored tokens of each crop, and the student's if there is a model."""
    import torch

    from fkd_ssl.commands import resolve
    from fkd_ssl.crops import replay
    from fkd_ssl.sheet import Colours, Picture
    from fkd_ssl.students import EXPORTED

    column, chosen = store.column(config.column), slice(0, len(crops))
    shape = column.meta.target.shape
    if column.meta.target.kind != "tokens":
        raise RequestError(
            f"--model {config.model}: is only for columns of tokens, and {column.name} has {column.meta.target}; leave it out"
        )
    stored = store.targets(column.name, row, chosen)
    colours = Colours(stored.reshape(-1, shape[-1]))
    lines = [[Picture(pixels=colours.over(crop, grid), lines=(column.name,))] for crop, grid in zip(crops, stored, strict=True)]
    if config.model is None:
        return lines
    student, pixels = resolve.student_of(config.model)
    views = torch.from_numpy(replay(image, store.crops(row, chosen), pixels))
    with torch.inference_mode():
        heads = [] if config.model.endswith(EXPORTED) else [k for k, dim in enumerate(student.dims) if dim == shape]
        found = (student.embeddings(views)[heads[0]] if heads else student.map(views)).numpy()
    if not heads:  # an export, or a student of other targets: its map has components of its own
        colours = Colours(found.reshape(-1, found.shape[-1]))
    for line, crop, grid, exact in zip(lines, crops, found, stored, strict=True):
        said = f"cosine {(grid * exact).sum(axis=-1).mean():.3f}" if heads else "its own colours"
        line.append(Picture(pixels=colours.over(crop, grid), lines=("student", said)))
    return lines


def _row(store: "Store", image: str) -> int:
    """The row of an image; raises RequestError if it is unknown or cannot be shown."""
    import difflib

    names, image = list(store.paths), unicodedata.normalize("NFC", image)
    if image not in names:
        near = difflib.get_close_matches(image, names[:100_000], n=1, cutoff=0.5)
        nearest = f"; did you mean {near[0]}?" if near else f"; {store.folder / 'images.txt'} lists them"
        raise RequestError(f"image {image!r}: {store.folder} has no such image{nearest}")
    row = names.index(image)
    if row not in store.rows:
        raise RequestError(f"image {image!r}: its crops are not stored: it was skipped, or its shard is not finished")
    return row


def _image(store: "Store", images: "ImageSource", row: int) -> tuple["UInt8Array", str]:
    """Reads the pixels uint8 [H, W, 3] of a row's image, and its class, empty if it has none."""
    import numpy as np

    index = int(store.find_images(images, np.array([row]))[0])
    return images.pixels(index), images.class_of(index)


def _picture(store: "Store", images: "ImageSource", pixels: int, neighbour: "Neighbour", name_of_class: str) -> "Picture":
    """Draws a neighbour of an image of the class `name_of_class`."""
    from fkd_ssl.crops import replay
    from fkd_ssl.sheet import Picture

    image, own = _image(store, images, neighbour.row)
    view = replay(image, store.crops(neighbour.row, slice(neighbour.crop, neighbour.crop + 1)), pixels)[0]
    lines = [*([own] if own else []), f"cosine {neighbour.cosine:.3f}", store.paths[neighbour.row].rpartition("/")[2]]
    same = own == name_of_class if own and name_of_class else None
    return Picture(pixels=view.transpose(1, 2, 0), lines=lines, same_class=same)
