"""Image sets named NAME:SPLIT:ROOT, with the `root` of torchvision: `cifar10:test:/data`, `imagenette:val:/data`.

Nothing is downloaded.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fkd_ssl.arrays import UInt8Array
from fkd_ssl.errors import RequestError
from fkd_ssl.images.folder import scan
from fkd_ssl.images.source import ImageSource

SPLITS = {
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "stl10": ("train", "test"),
    "imagenette": ("train", "val"),
    "imagenet": ("train", "val"),
}
_FOLDERS = {"imagenette": ("imagenette2", "imagenette2-320", "imagenette2-160", "."), "imagenet": (".",)}


class Arrays(ImageSource):
    """Images in memory. They are encoded as PPM files, with names CLASS/NUMBER.ppm.

    Args:
        spec: As in ImageSource.
        pixels: uint8 [N, H, W, 3].
        labels: Indices into `classes` [N].
        classes: Names of the classes.
    """

    def __init__(self, spec: str, pixels: UInt8Array, labels: npt.ArrayLike, classes: list[str]) -> None:
        given = np.asarray(labels, dtype=np.int64)
        names = np.array([f"{classes[label]}/{row:06d}.ppm" for row, label in enumerate(given)])
        self._order = np.argsort(names, kind="stable")
        self._pixels = pixels
        in_order = sorted(classes)
        to_sorted = np.array([in_order.index(name) for name in classes], dtype=np.int64)
        super().__init__(spec, names[self._order].tolist(), to_sorted[given[self._order]], in_order)

    def read(self, index: int) -> bytes:
        """Returns image `index` as a PPM file."""
        image = np.ascontiguousarray(self._pixels[self._order[index]])
        return b"P6 %d %d 255\n" % (image.shape[1], image.shape[0]) + image.tobytes()

    def identity(self, name: str = "images", *, sizes: bool = True) -> dict[str, str]:
        """Returns what identifies this set in a run: its digest, since all images have the same number of bytes."""
        return {name: f"{len(self)} images in {len(self.classes)} classes, sha256 {self.digest()}"}


def load(spec: str) -> ImageSource:
    """Loads the image set NAME:SPLIT:ROOT from the files of torchvision under ROOT.

    CIFAR's files are pickles. Torchvision opens them only if their md5 is the published one, so no other code is executed.

    Raises:
        RequestError: The split is unknown, or the set is not found.
    """
    name, _, rest = spec.partition(":")
    split, colon, root = rest.partition(":")
    if split not in SPLITS[name] or not colon:
        raise RequestError(f"{spec}: expected {name}:SPLIT:ROOT, where SPLIT is {' or '.join(SPLITS[name])}")
    if name in _FOLDERS:
        for folder in _FOLDERS[name]:
            if (Path(root) / folder / split).is_dir():
                return scan(Path(root) / folder / split)
        looked = ", ".join(str(Path(root) / folder / split) for folder in _FOLDERS[name])
        raise RequestError(f"{spec}: {name} not found (looked for {looked}); nothing is downloaded")
    from torchvision import datasets

    try:
        if name == "stl10":
            made = datasets.STL10(root, split=split)
            pixels, labels = made.data.transpose(0, 2, 3, 1), made.labels
        else:
            made = (datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100)(root, train=split == "train")
            pixels, labels = made.data, made.targets
    except (RuntimeError, OSError) as error:
        raise RequestError(f"{spec}: {name} is missing or damaged ({error}); nothing is downloaded") from error
    return Arrays(spec, pixels, labels, made.classes)
