"""Where images come from, and the one way to read an image's pixels."""

from fkd_ssl.images.decoding import (
    MAX_PIXELS,
    MAX_SIDE,
    UInt8Array,
    decode,
    header_size,
    read_bytes,
    read_image,
    read_size,
)
from fkd_ssl.images.folder import CONTENTS, SUFFIXES, ImageSet, scan

__all__ = [
    "CONTENTS",
    "MAX_PIXELS",
    "MAX_SIDE",
    "SUFFIXES",
    "ImageSet",
    "UInt8Array",
    "decode",
    "header_size",
    "read_bytes",
    "read_image",
    "read_size",
    "scan",
]
