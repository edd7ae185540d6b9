"""Opens the images that a command was given."""

from pathlib import Path

from fkd_ssl.commands import console
from fkd_ssl.errors import RequestError
from fkd_ssl.images import ImageSource, open_images
from fkd_ssl.images.opening import check_names
from fkd_ssl.options import Named

_said: set[str] = set()


def images_of(spec: str | Path) -> ImageSource:
    """Opens an image set with `open_images`; reports once which files were left out."""
    if isinstance(spec, Named) and not isinstance(spec.value, ImageSource):
        raise RequestError(f"{spec}: expected images, as a folder or an ImageSource")
    images = open_images(spec.value if isinstance(spec, Named) else spec)
    if isinstance(spec, Named):
        check_names(images)
    for note in images.notes:
        if note not in _said:
            _said.add(note)
            console.log(f"note: {note}")
    return images
