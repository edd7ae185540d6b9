"""The folder of label maps: written once, never rewritten.

FOLDER/ contains `images.txt` (paths, one per line), `images.npy` (bytes, width and height of each), `manifest.json` (the last
file of a new folder) and `maps/NNNNN.npy`. Each of these is an array [rows] of records of `classes` uint16 [k, h, w] and
`logits` float16 [k, h, w], largest first. Its sidecar NNNNN.json has its sha256, the sha256 of its images, its shard, the
manifest's digest, and the skipped images, which have NaN logits. numpy.load reads every array without pickle.

Legend: `K` classes, `k` of them kept at each of `h` x `w` places.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fkd_ssl import files
from fkd_ssl.errors import RequestError, StoreError
from fkd_ssl.store import listing
from fkd_ssl.store.listing import MANIFEST, Listing, read_values
from fkd_ssl.store.manifest import string_list
from fkd_ssl.targets import TeacherInfo
from fkd_ssl.targets.info import difference

ROWS_PER_SHARD = 16384  # large, since every mapped file stays open
MAX_CLASSES = 2**16
MAX_MAP_BYTES = 2**28  # maximum bytes of an image's logits of all classes at each place, from which targets are pooled

MAPS = "maps"


@dataclass(frozen=True, kw_only=True)
class Manifest(Listing):
    """The manifest of label maps.

    Attributes:
        teacher: The classifier. Its `pixels` is the side of its input: the whole image, resized to a square.
        batch_size: Number of images per forward pass.
        replay_digest: Identifies the code that makes the pixels.
        k: Number of logits kept at each place.
        height: Height h of a map.
        width: Width w of a map.
    """

    FORMAT: ClassVar[str] = "fkd_ssl label maps"
    teacher: TeacherInfo
    batch_size: int
    replay_digest: str
    k: int
    height: int
    width: int

    @property
    def classes(self) -> int:
        """K."""
        return self.teacher.spec.size

    @property
    def _values(self) -> dict[str, Any]:
        return {**super()._values, "teacher": self.teacher.to_json()}

    def difference(self, other: "Manifest") -> str:
        """Describes the first key in which two manifests differ; "" if they are equal."""
        return difference(self._values, other._values)

    @property
    def dtype(self) -> np.dtype[np.void]:
        """The dtype of an image's map."""
        shape = (self.k, self.height, self.width)
        return np.dtype([("classes", "<u2", shape), ("logits", "<f2", shape)])


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of label maps.

    Raises:
        NotFoundError: The folder is missing or does not contain label maps.
        StoreError: The manifest is damaged, or this version cannot read it.
    """
    values, digest = read_values(folder, Manifest.FORMAT, what="a folder of label maps", command="fkd-ssl label-maps")
    path = folder / MANIFEST
    try:
        manifest = Manifest(**{**values, "teacher": TeacherInfo.from_json(values.get("teacher"))})
    except (TypeError, RequestError) as error:
        raise StoreError(f"{path}: keys are missing or unknown, or a value is invalid: {error}") from error
    limits = {
        "k": MAX_CLASSES,
        "height": 4096,
        "width": 4096,
        "rows_per_shard": 2**31,
        "count": 2**31,
        "batch_size": 2**16,
    }
    numbers = {name: values[name] for name in limits}
    fits = all(type(n) is int and 0 < n <= limits[name] for name, n in numbers.items()) and manifest.k <= manifest.classes
    fits = fits and 4 * manifest.classes * manifest.height * manifest.width <= MAX_MAP_BYTES
    if not fits or manifest.teacher.spec.kind != "distribution":
        raise StoreError(f"{path}: impossible numbers {numbers}, or another kind of teacher; the file is damaged")
    manifest.__dict__["digest"] = digest
    return manifest


def maps_file(folder: Path, shard: int) -> Path:
    """Returns the file of a shard's maps. Its sidecar has the suffix .json."""
    return files.reject_symlink(folder / MAPS) / f"{shard:05d}.npy"


def read_sidecar(path: Path, manifest: Manifest, shard: int) -> dict[str, Any]:
    """Reads the sidecar of a shard's maps. Raises StoreError if it is damaged, or of another shard or other label maps."""
    values = listing.read_sidecar(path, manifest, shard, {"images", "skipped"})
    skipped, count = values["skipped"], len(manifest.shard_rows(shard))
    if not isinstance(skipped, list) or not all(type(row) is int and 0 <= row < count for row in skipped):
        raise StoreError(f"{path}: its .json has an invalid list of skipped images; the file is damaged")
    string_list(values["images"], count, path.with_suffix(".json"))
    return values


def skipped_in(maps: npt.NDArray[np.void]) -> list[int]:
    """Returns the indices within a shard of the skipped images, which have NaN logits."""
    rows: list[int] = np.flatnonzero(np.isnan(maps["logits"][:, 0, 0, 0])).tolist()
    return rows


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Returns the shards that are not finished."""
    return [s for s in range(manifest.shards) if not maps_file(folder, s).with_suffix(".json").exists()]
