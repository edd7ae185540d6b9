"""Training of students."""

from fkd_ssl.training.config import TrainConfig

__all__ = ["TrainConfig"]
