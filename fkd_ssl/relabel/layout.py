"""The folder of label maps: written once, never rewritten.

FOLDER/ holds `images.txt` (paths, a line each), `images.npy` (bytes, width and height of each), `manifest.json`, the last file
of a new folder, and `maps/NNNNN.npy`, an array [rows] of records of `classes` uint16 [k, h, w] and `logits` float16 [k, h, w],
the largest first, each with a sidecar NNNNN.json: its sha256, those of its images, its shard, the manifest's digest, and the
images that were skipped, whose logits are NaN. numpy.load reads every array without pickle.

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

ROWS_PER_SHARD = 16384  # few files, since each that is mapped stays open
MAX_CLASSES = 2**16
MAX_MAP_BYTES = 2**28  # of an image's logits of all classes at each place, from which targets are pooled

MAPS = "maps"


@dataclass(frozen=True, kw_only=True)
class Manifest(Listing):
    """What label maps are made of.

    Attributes:
        teacher: Whose logits these are; its `pixels` are the side of what it saw: the whole image, squashed to a square.
        batch_size: Images in one forward.
        probe_digest: Of the pixels that replay makes.
        k: Logits kept at each place.
        height: h.
        width: w.
    """

    FORMAT: ClassVar[str] = "fkd_ssl label maps"
    teacher: TeacherInfo
    batch_size: int
    probe_digest: str
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
        """The first key in which they differ, and its values; "" where they are the same."""
        return difference(self._values, other._values)

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Of an image's map."""
        shape = (self.k, self.height, self.width)
        return np.dtype([("classes", "<u2", shape), ("logits", "<f2", shape)])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of label maps.

    Raises:
        NotFoundError: The folder is missing or does not hold label maps.
        StoreError: This version does not read them, or they are damaged.
    """
    values, digest = read_values(folder, Manifest.FORMAT, what="a folder of label maps", command="fkd-ssl label-maps")
    path = folder / MANIFEST
    try:
        manifest = Manifest(**{**values, "teacher": TeacherInfo.from_json(values.get("teacher"))})
    except (TypeError, RequestError) as error:
        raise StoreError(f"{path}: keys are missing or unknown, or a value is invalid: {error}") from error
    most = {
        "k": MAX_CLASSES, "height": 4096, "width": 4096, "rows_per_shard": 2**31, "count": 2**31, "batch_size": 2**16,
    }  # fmt: skip
    numbers = {name: values[name] for name in most}
    fits = all(type(n) is int and 0 < n <= most[name] for name, n in numbers.items()) and manifest.k <= manifest.classes
    fits = fits and 4 * manifest.classes * manifest.height * manifest.width <= MAX_MAP_BYTES
    if not fits or manifest.teacher.spec.kind != "distribution":
        raise StoreError(f"{path}: impossible numbers {numbers}, or another kind of teacher; the file is damaged")
    manifest.__dict__["digest"] = digest
    return manifest


def maps_file(folder: Path, shard: int) -> Path:
    """Maps of a shard; its sidecar has the suffix .json."""
    return files.reject_symlink(folder / MAPS) / f"{shard:05d}.npy"


def read_sidecar(path: Path, manifest: Manifest, shard: int) -> dict[str, Any]:
    """The sidecar of a shard's maps; raises StoreError where it is damaged, or of another shard or other label maps."""
    values = listing.read_sidecar(path, manifest, shard, {"images", "skipped"})
    skipped, count = values["skipped"], len(manifest.shard_rows(shard))
    if not isinstance(skipped, list) or not all(type(row) is int and 0 <= row < count for row in skipped):
        raise StoreError(f"{path}: its .json has an impossible list of skipped images; the file is damaged")
    string_list(values["images"], count, path.with_suffix(".json"))
    return values


def skipped_in(maps: npt.NDArray[np.void]) -> list[int]:
    """The images of a shard, from 0, that were skipped: their logits are NaN."""
    rows: list[int] = np.flatnonzero(np.isnan(maps["logits"][:, 0, 0, 0])).tolist()
    return rows


def missing_shards(folder: Path, manifest: Manifest) -> list[int]:
    """Shards that are not finished."""
    return [s for s in range(manifest.shards) if not maps_file(folder, s).with_suffix(".json").exists()]
