"""Makes a store of FKD's or Fast MEAL V2's published label files.

Their boxes and flips become the store's crops, to the pixel as FKD's code cuts them, and their labels a column, which train
--objective soft_ce --head classifier reads. The files are pickles: they are read by a loader that admits only arrays. The store
appears when it is whole; a killed run continues with the same command.
"""

from dataclasses import dataclass

POSITIONALS = ("labels",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of import-fkd."""

    labels: str
    """Folder of label files (.tar) with the images' folder structure, perhaps below train or imagenet/train."""
    images: str
    """The images that they were made of, as precompute takes them."""
    store: str
    """The new store."""
    codec: str | None = None
    """What the labels are; by their shape by default. Say marginal_renorm_k5 where the others' share is to be 0."""
    classes: int | None = None
    """K; as many as class folders by default."""
    name: str = "fkd"
    """Of the column."""
    pixels: int = 224
    """Side of the crops that the labels' teacher saw, for the record."""


def run(config: Config) -> int:
    """Imports and says what the store holds."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.errors import RequestError
    from fkd_ssl.store.exchange.fkd_store import import_fkd

    images = images_of(config.images)
    classes = config.classes if config.classes is not None else len(images.classes)
    if classes < 2:
        raise RequestError(f"{classes} classes, and {config.images} has {len(images.classes)} class folders; say --classes")
    store = import_fkd(
        config.labels, images, config.store, classes=classes, codec=config.codec, name=config.name,
        pixels=resolve.pixels_of(config.pixels, 224), threads=min(16, resolve.cpu_threads()), log=console.say,
    )  # fmt: skip
    codec = store.column(config.name).meta.codec
    console.show(f"{config.store}: {len(store):,} images x {store.crops_per_image} crops, labels {codec} of {classes} classes")
    return 0
