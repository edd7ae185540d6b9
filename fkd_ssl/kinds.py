"""Kinds of targets."""

from typing import Literal

Kind = Literal["embedding", "distribution"]
"""An L2-normalised vector, or class probabilities."""
