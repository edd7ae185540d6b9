"""Label maps on disk, and the targets that a crop has by them.

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


class LabelMaps:
    """A finished folder of label maps, memory-mapped; fkd-ssl label-maps makes one.

    Args:
        folder: The folder.

    Attributes:
        folder: The folder.
        manifest: What the maps are made of: `teacher`, `classes` (K), `k`, `height`, `width`, `pixels` and more.
        paths: Relative paths of the images, by row.
        sizes: `bytes`, `width` and `height` of the images, by row.

    Raises:
        StoreError: There are no label maps, they are not finished, or the manifest or the list of images is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = layout.read_manifest(self.folder)
        self.paths, self.sizes = read_images(self.folder, self.manifest)
        if missing := layout.missing_shards(self.folder, self.manifest):
            raise StoreError(
                f"{self.folder}: {len(missing)} of {self.manifest.shards} shards are missing: run the same fkd-ssl label-maps "
                "again to finish them"
            )
        self._shards: dict[int, npt.NDArray[np.void]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # a pickled map would be a copy of the file

    @property
    def classes(self) -> int:
        """K."""
        return self.manifest.classes

    def rows(self, images: ImageSource) -> Int64Array:
        """The row of each image, found by its name: int64 [N]; raises StoreError, naming the first, if one has none."""
        rows = self.paths.positions(images.names)
        if missing := np.flatnonzero(rows < 0).tolist():
            raise StoreError(
                f"{self.folder}: has no label maps of {len(missing)} of the {len(images)} images of {images.spec}, for "
                f"instance {images.names[missing[0]]!r}: give the images that they were made of, or make maps of these with "
                "fkd-ssl label-maps"
            )
        return rows

    def read(self, row: int) -> tuple[Int64Array, Float32Array]:
        """Class numbers int64 [k, h, w] and their logits float32 [k, h, w], the largest first, of an image.

        Raises:
            IndexError: There is no such row.
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
                f"{layout.maps_file(self.folder, shard)}: row {within} holds impossible classes or logits: it is damaged; "
                "delete it and its .json, and run the same fkd-ssl label-maps again"
            )
        return classes, logits

    def targets(self, row: int, records: Records) -> Tensor:
        """Class probabilities float32 [M, K] of crops of an image: RoIAlign of its map to one place, then the softmax.

        A class that is not among a place's k has the logit 0 there, as in the authors' code. RoIAlign samples a box once for
        each place that it is high and wide, by bilinear interpolation; of the whole image that is the mean of the map. A flip
        changes nothing.

        Departures from the authors' code. It gives roi_align (top, left, bottom, right) where that takes (x1, y1, x2, y2):
        unless the maps that they publish are stored transposed, which cannot be told from their code, a crop gets the label of
        the box mirrored at the diagonal. Here x runs along the width. It also makes a box that is smaller than a place as large
        as one by moving its right and lower edge, as roi_align without `aligned` does; here a box keeps its middle. Crops of a
        twelfth of the image, on maps of 15 x 15 places, are never so small.

        Args:
            row: Of the image.
            records: Crop records [M], whose boxes are in pixels of the image that the map was made of.

        Raises:
            ImageError: A box lies outside that image.
            StoreError: As `read`.
        """
        height, width = int(self.sizes["height"][row]), int(self.sizes["width"][row])
        boxes = np.array([box[:4] for box in unpack(records, height, width)], dtype=np.float64).reshape(-1, 4)
        top, left, tall, wide = boxes.T
        x, y = self.manifest.width / width, self.manifest.height / height
        corners = np.stack([left * x, top * y, (left + wide) * x, (top + tall) * y], axis=1).astype(np.float32)
        classes, logits = self.read(row)
        present, place = np.unique(classes, return_inverse=True)
        maps = np.zeros((len(present), *classes.shape[1:]), dtype=np.float32)  # of the others all is 0
        np.put_along_axis(maps, place.reshape(classes.shape), logits, axis=0)
        pooled = roi_align(torch.from_numpy(maps)[None], [torch.from_numpy(corners)], output_size=1, aligned=True)
        whole = torch.zeros(len(boxes), self.classes)
        whole[:, torch.from_numpy(present)] = pooled[:, :, 0, 0]
        return whole.softmax(dim=1)

    def image_checksums(self) -> UInt8Array:
        """sha256 of all images as uint8 [N, 32]; raises StoreError if a sidecar is damaged."""
        paths = [layout.maps_file(self.folder, shard) for shard in range(self.manifest.shards)]
        sidecars = [layout.read_sidecar(path, self.manifest, shard) for shard, path in enumerate(paths)]
        return np.concatenate([files.digest_array(s["images"], p) for s, p in zip(sidecars, paths, strict=True)])

    def verify(self) -> None:
        """Compares every file of maps with its checksum; raises StoreError, naming the first that differs."""
        for shard in range(self.manifest.shards):
            path = layout.maps_file(self.folder, shard)
            if files.sha256_file(path) != layout.read_sidecar(path, self.manifest, shard)["file"]:
                raise StoreError(
                    f"{path}: altered: its sha256 is not that of its .json; delete both files and run the same fkd-ssl "
                    "label-maps again"
                )
