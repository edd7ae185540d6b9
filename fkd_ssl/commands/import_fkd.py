"""Makes a store from the published label files of FKD or Fast MEAL V2.

The boxes and flips become the store's crops, identical to the pixel to FKD's own, and the labels become a column for train
--objective soft_ce --head classifier. The files are pickles; the loader accepts only arrays. The store appears when it is
complete. To continue a killed run, repeat the command.
"""

from dataclasses import dataclass

POSITIONALS = ("labels",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of import-fkd."""

    labels: str
    """Folder of label files (.tar) with the folder structure of the images, optionally below train or imagenet/train."""
    images: str
    """Images that the labels were made from, in any form that precompute accepts."""
    store: str
    """Folder of the new store."""
    codec: str | None = None
    """Form of the labels; by default inferred from their shape. marginal_renorm_k5 gives all other classes probability 0."""
    classes: int | None = None
    """K, number of classes; by default the number of class folders."""
    column: str = "fkd"
    """Name of the column."""
    pixels: int = 224
    """Side of the crops that the teacher of the labels saw; only recorded."""


def run(config: Config) -> int:
    """Imports the labels and reports the contents of the store."""
    from fkd_ssl.commands import console, resolve
    from fkd_ssl.commands.images import images_of
    from fkd_ssl.errors import RequestError
    from fkd_ssl.store.exchange.fkd_store import import_fkd

    images = images_of(config.images)
    classes = config.classes if config.classes is not None else len(images.classes)
    if classes < 2:
        raise RequestError(
            f"--classes {classes}: must be at least 2; by default the number of class folders of {config.images}, which has "
            f"{len(images.classes)}"
        )
    store = import_fkd(
        config.labels,
        images,
        config.store,
        classes=classes,
        codec=config.codec,
        column=config.column,
        pixels=resolve.pixels_of(config.pixels, 224),
        threads=min(16, resolve.cpu_threads()),
        log=console.log,
    )
    codec = store.column(config.column).meta.codec
    console.print_result(
        f"{config.store}: {len(store):,} images x {store.crops_per_image} crops, labels {codec} of {classes} classes"
    )
    return 0
