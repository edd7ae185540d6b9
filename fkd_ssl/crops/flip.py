"""Horizontal flip of a crop."""

import cv2

from fkd_ssl.arrays import UInt8Array


def apply(view: UInt8Array, flags: int) -> None:
    """Mirrors a crop uint8 [P, P, 3] in place."""
    cv2.flip(view, 1, dst=view)
