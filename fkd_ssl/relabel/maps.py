"""Reads label maps from disk, and pools the targets of crops from them.

Yun et al., "Re-labeling ImageNet", CVPR 2021 (arXiv 2101.05022), section 3.2, LabelPooling.

Legend: `M` crops, `K` classes, `k` of them kept at each of `h` x `w` places.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import roi_align

from fkd_ssl import files
from fkd_ssl.arrays import Float32Array, Int64Array, UInt8Array
from fkd_ssl.crops import Records, unpack
from fkd_ssl.errors import StoreError
from fkd_ssl.images import ImageSource
from fkd_ssl.relabel import layout
from fkd_ssl.store.listing import read_images
from fkd_ssl.text import plural


class LabelMaps:
    """A finished folder of label maps, memory-mapped. fkd-ssl label-maps creates it.

    Args:
        folder: The folder.

    Attributes:
        folder: The folder.
        manifest: The manifest: `teacher`, `classes` (K), `k`, `height`, `width`, `pixels` and more.
        paths: Relative path of each row's image.
        sizes: `bytes`, `width` and `height` of each row's image.

    Raises:
        StoreError: The label maps are missing or not finished, or the manifest or the list of images is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = layout.read_manifest(self.folder)
        self.paths, self.sizes = read_images(self.folder, self.manifest)
        if missing := layout.missing_shards(self.folder, self.manifest):
            raise StoreError(
                f"{self.folder}: {len(missing)} of {plural(self.manifest.shards, 'shard')} missing: run "
                "the same fkd-ssl label-maps again to finish them"
            )
        self._shards: dict[int, npt.NDArray[np.void]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # a pickled memory map would copy the file

    @property
    def classes(self) -> int:
        """K."""
        return self.manifest.classes

    def rows(self, images: ImageSource) -> Int64Array:
        """Returns the row of each image by its name: int64 [N]. Raises StoreError, naming the first image without a row."""
        rows = self.paths.positions(images.names)
        if missing := np.flatnonzero(rows < 0).tolist():
            raise StoreError(
                f"{self.folder}: has no label maps of {len(missing)} of the {len(images)} images of {images.spec}, for "
                f"instance {images.names[missing[0]]!r}: give the images that they were made of, or make maps of these with "
                "fkd-ssl label-maps"
            )
        return rows

    def read(self, row: int) -> tuple[Int64Array, Float32Array]:
        """Returns class numbers int64 [k, h, w] and their logits float32 [k, h, w], largest first, of an image.

        Raises:
            IndexError: The row does not exist.
            StoreError: The file is missing or damaged.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard, within = divmod(row, self.manifest.rows_per_shard)
        if shard not in self._shards:
            path, rows = layout.maps_file(self.folder, shard), len(self.manifest.shard_rows(shard))
            layout.read_sidecar(path, self.manifest, shard)
            self._shards[shard] = files.map_npy(path, self.manifest.dtype, (rows,))
        record = self._shards[shard][within]
        if layout.skipped_in(record[None]):
            raise StoreError(f"{self.folder}: no label map of {self.paths[row]!r}, which could not be read when they were made")
        classes, logits = record["classes"].astype(np.int64), record["logits"].astype(np.float32)
        if (classes >= self.classes).any() or not np.isfinite(logits).all():
            raise StoreError(
                f"{layout.maps_file(self.folder, shard)}: row {within} has invalid classes or logits; "
                "delete it and its .json, and run the same fkd-ssl label-maps again"
            )
        return classes, logits

    def targets(self, row: int, records: Records) -> Tensor:
        """Returns class probabilities float32 [M, K] of crops of an image: RoIAlign of its map to one place, then the softmax.

        A class that is not among the k of a place has logit 0 there, as in the authors' code. RoIAlign takes one bilinear
        sample per place that the box covers; for the whole image this gives the mean of the map. A flip changes nothing.

        There are two differences from the authors' code. First, it passes (top, left, bottom, right) to roi_align, which
        expects (x1, y1, x2, y2). Unless the published maps are stored transposed, which their code does not show, a crop gets
        the label of the box mirrored at the diagonal. Here x runs along the width. Second, it enlarges a box that is smaller
        than one place by moving its right and lower edges, as roi_align without `aligned` does. Here such a box keeps its
        centre. Crops of at least a twelfth of the image, on maps of 15 x 15 places, are never that small.

        Args:
            row: Row of the image.
            records: Crop records [M], with boxes in pixels of the image that the map was made from.

        Raises:
            ImageError: A box is outside that image.
            StoreError: As in `read`.
        """
        height, width = int(self.sizes["height"][row]), int(self.sizes["width"][row])
        boxes = np.array([box[:4] for box in unpack(records, height, width)], dtype=np.float64).reshape(-1, 4)
        top, left, tall, wide = boxes.T
        x, y = self.manifest.width / width, self.manifest.height / height
        corners = np.stack([left * x, top * y, (left + wide) * x, (top + tall) * y], axis=1).astype(np.float32)
        classes, logits = self.read(row)
        present, place = np.unique(classes, return_inverse=True)
        maps = np.zeros((len(present), *classes.shape[1:]), dtype=np.float32)  # all logits of other classes are 0
        np.put_along_axis(maps, place.reshape(classes.shape), logits, axis=0)
        pooled = roi_align(torch.from_numpy(maps)[None], [torch.from_numpy(corners)], output_size=1, aligned=True)
        whole = torch.zeros(len(boxes), self.classes)
        whole[:, torch.from_numpy(present)] = pooled[:, :, 0, 0]
        return whole.softmax(dim=1)

    def image_checksums(self) -> UInt8Array:
        """Returns the sha256 of all images as uint8 [N, 32]. Raises StoreError if a sidecar is damaged."""
        paths = [layout.maps_file(self.folder, shard) for shard in range(self.manifest.shards)]
        sidecars = [layout.read_sidecar(path, self.manifest, shard) for shard, path in enumerate(paths)]
        return np.concatenate([files.digest_array(s["images"], p) for s, p in zip(sidecars, paths, strict=True)])

    def verify(self) -> None:
        """Compares every file of maps with its checksum. Raises StoreError, naming the first that differs."""
        for shard in range(self.manifest.shards):
            path = layout.maps_file(self.folder, shard)
            if files.sha256_file(path) != layout.read_sidecar(path, self.manifest, shard)["file"]:
                raise StoreError(
                    f"{path}: damaged: its sha256 differs from the one in its .json; delete both files and run the "
                    "same fkd-ssl label-maps again"
                )
