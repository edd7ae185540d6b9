"""What a teacher says of a crop: its kind and shape, who said it, and the codecs that turn it into bytes and back.

A kind of targets is a `Kind` in `KINDS`; a new one is added there, and an objective for it in `fkd_ssl.objectives`.
"""

from fkd_ssl.targets.info import Precision, Rgb, TeacherInfo
from fkd_ssl.targets.kind import Codec, Kind, Shape
from fkd_ssl.targets.spec import KINDS, TargetSpec

__all__ = [
    "KINDS",
    "Codec",
    "Kind",
    "Precision",
    "Rgb",
    "Shape",
    "TargetSpec",
    "TeacherInfo",
]
