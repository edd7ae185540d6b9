"""Image sets by name, where torchvision keeps them on disk: cifar10, cifar100, stl10, imagenette, imagenet. Nothing downloads.

Spelt NAME:SPLIT:ROOT, with torchvision's ROOT, as `cifar10:test:/data` or `imagenette:val:/data`.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fkd_ssl.errors import RequestError, did_you_mean
from fkd_ssl.images import ImageSet, UInt8Array, scan

SPLITS = {
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "stl10": ("train", "test"),
    "imagenette": ("train", "val"),
    "imagenet": ("train", "val"),
}
_FOLDERS = {"imagenette": ("imagenette2", "imagenette2-320", "imagenette2-160", "."), "imagenet": (".",)}


@dataclass(frozen=True, kw_only=True)
class ArraySet(ImageSet):
    """Pictures in memory; their paths are CLASS/NUMBER.

    Attributes:
        pixels: uint8 [N, H, W, 3].
    """

    pixels: UInt8Array

    def read(self, index: int) -> UInt8Array:
        """Pixels uint8 [H, W, 3] of picture `index`."""
        found: UInt8Array = self.pixels[index]
        return found

    def subset(self, indices: npt.ArrayLike) -> "ArraySet":
        """The pictures at `indices`, in that order, with the same classes."""
        return dataclasses.replace(self, **super().subset(indices).__dict__, pixels=self.pixels[np.asarray(indices)])

    def identity(self, name: str = "images", *, sizes: bool = True) -> dict[str, str]:
        """What a run keeps of this set to know it again: a digest of pixels and classes."""
        return {name: f"{len(self)} images in {len(self.classes)} classes, sha256 {self.digest()}"}

    def digest(self) -> str:
        """Hex sha256 of pixels and classes."""
        sums = hashlib.sha256("\n".join([*self.paths, *self.classes]).encode())
        sums.update(np.ascontiguousarray(self.pixels).data)
        return sums.hexdigest()


def is_named(spec: str) -> bool:
    """Whether it is spelt NAME:SPLIT:ROOT; a folder of that name comes first."""
    return spec.count(":") >= 2 and not Path(spec).exists()


def load(spec: str) -> ImageSet:
    """The set NAME:SPLIT:ROOT.

    CIFAR's files are pickles: torchvision opens them only where their md5 is the published one, so nobody else's is run.

    Raises:
        RequestError: The name or split is unknown, or the set does not lie there.
    """
    name, split, root = spec.split(":", 2)
    if name not in SPLITS:
        raise RequestError(f"{spec}: no image set {name!r} (known: {', '.join(SPLITS)}){did_you_mean(name, SPLITS)}")
    if split not in SPLITS[name]:
        raise RequestError(f"{spec}: {name} has the splits {' and '.join(SPLITS[name])}, got {split!r}")
    if name in _FOLDERS:
        for folder in _FOLDERS[name]:
            if (Path(root) / folder / split).is_dir():
                return scan(Path(root) / folder / split)
        looked = ", ".join(str(Path(root) / folder / split) for folder in _FOLDERS[name])
        raise RequestError(f"{spec}: {name} does not lie there (looked for {looked}); nothing is downloaded")
    from torchvision import datasets

    try:
        if name == "stl10":
            made = datasets.STL10(root, split=split)
            pixels, labels = made.data.transpose(0, 2, 3, 1), made.labels
        else:
            made = (datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100)(root, train=split == "train")
            pixels, labels = made.data, made.targets
    except (RuntimeError, OSError) as error:
        raise RequestError(f"{spec}: {name} does not lie there, or is damaged ({error}); nothing is downloaded") from error
    return from_arrays(pixels, labels, made.classes, root)


def from_arrays(pixels: UInt8Array, labels: npt.ArrayLike, classes: list[str], root: str | Path = ".") -> ArraySet:
    """A set of pictures uint8 [N, H, W, 3] with labels [N], indices into `classes`, in the order of its paths."""
    known = np.asarray(labels, dtype=np.int64)
    names = np.array([f"{classes[label]}/{row:06d}" for row, label in enumerate(known)])
    order = np.argsort(names, kind="stable")
    sorted_classes = sorted(classes)
    to_sorted = np.array([sorted_classes.index(name) for name in classes])
    paths = names[order].tolist()
    return ArraySet(
        root=Path(root),
        paths=paths,
        labels=to_sorted[known[order]],
        classes=sorted_classes,
        on_disk=paths,
        pixels=np.ascontiguousarray(pixels[order]),
    )
