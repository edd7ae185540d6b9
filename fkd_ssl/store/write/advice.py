"""Advice before writing a store: what the codecs of tokens take, and which codec is smaller if the codes are large."""

from fkd_ssl.crops import CROP_DTYPE
from fkd_ssl.targets import TargetSpec
from fkd_ssl.text import format_bytes

LARGE = 512  # bytes per code: four times those of a 128-d target with SQ8
_SMALLER = ("RR256,SQ8", "PCA256,SQ8")
_OF_TOKENS = ("Flat", "SQ8", "SQ4")


def on_size(target: TargetSpec, codec: str, crops: int) -> str | None:
    """Returns a note with the sizes of the codecs of tokens, or of smaller codecs if the codes are large; None otherwise.

    Args:
        target: Kind and shape of the targets.
        codec: The chosen codec.
        crops: Total number of crops of all images.

    Raises:
        RequestError: The codec does not exist for these targets.
    """
    definition, shape = target.definition, target.shape
    size = definition.code_size(codec, shape)
    if target.size <= 256:
        return None
    if target.kind == "tokens":
        names = {*_OF_TOKENS, definition.default_codec(shape), codec}
        sizes = sorted(((definition.code_size(name, shape), name) for name in names), reverse=True)
        listed = ", ".join(f"{name} {code:,} ({_in_all(code, crops)})" for code, name in sizes)
        return f"note: {target}: bytes per crop (in all) by codec: {listed}; this column is in {codec}"
    if size <= LARGE:
        return None

    def total(code: int) -> str:
        return f"{code} bytes per crop ({_in_all(code, crops)} in all)"

    if target.kind == "distribution":
        default = definition.default_codec(shape)
        least = definition.code_size(default, shape)
        if least >= size:
            return None
        return f"note: {target.size} class probabilities take {total(size)} in {codec}; --codec {default} takes {total(least)}"
    said = f"note: targets of {target} take {total(size)} in {codec}"
    if target.kind != "embedding":
        return said
    smaller = total(definition.code_size(_SMALLER[0], shape))
    return (
        f"{said}; --codec {_SMALLER[0]} (random projection) or {_SMALLER[1]} takes {smaller}; docs/teachers.md shows what "
        "either loses"
    )


def _in_all(code: int, crops: int) -> str:
    return format_bytes(crops * (code + CROP_DTYPE.itemsize))
