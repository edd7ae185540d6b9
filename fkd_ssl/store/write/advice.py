"""Advice before writing a store that is larger than necessary."""

from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.targets import TargetSpec
from fkd_ssl.text import format_bytes

LARGE = 512  # bytes per code: four times those of a 128-d target with SQ8
_SMALLER = ("RR256,SQ8", "PCA256,SQ8")


def on_size(target: TargetSpec, codec: str, crops: int) -> str | None:
    """Returns a note with the sizes of smaller codecs if the codes are large; None otherwise.

    Args:
        target: Kind and shape of the targets.
        codec: The chosen codec.
        crops: Total number of crops of all images.

    Raises:
        RequestError: The codec does not exist for these targets.
    """
    definition, shape = target.definition, target.shape
    size = definition.code_size(codec, shape)
    if size <= LARGE or target.size <= 256:
        return None

    def total(code: int) -> str:
        return f"{code} bytes per crop ({format_bytes(crops * (code + CROP_DTYPE.itemsize))} in all)"

    if target.kind in ("distribution", "tokens"):
        default = definition.default_codec(shape)
        least = definition.code_size(default, shape)
        if least >= size:
            return None
        what = f"{target.size} class probabilities" if target.kind == "distribution" else str(target)
        return f"note: {what} take {total(size)} in {codec}; --codec {default} takes {total(least)}"
    said = f"note: targets of {target} take {total(size)} in {codec}"
    if target.kind != "embedding":
        return said
    smaller = total(definition.code_size(_SMALLER[0], shape))
    return (
        f"{said}; --codec {_SMALLER[0]} (random projection) or {_SMALLER[1]} takes {smaller}; docs/teachers.md shows what "
        "either loses"
    )
