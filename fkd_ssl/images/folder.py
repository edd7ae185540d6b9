"""A folder of images."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import features

from fkd_ssl.errors import RequestError
from fkd_ssl.images.decoding import header_size, inaccessible, open_file, read_bytes
from fkd_ssl.images.names import is_line, refuse
from fkd_ssl.images.patterns import stamp_of
from fkd_ssl.images.source import ImageSource

# the same on all machines, since a store of the same folder must list the same images
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".avif", ".jp2", ".j2k"}
    | {".pbm", ".pgm", ".ppm", ".pnm", ".tga", ".tif", ".tiff"}
)
_OPTIONAL = {".avif": "avif", ".webp": "webp", ".jp2": "jpg_2000", ".j2k": "jpg_2000"}  # Pillow may lack these formats
_LISTED = 10  # maximum number of kinds of files in a message


class NoImagesError(RequestError):
    """A folder has no images."""


class Folder(ImageSource):
    """The images of a folder, in the order of their relative paths. The first folder of a path is the image's class.

    Args:
        root: The folder.
        paths: Relative POSIX paths as the file system returns them.
        left_out: Number of files that were left out, by suffix.

    Attributes:
        root: The folder.
    """

    def __init__(self, root: Path, paths: Iterable[str], left_out: Counter[str] | None = None) -> None:
        spelled = {unicodedata.normalize("NFC", path): path for path in paths}
        names = sorted(spelled)
        folders = [name.split("/", 1)[0] if "/" in name else None for name in names]
        classes = sorted({folder for folder in folders if folder is not None})
        index = {name: i for i, name in enumerate(classes)}
        super().__init__(str(root), names, [-1 if folder is None else index[folder] for folder in folders], classes)
        self.root = root
        self._spelled = {k: spelled[name] for k, name in enumerate(names) if spelled[name] != name}  # macOS gives NFD
        if left_out:
            self.notes.append(f"{root}: {left_out.total():,} files are not images by their names: {_kinds(left_out)}")

    def where(self, index: int) -> str:
        """Returns the path of image `index`."""
        return f"{self.root}/{self._spelled.get(index) or self.names[index]}"

    def file(self, index: int) -> Path:
        """Returns the file of image `index`."""
        return Path(self.where(index))

    def read(self, index: int) -> bytes:
        """Returns the bytes of the file of image `index`. Raises ImageAccessError if it cannot be read."""
        return read_bytes(self.where(index))

    def byte_size(self, index: int) -> int:
        """Returns the size in bytes of the file of image `index`. Raises ImageAccessError if it is missing."""
        try:
            return os.stat(self.where(index)).st_size  # noqa: PTH116  (of a million files)
        except OSError as error:
            raise inaccessible(self.where(index), error) from error

    def stamp(self, index: int) -> tuple[str, float]:
        """Returns device, inode, size and times of the file of image `index`. Raises ImageAccessError if it is missing."""
        return stamp_of(self.where(index))

    def size(self, index: int) -> tuple[int, int, int]:
        """Returns bytes, width and height of image `index`. Reads only its header."""
        path = self.where(index)
        with open_file(path) as file:
            return os.fstat(file.fileno()).st_size, *header_size(file, path)


def scan(root: str | Path) -> Folder:
    """Lists the images under `root`, following links to folders as torchvision's `ImageFolder` does.

    Raises:
        RequestError: `root` is not a folder, or has no images, a folder that cannot be listed, images of a format that the
            installed Pillow cannot read, or names that cannot be stored as lines.
    """
    if not str(root):
        raise RequestError("images: the name of the folder is empty")
    root = Path(root)
    if not os.path.isdir(root):  # noqa: PTH112  (unlike Path, False for a name that is too long)
        raise RequestError(f"{root}: no such folder of images")
    left_out: Counter[str] = Counter()
    try:
        files = _walk(root, (), left_out)
    except OSError as error:
        raise RequestError(f"{error.filename}: cannot be listed: {error.strerror}") from error
    relative = [path[len(str(root)) :].lstrip(os.sep).replace(os.sep, "/") for path in files]
    wrong = (name for name in relative if not is_line(name))
    refuse(root, wrong, "have control characters, line separators or bytes that are not UTF-8")
    found: dict[str, str] = {}
    twice: list[str] = []
    for name in relative:
        if (first := found.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            twice += [first, name]
    refuse(root, twice, "are the same in Unicode's NFC form as another one")
    if not found:
        others = f"; it holds {_kinds(left_out)}" if left_out else ""
        raise NoImagesError(f"{root}: no images in this folder (looked for {', '.join(sorted(SUFFIXES))}){others}")
    _check_formats(root, relative)
    return Folder(root, relative, left_out)


def _check_formats(root: Path, paths: Iterable[str]) -> None:
    """Raises RequestError if the installed Pillow cannot read the format of an image, which would count as damaged."""
    suffixes = {os.path.splitext(path)[1].lower() for path in paths}  # noqa: PTH122  (a million of them)
    for suffix in sorted(suffixes & _OPTIONAL.keys()):
        if not features.check(_OPTIONAL[suffix]):
            raise RequestError(f"{root}: this Pillow was built without {suffix}; update it (pip install --upgrade pillow)")


def _kinds(left_out: Counter[str]) -> str:
    """Describes the number of files of each suffix."""
    common = sorted(left_out.items(), key=lambda item: (-item[1], item[0] or "~"))[:_LISTED]
    return ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in common)


def _walk(folder: str | Path, above: tuple[tuple[int, int], ...], left_out: Counter[str]) -> list[str]:
    """Lists the files with an image suffix under `folder` and counts the others. Links to a parent folder are not followed."""
    stat = Path(folder).stat()
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return []
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                files += _walk(entry.path, (*above, here), left_out)
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in SUFFIXES:  # noqa: PTH122  (a million of them)
                files.append(entry.path)
            else:
                left_out[suffix] += 1
    return files
