"""Images named by a text file."""

import os
import unicodedata
from collections import Counter
from pathlib import Path

from fkd_ssl.errors import RequestError
from fkd_ssl.images.decoding import read_bytes
from fkd_ssl.images.folder import SUFFIXES, Folder
from fkd_ssl.images.names import is_line, refuse
from fkd_ssl.images.patterns import classes_of


class Listed(Folder):
    """The images that a UTF-8 text file lists: one path per line. All lines or none also have a tab and the image's class.

    Paths are absolute or relative to the folder of the text file. The name of an image is its path relative to that folder.
    If an image is outside it, names are relative to the deepest folder that contains all images. A list of all images of a
    folder is therefore the same set as the folder. Empty lines are skipped.

    Args:
        file: The text file.

    Raises:
        RequestError: The file is not such a list, or names an image twice.
    """

    def __init__(self, file: Path) -> None:
        try:
            lines = [line for line in read_bytes(file).decode("utf-8-sig").replace("\r\n", "\n").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise RequestError(f"{file}: not UTF-8 text; expected one image path per line") from error
        entries = [line.split("\t") for line in lines]
        if not entries:
            raise RequestError(f"{file}: names no images; expected one path per line")
        for k, entry in enumerate(entries):
            if len(entry) != len(entries[0]) or len(entry) > 2:
                raise RequestError(
                    f"{file}: entry {k + 1} has {len(entry) - 1} tabs; expected one path per line, or all PATH<TAB>CLASS"
                )
        above = Path(os.path.abspath(file)).parent  # noqa: PTH100  (resolves no links)
        paths = [os.path.normpath(above / path.strip()) for path, *_ in entries]
        odd = next((path for path in paths if Path(path).suffix.lower() not in SUFFIXES), None)
        if odd is not None:
            raise RequestError(f"{file}: {odd!r} is not an image by its suffix; a class is separated from the path by a tab")
        inside = all(path.startswith(f"{above}{os.sep}") for path in paths)
        root = str(above) if inside else os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
        relative = [path[len(root.rstrip(os.sep)) + 1 :].replace(os.sep, "/") for path in paths]
        refuse(file, (name for name in relative if not is_line(name)), "have control characters or line separators")
        spelled = [unicodedata.normalize("NFC", name) for name in relative]
        refuse(file, (name for name, count in Counter(spelled).items() if count > 1), "are listed more than once")
        super().__init__(Path(root), relative)
        self.spec = str(file)
        if len(entries[0]) == 2:
            given = dict(zip(spelled, (text.strip() for _, text in entries), strict=True))
            self.labels, self.classes = classes_of([[given[name].encode() for name in self.names]])
