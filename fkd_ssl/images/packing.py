"""Writes images into tar files in webdataset's layout."""

import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from fkd_ssl import files
from fkd_ssl.errors import RequestError
from fkd_ssl.images.names import refuse
from fkd_ssl.images.shards import LocalShard
from fkd_ssl.images.source import ImageSource
from fkd_ssl.images.tars import index_of, key_of

_MAX_TARS = 10**5


class TarWriter:
    """Writes a set of images into `count` tars of consecutive images. Each tar appears when it is complete.

    An image `KEY.jpg` keeps its name. The number of its class is in the member `KEY.cls`.

    Args:
        images: The image set.
        folder: Folder of the tars.
        count: Number of tars.

    Raises:
        RequestError: There are more tars than images, or the layout cannot hold a name or class.
    """

    def __init__(self, images: ImageSource, folder: Path, count: int) -> None:
        if not 1 <= count <= min(len(images), _MAX_TARS):
            raise RequestError(
                f"--tars {count}: must be between 1 and {min(len(images), _MAX_TARS):,}, for {len(images):,} images"
            )
        refuse(
            images.spec,
            (n for n in images.names if PurePosixPath(n).name[0] == "."),
            "begin with a dot, and webdataset skips such members",
        )
        self._images, self._folder, self._count = images, folder, count
        several = (list(same) for _, same in itertools.groupby(range(len(images)), lambda k: key_of(images.names[k])[0]))
        clash = (images.names[same[0]] for same in several if len({int(images.labels[k]) for k in same}) > 1)
        refuse(
            images.spec,
            clash,
            "have the same part before the first dot as an image of another class, so both would need the same .cls file",
        )

    def tars(self) -> Iterator[tuple[Path, range]]:
        """Yields each tar, and its images."""
        for k in range(self._count):
            first, end = (len(self._images) * n // self._count for n in (k, k + 1))
            yield self._folder / f"{k:05d}.tar", range(first, end)

    def finished(self, tar: Path, rows: range) -> dict[int, int] | None:
        """Returns the bytes of each image in a finished tar; None without one. Raises RequestError if it is of other images."""
        if not tar.exists():
            return None
        index = index_of(LocalShard(tar))
        where = {self._images.names[row]: row for row in rows}
        if wrong := [name for name in index.names if name not in where]:
            raise RequestError(f"{tar}: holds {wrong[0]!r}, which is not in this part of the copy; choose another --out")
        return {where[name]: size for name, (_, size) in zip(index.names, index.spans.tolist(), strict=True)}

    def write(self, tar: Path, found: Iterable[tuple[int, bytes]]) -> None:
        """Writes a tar of images, each given by its index and its bytes, in ascending order."""
        images = self._images
        with files.create(tar) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
            key, label = "", -1
            for row, data in found:
                if key and key != key_of(images.names[row])[0]:
                    _add_class(archive, key, label)
                key, label = key_of(images.names[row])[0], int(images.labels[row])
                _add(archive, images.names[row], data)
            _add_class(archive, key, label)


def _add_class(archive: tarfile.TarFile, key: str, label: int) -> None:
    if label >= 0:
        _add(archive, f"{key}.cls", str(label).encode())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a member without owner and times, so that the same images give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
