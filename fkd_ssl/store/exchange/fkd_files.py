"""Reads (without executing anything) and writes FKD's published label files: one torch pickle per image.

Each contains `[boxes, flips, labels]`.

Shen and Xing, ECCV 2022 (arXiv 2112.01528), and Fast MEAL V2, which uses the same script for its files. Legend: `C` crops, `K`
classes, `k` of them kept.

- boxes float32 or float16 [C, 4]: top, left, height and width as fractions of the image's sides;
- flips bool [C];
- labels: class numbers [C] (hard), class and probability [C, 2] (smoothing), classes and probabilities [C, 2, k] (marginal),
  all probabilities [C, K] (full).
"""

import io
import stat
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fkd_ssl import checkpoints, files
from fkd_ssl.arrays import UInt8Array
from fkd_ssl.crops import Records
from fkd_ssl.crops.operations import FLIP
from fkd_ssl.crops.records import neutral
from fkd_ssl.errors import CheckpointError, RequestError, StoreError
from fkd_ssl.pickles import UnsafePickleError
from fkd_ssl.store import manifest as layout
from fkd_ssl.targets.label_codecs import LabelCodec

_MAX_BYTES = 2**28  # maximum bytes of a file; 500 crops of 21,841 classes in fp32 take 44 MB
_DTYPES = ("BoolDType", "Float16DType", "Float32DType", "Float64DType", "Int32DType", "Int64DType")
_rebuild: Any = np.zeros(0).__reduce__()[0]  # NumPy's own function; its module differs between versions
# what such a file may name in addition to tensors; NumPy before version 2 has another module name
_ALLOWED: dict[str, Any] = {
    **{f"numpy.{core}.multiarray._reconstruct": _rebuild for core in ("core", "_core")},
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{f"numpy.dtypes.{name}": getattr(np.dtypes, name) for name in _DTYPES},
}
_TOLERANCE = 1e-2  # tolerance of a sum of probabilities
_BOX_TOLERANCE = 1e-3  # tolerance as a fraction of the image's side, for boxes rounded to float16
LARGEST_EXACT = 2048  # integers up to this one are exact in float16
_PLACES = ("", "train", "imagenet", "imagenet/train")  # subfolders of the labels in the layouts of the authors' scripts


class Labels:
    """The crops and labels of one image.

    Attributes:
        boxes: Fractions float64 [C, 4] of top, left, height, width.
        flips: bool [C].
        labels: Labels as in the file: [C], [C, 2], [C, 2, k] or [C, K].
    """

    def __init__(self, boxes: npt.NDArray[Any], flips: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
        self.boxes = boxes.astype(np.float64)
        self.flips = flips.astype(bool)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.boxes)

    def records(self, height: int, width: int) -> Records:
        """Returns crop records [C] for an image of this size, with exactly the boxes that FKD's code crops.

        FKD passes fractions times sides to torchvision's `resized_crop`, and Pillow rounds the four edges of the box, half to
        even. Parts outside the image are cut off.

        Raises:
            StoreError: A box is outside the image by more than the rounding of float16, or has no area inside it.
        """
        if self.boxes.min() < -_BOX_TOLERANCE or (self.boxes[:, :2] + self.boxes[:, 2:]).max() > 1 + _BOX_TOLERANCE:
            raise StoreError("a box is outside the image")
        top, left, high, wide = (self.boxes * [height, width, height, width]).T
        edges = [np.rint(edge) for edge in (top, left, top + high, left + wide)]
        y0, y1 = (edge.clip(0, height) for edge in (edges[0], edges[2]))
        x0, x1 = (edge.clip(0, width) for edge in (edges[1], edges[3]))
        if (y1 <= y0).any() or (x1 <= x0).any():
            raise StoreError("a box has no area inside the image")
        records = neutral(len(self))
        for name, values in (("top", y0), ("left", x0), ("height", y1 - y0), ("width", x1 - x0)):
            records[name] = values.astype(np.int64)
        records["flags"] = np.where(self.flips, FLIP, 0)
        return records

    def codec(self) -> str:
        """Returns the codec for labels of this shape."""
        if self.labels.ndim == 3:
            return f"marginal_smoothing_k{self.labels.shape[2]}"
        if self.labels.ndim == 1:
            return "hard"
        return "smoothing" if self.labels.shape[1] == 2 else "full"

    def codes(self, codec: LabelCodec) -> UInt8Array:
        """Returns the codes uint8 [C, code_size]. Raises StoreError if the labels do not fit the codec's number of classes."""
        of_a_crop = {"hard": (), "smoothing": (2,), "full": (codec.dim,)}.get(codec.spec, (2, codec.kept))
        if self.labels.shape[1:] != of_a_crop:
            expected = ", ".join(map(str, ("C", *of_a_crop)))
            raise StoreError(f"labels {list(self.labels.shape)}, expected [{expected}] of {codec.spec}, {codec.dim} classes")
        if codec.spec == "full":
            try:
                return codec.encode(self.labels.astype(np.float32))
            except RequestError as error:
                raise StoreError(str(error)) from error
        labels = self.labels.reshape(len(self), -1, codec.kept).astype(np.float64)
        classes, values = labels[:, 0], labels[:, 1] if labels.shape[1] > 1 else np.ones_like(labels[:, 0])
        if not np.isfinite(labels).all() or (classes != np.rint(classes)).any():
            raise StoreError(f"labels {list(self.labels.shape)} do not fit codec {codec.spec}")
        if self.labels.dtype == np.float16 and codec.dim > LARGEST_EXACT:
            raise StoreError(f"class numbers in float16, which is exact up to {LARGEST_EXACT}, of {codec.dim} classes")
        if (
            (classes < 0).any()
            or (classes >= codec.dim).any()
            or (values < 0).any()
            or (values.sum(axis=1) > 1 + _TOLERANCE).any()
        ):
            raise StoreError(f"labels that are not probabilities of {codec.dim} classes")
        rest = (1 - values.sum(axis=1, keepdims=True)) / (codec.dim - codec.kept)
        if (1.01 * values + _TOLERANCE / (codec.dim - codec.kept) < rest).any():
            raise StoreError(f"labels whose classes are not the most probable of {codec.dim}")
        codes = codec.pack(classes.astype(np.int64), values.astype(np.float32))
        codec.decode(codes)  # raises an error if a class occurs twice
        return codes


