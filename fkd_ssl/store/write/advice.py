"""Advice before a store is written that is larger than necessary."""

from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.store.codecs import code_size, usual_codec
from fkd_ssl.store.label_codecs import is_label
from fkd_ssl.text import format_bytes

LARGE = 512  # bytes of a code: four times a 128-d target's in SQ8
_SMALLER = ("RR256,SQ8", "PCA256,SQ8")


def on_size(dim: int, codec: str, crops: int) -> str | None:
    """A note if D makes the codes large, with the sizes of smaller codecs; None if the codes are small.

    Args:
        dim: D.
        codec: The codec that was chosen.
        crops: Crops of all images together.

    Raises:
        RequestError: There is no such codec for this D.
    """
    size = code_size(codec, dim)
    if size <= LARGE or dim <= 256:
        return None

    def total(code: int) -> str:
        return f"{code} bytes a crop ({format_bytes(crops * (code + CROP_DTYPE.itemsize))} in all)"

    if is_label(codec):
        usual = usual_codec("distribution", dim)
        smaller = code_size(usual, dim)
        return f"note: {dim} class probabilities take {total(size)} in {codec}; --codec {usual} takes {total(smaller)}"
    smaller = code_size(_SMALLER[0], dim)
    return (
        f"note: targets of D = {dim} take {total(size)} in {codec}; --codec {_SMALLER[0]} (random projection) or {_SMALLER[1]} "
        f"takes {total(smaller)}; docs/teachers.md shows what either loses"
    )
