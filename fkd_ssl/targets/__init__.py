"""The targets that a teacher gives for a crop: their kind and shape, their teacher, and the codecs that store them.

Each kind of targets is a `Kind` in `KINDS`. To add one, add it there, and an objective for it in `fkd_ssl.objectives`.
"""

from fkd_ssl.targets.info import Rgb, TeacherInfo
from fkd_ssl.targets.kind import Codec, Kind, Shape
from fkd_ssl.targets.precision import Precision
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
