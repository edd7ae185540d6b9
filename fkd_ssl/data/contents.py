"""Whether images are still those that crops or label maps were made of."""

import hashlib

import numpy as np

from fkd_ssl.arrays import Int64Array, UInt8Array
from fkd_ssl.errors import ImageError


class Contents:
    """What the images of a data set held when a store or label maps were made of them.

    The content is compared when a process reads an image for the first time, later only its number of bytes: images of one
    size may have been swapped, and sha256 of a photograph takes 2 % of the time that its crops take, 7 % on processors
    without instructions for it.

    Args:
        checksums: sha256 of each image: uint8 [N, 32].
        sizes: Bytes of each image [N].
        since: When that was, for the message about a changed image.
        advice: What to do about it.
        every_pass: Compare the content each time.
    """

    def __init__(self, checksums: UInt8Array, sizes: Int64Array, *, since: str, advice: str, every_pass: bool = False) -> None:
        self._checksums, self._sizes = checksums, sizes
        self._since, self._advice, self._every_pass = since, advice, every_pass
        self._unread = np.ones(len(sizes), dtype=bool)

    def check(self, i: int, data: bytes, where: str) -> None:
        """Raises ImageError if image `i` has changed; `where` it is starts the message."""
        change = ""
        if len(data) != self._sizes[i]:
            change = f"{len(data)} bytes now, {self._sizes[i]} then"
        elif (self._every_pass or self._unread[i]) and hashlib.sha256(data).digest() != self._checksums[i].tobytes():
            change = f"other content of the same {len(data)} bytes"
        if change:
            raise ImageError(f"{where}: changed since {self._since}: {change}; {self._advice}")
        self._unread[i] = False