def read(path: Path) -> Labels:
    """Reads a label file.

    Raises:
        StoreError: The file is missing, not a regular file or too large, or does not contain three arrays.
    """
    too_large = StoreError(f"{path}: over {_MAX_BYTES} bytes: not an FKD label file")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise StoreError(f"{path}: not a regular file")
        if status.st_size > _MAX_BYTES:
            raise too_large
        parts = checkpoints.load(path, allowed=_ALLOWED)
        if not all(isinstance(part, np.ndarray | torch.Tensor) for part in parts):  # a list can contain itself
            raise TypeError
        boxes, flips, labels = (np.asarray(part) for part in parts)
        if boxes.nbytes + flips.nbytes + labels.nbytes > _MAX_BYTES:  # a view of one number can have any size
            raise too_large
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror or error}") from error
    except StoreError:
        raise
    except (CheckpointError, TypeError, ValueError) as error:
        reason = error.__cause__ if isinstance(error.__cause__, UnsafePickleError) else type(error).__name__
        raise StoreError(f"{path}: not an FKD label file ({reason})") from error
    count = len(boxes) if boxes.ndim else 0
    right = (
        boxes.shape == (count, 4)
        and flips.shape == (count,)
        and labels.ndim in (1, 2, 3)
        and len(labels) == count > 0
        and count <= layout.MAX_CROPS  # checked before anything is copied
        and boxes.dtype.kind == "f"
        and flips.dtype.kind in "biu"
        and labels.dtype.kind in "fiu"
        and np.isfinite(boxes.astype(np.float64)).all()
        and (labels.ndim < 3 or labels.shape[1] == 2)
        and np.isin(flips, (0, 1)).all()
    )
    if not right:
        shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in (boxes, flips, labels))
        raise StoreError(f"{path}: holds {shapes}; expected boxes [C, 4], flips [C] and labels")
    return Labels(boxes, flips, labels)


def write(path: Path, records: Records, height: int, width: int, labels: npt.NDArray[Any], *, fp16: bool) -> bool:
    """Writes a label file; returns whether it is new. Raises StoreError if it exists with other contents."""
    sides = np.array([height, width, height, width], dtype=np.float64)
    boxes = np.stack([records[name] for name in ("top", "left", "height", "width")], axis=1) / sides
    flips = (records["flags"] & FLIP) != 0
    parts = [
        boxes.astype(np.float16 if fp16 else np.float32),
        flips,
        labels.astype(np.float16) if fp16 else torch.from_numpy(labels),
    ]
    made = io.BytesIO()
    torch.save(parts, made)
    if path.exists():
        if path.read_bytes() != made.getvalue():
            raise StoreError(f"{path}: exists and holds other labels; choose another --out, or delete it")
        return False
    with files.create(path) as file:
        file.write(made.getvalue())
    return True


def unpacked(codec: LabelCodec, codes: UInt8Array) -> npt.NDArray[Any]:
    """Decodes codes to labels in the layout of FKD's files."""
    if codec.spec == "full":
        return codec.decode(codes)
    classes, values = codec.unpack(codes)
    if codec.spec == "hard":
        return classes[:, 0]
    both = np.stack([classes.astype(np.float32), values], axis=1)
    return both[:, :, 0] if codec.spec == "smoothing" else both


def label_file(path: str) -> str:
    """Returns the path of an image's label file, with the suffix .tar. FKD cuts an image's name at its first dot."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.split('.')[0]}.tar"


def check_names(paths: Iterable[str]) -> None:
    """Raises RequestError if two of these sorted images share a label file."""
    for one, other in pairwise(paths):
        if label_file(one) == label_file(other):
            raise RequestError(f"{one!r} and {other!r} would share the label file {label_file(one)!r}; rename one of them")


def find(folder: Path, paths: Sequence[str]) -> Path:
    """Returns the folder of the label files with the structure of the images: `folder` or a subfolder.

    Raises:
        RequestError: No label file of these images is found.
    """
    for place in _PLACES:
        if any((folder / place / label_file(path)).is_file() for path in paths[:: -(-len(paths) // 100)]):
            return folder / place
    raise RequestError(
        f"{folder}: has no label files of these images (looked for {label_file(paths[0])!r} in it, in {', '.join(_PLACES[1:])})"
    )
