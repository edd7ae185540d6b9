"""Frozen teachers: published checkpoints, networks of libraries, and your own networks."""

from fkd_ssl.teachers.ensemble import Ensemble
from fkd_ssl.teachers.presets import PRESETS, Preset
from fkd_ssl.teachers.registry import FAMILIES, load_teacher
from fkd_ssl.teachers.teacher import Teacher

__all__ = ["FAMILIES", "PRESETS", "Ensemble", "Preset", "Teacher", "load_teacher"]
