"""Image sources, and the decoder that all of them share."""

from fkd_ssl.images.decoding import decode, read_bytes, read_image, read_size
from fkd_ssl.images.folder import SUFFIXES, Folder, scan
from fkd_ssl.images.listed import Listed
from fkd_ssl.images.names import Names
from fkd_ssl.images.opening import SOURCES, absolute, open_images
from fkd_ssl.images.source import CONTENTS, ImageSource
from fkd_ssl.images.tables import Table
from fkd_ssl.images.tars import Tars

__all__ = [
    "CONTENTS",
    "SOURCES",
    "SUFFIXES",
    "Folder",
    "ImageSource",
    "Listed",
    "Names",
    "Table",
    "Tars",
    "absolute",
    "decode",
    "open_images",
    "read_bytes",
    "read_image",
    "read_size",
    "scan",
]
