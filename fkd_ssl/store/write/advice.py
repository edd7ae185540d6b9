"""What a user should hear before a store is written that is larger than it need be."""

from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.store.codecs import code_size, usual_codec
from fkd_ssl.store.label_codecs import is_label

LARGE = 512  # bytes of a code: four times a 128-d target's in SQ8
_SMALLER = ("RR256,SQ8", "PCA256,SQ8")


def on_size(dim: int, codec: str, crops: int) -> str | None:
    """A warning where D makes the codes large, with what smaller codecs would take; None where they are not.

    Args:
        dim: D.
        codec: That was asked for.
        crops: Of all images together.

    Raises:
        RequestError: There is no such codec for this D.
    """
    size = code_size(codec, dim)
    if size <= LARGE or dim <= 256:
        return None
    if is_label(codec):
        usual = usual_codec("distribution", dim)
        smaller = code_size(usual, dim)
        return (
            f"note: {dim} class probabilities take {size} bytes a crop in {codec}, "
            f"{_size(crops * (size + CROP_DTYPE.itemsize))} in all; --codec {usual} takes {smaller} bytes, "
            f"{_size(crops * (smaller + CROP_DTYPE.itemsize))} in all"
        )
    smaller = code_size(_SMALLER[0], dim)
    return (
        f"note: targets of D = {dim} take {size} bytes each in {codec}, {_size(crops * (size + CROP_DTYPE.itemsize))} in all; "
        f"--codec {_SMALLER[0]} (random projection) or {_SMALLER[1]} takes {smaller} bytes, "
        f"{_size(crops * (smaller + CROP_DTYPE.itemsize))} in all; docs/teachers.md shows what either loses"
    )


def _size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
