"""Students: the networks that distillation trains."""

from fkd_ssl.students.backbones import REACTNETS, TIMM, make_backbone
from fkd_ssl.students.heads import CLASSIFIER, HEADS, make_head
from fkd_ssl.students.reactnet import ReActNet
from fkd_ssl.students.saved import EXPORTED, STUDENT_KEY, load_student
from fkd_ssl.students.size import Size, measure
from fkd_ssl.students.student import MEAN, STD, Student, check_student

__all__ = [
    "CLASSIFIER",
    "EXPORTED",
    "HEADS",
    "MEAN",
    "REACTNETS",
    "STD",
    "STUDENT_KEY",
    "TIMM",
    "ReActNet",
    "Size",
    "Student",
    "check_student",
    "load_student",
    "make_backbone",
    "make_head",
    "measure",
]
