"""Students: the networks that distillation trains."""

from fkd_ssl.students.backbones import REACTNETS, TIMM, make_backbone
from fkd_ssl.students.heads import CLASSIFIER, HEADS, make_head
from fkd_ssl.students.reactnet import ReActNet
from fkd_ssl.students.saved import EXPORTED, STUDENT_KEY, load_student
from fkd_ssl.students.size import Size, measure
from fkd_ssl.students.student import MEAN, STD, Dim, Student, check_student, dims_of

__all__ = [
    "CLASSIFIER",
    "EXPORTED",
    "HEADS",
    "MEAN",
    "REACTNETS",
    "STD",
    "STUDENT_KEY",
    "TIMM",
    "Dim",
    "ReActNet",
    "Size",
    "Student",
    "check_student",
    "dims_of",
    "load_student",
    "make_backbone",
    "make_head",
    "measure",
]
